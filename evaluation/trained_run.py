"""A trained model and its settings, out of a run directory or of an exported folder.

Called by tools.export, tools.sample, tools.replay and evaluation.tables.
"""

import json
from pathlib import Path
from typing import Any

import torch

from common.settings import ConfigError
from model import AVFullDiT, AVFullDiTConfig
from model.weights.hub import one_line_errors
from training.checkpoint.save_load import CheckpointError, read_weights

RESTORE = "restore it from a copy, or train again"


def read_run_file(path: Path) -> dict[str, Any]:
    """A JSON file of RUN/config; ConfigError names it if it is missing or damaged."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; RUN must be a run directory of train.py, or a "
                          "folder of tools.export")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no valid JSON ({error}); {RESTORE}") from error


def read_setting(values: Any, path: Path, *keys: str) -> Any:
    """values[key][key]...; ConfigError naming the file and the key that is missing."""
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            raise ConfigError(f"{path}: key '{key}' is missing; {RESTORE}")
        values = values[key]
    return values


def load_model(
    run: Path, step: int | None, attention: str, dtype: torch.dtype, device: torch.device,
    ema: bool = False,
) -> tuple[int, AVFullDiT]:
    """(step, model) of a run directory's checkpoint, the newest by default, or of an exported
    folder, which holds one step only.

    Raises, each in one line: ConfigError (RUN/config), CheckpointError (weights).
    """
    if (run / "config.json").is_file():
        held = read_setting(read_run_file(run / "export.json"), run / "export.json", "step")
        if step not in (None, held):
            raise CheckpointError(f"step={step}: {run} was exported from step {held}; leave it out")
        if ema:
            raise CheckpointError(f"--ema: choose it when exporting; {run} holds what was exported")
        with one_line_errors(CheckpointError, str(run), "export it again"):
            return held, AVFullDiT.from_pretrained(
                run, attention=attention, dtype=dtype, device=device
            )
    config = run / "config/model.json"
    with one_line_errors(ConfigError, str(config), RESTORE), torch.device("meta"):
        model = AVFullDiT(AVFullDiTConfig.from_dict(read_run_file(config)), attention=attention)
    with one_line_errors(CheckpointError, f"{run}/checkpoints", RESTORE):
        step, weights = read_weights(run, step, ema)
        model.load_state_dict(weights, assign=True)  # built without storage: no second copy
    return step, model.to(device, dtype)
