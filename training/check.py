"""What `python train.py CONFIG check=true` prints: every resolved value and where it comes from.

The checks themselves are those of every start (common.settings, training.ds_config, the files the
run names); this shows their result before a job is queued.
"""

import json
from pathlib import Path
from typing import Any

from common.settings import parse_overrides, read_yaml_file
from training.ds_config import FP32_GRADIENTS, QUIET, read_ds_config

DERIVED = {
    "gradient_accumulation_steps": "derived: global_batch_size / micro batch / ranks",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "gradient_clipping",
}


def sources(path: str | Path, arguments: list[str]) -> dict[str, str]:
    """Dotted key -> "override", or the name of the file that gives it; the last one wins."""
    chain: list[tuple[str, dict]] = []
    current: Path | None = Path(path)
    while current is not None:
        values, base = read_yaml_file(current)
        chain.append((str(current), values))
        current = None if base is None else current.parent / base
    found: dict[str, str] = {}
    for name, values in [*reversed(chain), ("override", parse_overrides(arguments))]:
        found |= dict.fromkeys(_flatten(values), name)
    return found


def _flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inside = _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= inside or {f"{prefix}{key}": value}
    return flat


def report_lines(
    config: dict[str, Any], arguments: list[str], ds_path: str, completed: dict[str, Any]
) -> list[str]:
    """`key = value  # source` for every key of the experiment and of what DeepSpeed gets.

    Args:
        config: resolved. arguments: train.py's. completed: the engine's config at `ds_path`.
    """
    given = sources(arguments[0], arguments[1:])
    rows = [(key, value, given.get(key, "default")) for key, value in _flatten(config).items()]
    in_file, ours = _flatten(read_ds_config(ds_path)), _flatten(QUIET | FP32_GRADIENTS)
    engine = []
    for key, value in _flatten(completed).items():
        source = ds_path if key in in_file else DERIVED.get(key)
        engine.append((key, value, source or ("default" if key in ours else "DeepSpeed")))
    return [*_aligned(rows), "", "DeepSpeed:", *_aligned(engine)]


def _aligned(rows: list[tuple[str, Any, str]]) -> list[str]:
    texts = [(f"{key} = {json.dumps(value, default=str)}", source) for key, value, source in rows]
    width = min(max((len(text) for text, _ in texts), default=0), 60)
    return [f"{text:<{width}}  # {source}" for text, source in texts]
