"""Trained weights out of a run: `python -m tools.export RUN FOLDER [--step N] [--layout released]`.

The default folder is AVFullDiT.save_pretrained's (config.json and safetensors, float32), with the
run's own configuration next to it: `AVFullDiT.from_pretrained(FOLDER)` and `tools.sample FOLDER`
read it. `--layout released` writes each tower under its released names instead, as far as those
reach: the new weights of the joint blocks have no place there.
"""

import argparse
import sys
from pathlib import Path

import torch

from common.files import write_json
from common.settings import ConfigError
from evaluation.trained_run import load_model, read_run_file, read_setting
from model.weights.hub import iter_tensors, one_line_errors, tangoflux_file
from model.weights.load import TANGOFLUX_OTHER, PretrainedError, export_tangoflux, export_wan
from model.weights.released import TANGOFLUX_OTHER_TENSORS
from training.checkpoint.save_load import CheckpointError

RUN_FILES = ("run.json", "data.json")  # what sampling needs to know besides the model


def export(run: Path, folder: Path, step: int | None, layout: str, ema: bool = False) -> int:
    """Write `folder`, which must not exist or be empty; returns the step of the weights."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"FOLDER={folder}: not empty; give another or delete it")
    files = {name: read_run_file(run / "config" / name) for name in RUN_FILES}
    step, model = load_model(run, step, "sdpa", torch.float32, torch.device("cpu"), ema)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "released":
        export_wan(model.state_dict(), model.config, folder / "wan")
        if model.config.task == "t2av":
            where = run / "config/run.json"
            source = read_setting(files["run.json"], where, "tangoflux")
            with one_line_errors(ConfigError, f"tangoflux={source}"):
                path, config = tangoflux_file(source, "tangoflux.safetensors")
                text = {TANGOFLUX_OTHER_TENSORS + name: value
                        for name, value in iter_tensors([path], TANGOFLUX_OTHER_TENSORS)}
            other = {key: config[key] for key in TANGOFLUX_OTHER if key in config}
            export_tangoflux(
                model.state_dict(), model.config, folder / "tangoflux", text, other
            )
        return step
    (folder / "config").mkdir()
    for name, values in files.items():
        write_json(folder / "config" / name, values)
    write_json(folder / "export.json", {"step": step, "ema": ema})
    model.save_pretrained(folder)
    return step


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory of train.py")
    parser.add_argument("folder", type=Path, help="to write; new or empty")
    parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (ema_decay)")
    parser.add_argument("--layout", choices=("avfulldit", "released"), default="avfulldit")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse_arguments(None)
    try:
        step = export(arguments.run, arguments.folder, arguments.step, arguments.layout,
                      arguments.ema)
    except (ConfigError, CheckpointError, PretrainedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    print(f"{arguments.folder}: step {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
