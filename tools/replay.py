"""One step's samples again, alone: `python -m tools.replay RUN STEP [ID]`.

Draws the batch of update STEP (as metrics.jsonl and events.jsonl count) from the same order and the
same keyed streams, on one process whatever the run had, and prints per sample a JSON object: t, the
digests of its noised inputs, whether its latents are finite, and its losses under the weights of
the newest kept checkpoint before that step. Nothing is written.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.settings import ConfigError, parse_config
from data.loading.loader import build_loader
from data.loading.sources import DataConfig, open_streams
from data.schema import DataError
from evaluation.trained_run import load_model, read_run_file, read_setting
from model.flow import FlowConfig
from model.objective import Objective
from model.variants import JointConfig
from training.checkpoint.retention import complete_tags
from training.checkpoint.run_dir import CheckpointError, step_of
from training.guards.bad_numbers import json_number


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().float().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def steps_kept(run: Path) -> list[int]:
    return [step_of(tag) for tag in complete_tags(run)]


def replay(
    run: Path, step: int, name: str | None, device: torch.device
) -> Iterator[dict[str, Any]]:
    """One object per sample of update `step`, or of the one with that id.

    Raises:
        ConfigError: no such step or sample. DataError, CheckpointError: files that are gone.
    """
    where = run / "config" / "run.json"
    values = read_run_file(where)
    last = read_setting(values, where, "max_steps")
    if not 1 <= step <= last:
        raise ConfigError(f"step={step} must be 1 to {last}, as metrics.jsonl counts them")
    data = parse_config(DataConfig, read_setting(values, where, "data"), f"{where}: data")
    flow = parse_config(FlowConfig, read_setting(values, where, "flow"), f"{where}: flow")
    joint = parse_config(JointConfig, read_setting(values, where, "model"), f"{where}: model")
    objective = Objective(values["task"], values["seed"], flow)
    loader = build_loader(data, values["global_batch_size"], 0, 1, values["seed"], step - 1)
    epoch, batch = next(loader)
    loader.close()
    batch = objective.drop_captions(batch, epoch, open_streams(data)[0].text_states)
    chosen = [i for i, found in enumerate(batch.sample_ids) if name in (None, found)]
    if not chosen:
        raise ConfigError(f"id={name} is not in step {step}; there are {batch.sample_ids}")
    before = [kept for kept in steps_kept(run) if kept < step]
    held, model = 0, None
    if before:
        held, model = load_model(run, before[-1], values["attention"], torch.float32, device)
        model.eval()
    t = objective.draw_t(batch.sample_ids, epoch)
    for index in chosen:
        part = slice(index, index + 1)
        one = batch.part(part)
        noised = objective.noise(one, t[part], epoch, device)
        told: dict[str, Any] = {
            "step": step, "epoch": epoch, "id": one.sample_ids[0], "t": float(t[index]),
            "latents_finite": bool(one.video_latents.isfinite().all()
                                   and one.audio_mean.isfinite().all()
                                   and one.audio_std.isfinite().all()),
        }
        told |= {key: digest(noised.inputs[key][0]) for key in ("noisy_video", "noisy_audio")
                 if key in noised.inputs}
        if model is not None:
            with torch.no_grad():
                losses = objective.losses(model, noised, joint.cross_modal_bias(step - 1))
            told |= {"weights_of_step": held, "loss_video": json_number(float(losses[0]))}
            if values["task"] == "t2av":
                told["loss_audio"] = json_number(float(losses[1]))
        yield told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("step", type=int)
    parser.add_argument("id", nargs="?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    try:
        for told in replay(arguments.run, arguments.step, arguments.id,
                           torch.device(arguments.device)):
            print(json.dumps(told), flush=True)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
