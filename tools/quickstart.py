"""The whole product in minutes on a CPU: clips -> shards -> ZeRO-3 training -> an mp4 with sound.

Run by `make quickstart`. It prints each command before running it, and exits non-zero unless the
validation loss of both modalities fell and the sampled clip has a picture and sound.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.files import read_lines
from data.clips.decode import CutSpec, read_cut
from data.reasons import Rejected

ROOT = Path("runs/quickstart")
CONFIG = "configs/playground.yaml"


class QuickstartError(RuntimeError):
    """A step of the quickstart did not give what it must."""


def step(title: str, *command: str) -> None:
    """Run one command in the open."""
    print(f"\n== {title}\n$ {' '.join(command)}", flush=True)
    began = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    if code:
        raise QuickstartError(f"'{title}' exited with {code}")
    print(f"== {title}: {time.perf_counter() - began:.0f} s", flush=True)


def validation_losses(run_dir: Path) -> tuple[dict[str, float], dict[str, float]]:
    """First and last validation losses of a run; QuickstartError if there are not two."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise QuickstartError(f"{run_dir} holds no metrics.jsonl")
    records = read_lines(path)
    losses = [
        {tag: value for tag, value in record.items() if tag.startswith("validation/loss")}
        for record in records
    ]
    losses = [record for record in losses if record]
    if len(losses) < 2:
        raise QuickstartError(f"{path}: validation losses measured {len(losses)} times; at least 2 "
                              "are needed to say that they fell")
    return losses[0], losses[-1]


def check_losses(first: dict[str, float], last: dict[str, float]) -> None:
    """Raises QuickstartError unless every validation loss is below its value at step 0."""
    tags = ("validation/loss_video", "validation/loss_audio")
    for tag in tags:
        if tag not in first or tag not in last:
            raise QuickstartError(f"{tag} was not measured")
    for tag in tags:
        if not last[tag] < first[tag]:
            raise QuickstartError(f"{tag} did not fall: {first[tag]:.4f} -> {last[tag]:.4f}")


def check_clip(path: Path, spec: CutSpec) -> None:
    """Raises QuickstartError unless the file decodes with a picture and audible sound."""
    try:
        cut = read_cut(path, spec)
    except Rejected as rejected:  # silence, a missing stream, a short clip
        raise QuickstartError(f"{path}: {rejected}") from rejected
    if float(np.std(cut.frames)) < 1.0:
        raise QuickstartError(f"{path}: the picture is one flat colour")


def main(arguments: Sequence[str] = ()) -> int:
    argparse.ArgumentParser(prog="make quickstart", description=__doc__).parse_args(arguments)
    began = time.perf_counter()
    if ROOT.exists():
        shutil.rmtree(ROOT)
    # Tiny tensors gain nothing from threads, and threads that wait for a busy core cost much.
    os.environ["OMP_NUM_THREADS"] = "1"
    # CPU ranks of one number of processes everywhere, also on a machine with fewer GPUs than that.
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    clips, shards, run_dir = ROOT / "clips", ROOT / "shards", ROOT / "run"
    python = [sys.executable, "-m"]
    try:
        step("make clips", *python, "playground.world", str(clips), "--clips", "64",
             "--validation", "8", "--seed", "1")
        step("encode them", *python, "data.prepare", str(clips / "manifest.jsonl"), str(shards),
             "--wan", "weights/playground/wan", "--tangoflux", "weights/playground/tangoflux",
             "--frames", "49", "--fps", "24", "--height", "64", "--width", "96",
             "--video-text-length", "64")
        step("train under ZeRO-3", "env", "NPROC=2", "bash", "launch/local.sh", CONFIG,
             f"run_dir={run_dir}", f"data.root={shards}")
        step("sample", *python, "tools.sample", str(run_dir), "--prompts",
             str(clips / "manifest.jsonl"), "--split", "validation", "--count", "2",
             # Wan's own negative prompt is Chinese, which the tiny text encoder never read.
             "--negative-video", "", "--guidance-video", "3", "--guidance-audio", "3")
        first, last = validation_losses(run_dir)
        check_losses(first, last)
        videos = sorted((run_dir / "samples").glob("**/*.mp4"))
        if not videos:
            raise QuickstartError(f"{run_dir}/samples holds no mp4")
        for video in videos:
            check_clip(video, CutSpec(fps=24, frames=49, height=64, width=96))
    except QuickstartError as error:
        print(f"error: quickstart: {error}", file=sys.stderr)
        return 1
    print(f"\nquickstart: all of it in {(time.perf_counter() - began) / 60:.1f} minutes")
    print(f"run directory  {run_dir}")
    print(f"TensorBoard    .venv/bin/tensorboard --logdir {run_dir / 'tb'}")
    print(f"clip           {videos[0]}  (contact sheet {videos[0].with_suffix('.png')})")
    for tag in first:
        print(f"validation {tag.split('_')[1]:5s} loss {first[tag]:.4f} -> {last[tag]:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
