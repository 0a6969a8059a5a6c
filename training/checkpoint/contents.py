"""manifest.json: what the checkpoint is and every file's sha256, in a file that checks
itself. Written last, it makes a folder a checkpoint. Called by training.checkpoint.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from common.files import json_sha256, write_json
from training.checkpoint.run_dir import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 2  # 1 held DeepSpeed's own files


class FormatError(CheckpointError):
    """Another version of the code wrote it."""


@dataclass(frozen=True)
class Contents:
    """All of a checkpoint but its tensors."""

    step: int
    world_size: int  # that wrote it; any other may read it
    updates: int  # of the optimiser: steps less the skipped ones
    skipped_steps: int
    parameters: dict[str, list[int]]  # name -> shape
    kinds: list[str]  # weight, exp_avg, exp_avg_sq, ema: a file each per rank
    groups: list[dict[str, Any]]  # the optimiser's settings, for the record
    files: dict[str, tuple[int, str]]  # name -> (bytes, sha256)
    run: dict[str, Any]  # resume.describe_run, and the state of guard, accumulator and loader

    def __post_init__(self) -> None:
        for name in self.files:
            if Path(name).name != name:
                raise ValueError(f"file {name!r} is not inside the checkpoint")
        if "weight" not in self.kinds or (self.updates and "exp_avg" not in self.kinds):
            raise ValueError(f"kinds={self.kinds} are not enough")


_ADAPTER = TypeAdapter(Contents)


def write_contents(tag: Path, contents: Contents) -> None:
    values = json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(contents)}))
    write_json(tag / MANIFEST, {**values, "sha256": json_sha256(values)})


def read_contents(tag: Path) -> Contents:
    """Checked to the last digit.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        FormatError: it may be whole, but not for this code.
    """
    path = tag / MANIFEST
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    if values.get("format") != FORMAT:
        raise FormatError(f"{path} is not of format {FORMAT}: go on with the version of the code "
                          "that wrote it, or move it away")
    if values.pop("sha256", None) != json_sha256(values):
        raise CheckpointError(f"{path} differs from its own sha256")
    del values["format"]
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {first['loc']}: {first['msg']}") from error


def wrong_size(tag: Path, contents: Contents) -> str | None:
    """What is missing or cut among a checkpoint's files; None where all are there."""
    for name, (size, _) in contents.files.items():
        path = tag / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{path} is missing or has not the {size} bytes that {MANIFEST} says"
    return None
