"""Kill -9 of encoding workers at random moments, then the same command again, until it is done.

    python -m tests.support.kills.prepare_kills --kills 20 --work /tmp/kills

prints one line per kill and the verdict; exits 0 only if the shards are those of a run that nobody
disturbed. tests/data/prepare/test_prepare_kills.py does the same with three kills.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from streaming.base.hashing import get_hash

from data.clips.cut import CutSpec
from data.clips.mux import write_clip
from data.prepare import Encoders, prepare
from data.prepare.__main__ import main as prepare_main
from data.schema import HASH
from tests.support.models import tiny

# Workers are real processes that run the command's own main; only the imports, of a short run by
# far the longest part, are done once, in the server that they are forked from.
PROCESSES = multiprocessing.get_context("forkserver")
SPEC = CutSpec(frames=9, height=32, width=64, sample_rate=tiny.SAMPLE_RATE, hop=tiny.HOP)
FLAGS = ["--frames", "9", "--height", "32", "--width", "64", "--video-text-length", "40"]
CLIPS_PER_SHARD = 4
Process = multiprocessing.context.ForkServerProcess
TEXT_LENGTH = 40


def write_source(root: Path, clips: int) -> Path:
    """A manifest of `clips` cuts of one file, every seventh of them unusable, 1 in 5 held out."""
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 255, (96, 8, 12, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    audio = 0.1 * generator.standard_normal((64000, 2)).astype(np.float32)
    write_clip(root / "clip.mp4", frames, 24, audio, 16000)
    records = [
        {
            "id": f"n{index:04d}", "path": "clip.mp4",
            "t0": 99 if index % 7 == 3 else index / clips,
            "split": "validation" if index % 5 == 0 else "train",
            "video_caption": f"{tiny.CAPTIONS[0]} {index}", "audio_caption": tiny.CAPTIONS[1],
        }
        for index in range(clips)
    ]
    path = root / "manifest.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def contents(root: Path) -> dict[str, str]:
    """File -> sha256 of everything below `root`; the commit may move in between."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name == "dataset.json":
            values = json.loads(data)
            del values["settings"]["commit"]
            data = json.dumps(values).encode()
        found[str(path.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return found


def check_partial(folder: Path, before: dict[str, str]) -> dict[str, str]:
    """Receipts -> sha256: every earlier one is untouched, and each has a whole shard."""
    receipts = contents(folder / "receipts") if folder.exists() else {}
    receipts = {name: value for name, value in receipts.items() if not name.startswith(".")}
    for name, value in before.items():
        assert receipts[name] == value, f"{name} was done again"
    for name in receipts:
        receipt = json.loads((folder / "receipts" / name).read_text())
        if receipt["shard"]:
            data = (folder / "shards" / receipt["file"]).read_bytes()
            assert get_hash(HASH, data) == receipt["shard"]["zip_data"]["hashes"][HASH], name
    return receipts


def disturbed_run(
    command: list[str], out: Path, kills: int, workers: int, seed: int
) -> int:
    """Start `workers`, kill them at random moments, `kills` times in all; then let them finish.

    Returns the number of kills that met a running worker.
    """
    chance = random.Random(seed)
    partial = out.with_name(f".{out.name}.partial")
    receipts: dict[str, str] = {}
    done, began = 0, time.monotonic()
    while done < kills:
        processes = _start(command, workers)
        if chance.random() < 0.8:  # the others may meet a worker that still loads its encoders
            _wait_for_report(partial, processes)
        delay = chance.uniform(0, 1.0)
        time.sleep(delay)
        for worker, process in enumerate(processes):
            time.sleep(chance.uniform(0, 0.2))
            alive = process.is_alive()
            if alive:
                os.kill(process.pid, signal.SIGKILL)
                done += 1
            process.join()
            print(
                f"{time.monotonic() - began:6.1f} s  kill -9 of worker {worker} "
                f"{'after' if alive else 'came too late:'} {delay:.2f} s", flush=True,
            )
        assert not out.exists(), "killed too late to show anything; take more clips"
        receipts = check_partial(partial, receipts)
        left = len([path for path in partial.glob(".*-0*") if path.is_dir()])
        print(f"          {len(receipts)} shards whole; {left} left open, by all kills", flush=True)
    for process in _start(command, workers):
        process.join()
        assert process.exitcode == 0
    return done


def _start(command: list[str], workers: int) -> list[Process]:
    PROCESSES.set_forkserver_preload(["tests.support.kills.prepare_kills"])
    started = [
        PROCESSES.Process(
            target=_work, args=([*command, "--worker", str(worker), "--workers", str(workers)],)
        )
        for worker in range(workers)
    ]
    for process in started:
        process.start()
    return started


def _work(arguments: list[str]) -> None:
    """`python -m data.prepare`, in silence."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    sys.exit(prepare_main(arguments))


def _wait_for_report(partial: Path, processes: list[Process]) -> None:
    """Until one of these processes has reported; AssertionError if one ends before that."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in partial.glob("workers/[0-9]*.json"):
            if json.loads(path.read_text())["pid"] in {process.pid for process in processes}:
                return
        assert any(process.is_alive() for process in processes), "it ended before it began"
        time.sleep(0.02)


def run(work: Path, kills: int, clips: int, workers: int, seed: int) -> tuple[Path, Path, int]:
    """(undisturbed data set, disturbed one, kills)."""
    wan = tiny.write_wan(work / "wan")
    tangoflux = tiny.write_tangoflux(work / "tangoflux")
    manifest = write_source(work, clips)
    encoders = Encoders.load(str(wan), str(tangoflux), "cpu", TEXT_LENGTH)
    prepare(manifest, work / "calm", encoders, SPEC, shard_clips=CLIPS_PER_SHARD)
    command = [str(manifest), str(work / "killed")]
    command += ["--wan", str(wan), "--tangoflux", str(tangoflux), "--device", "cpu", *FLAGS]
    command += ["--clips-per-shard", str(CLIPS_PER_SHARD)]
    done = disturbed_run(command, work / "killed", kills, workers, seed)
    return work / "calm", work / "killed", done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clips", type=int, default=1200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for a busy core cost much
    torch.set_num_threads(1)
    calm, killed, done = run(args.work, args.kills, args.clips, args.workers, args.seed)
    same = contents(calm) == contents(killed)
    lines = (killed / "samples.jsonl").read_text().splitlines()
    print(f"{done} kills, {len(contents(killed))} files, {len(lines)} samples: "
          f"{'all equal to' if same else 'DIFFERENT from'} the undisturbed run")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
