"""How fast shards become batches, against the rate at which a GPU takes them.

    python benchmarks/loader.py --samples 400 --workers 0 1 2 4

writes samples of the real 2 s shape (latents 48 x 13 x 12 x 20, 117 rows of text: 1.4 MB) and reads
them with the real loader: the first epoch, which unpacks and hash-checks every shard, then warm
ones. Last, the share of a step spent waiting for data when every rank-sized batch is followed by
the time that one GPU computes on it (30 MB/s per GPU, 21 samples/s).
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from streaming import MDSWriter

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.loading.loader import build_loader  # noqa: E402
from data.loading.sources import DataConfig  # noqa: E402
from data.schema import (  # noqa: E402
    HASH,
    TEXT_FILE,
    Metadata,
    columns,
    pack,
    save_metadata,
)

NEEDED = 30e6 / 1.4e6  # samples/s and GPU
TEXT_ROWS, WIDTH, BATCH = 117, 4096, 8


def write(root: Path, samples: int) -> None:
    """Random latents: as incompressible as real ones."""
    metadata = Metadata(
        fps=24.0, frames=49, height=192, width=320, sample_rate=44100, audio_hop=2048,
        video_temporal_stride=4, video_spatial_stride=16, latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48, video_latent_shape=[48, 13, 12, 20], audio_latent_shape=[44, 64],
        video_text_length=512, video_text_width=WIDTH, audio_text_length=64, audio_text_width=1024,
        counts={"train": samples, "validation": 1},
    )
    for split, count in metadata.counts.items():
        with MDSWriter(out=str(root / split), columns=columns(metadata), compression="zstd",
                       hashes=[HASH], size_limit=1 << 26) as writer:
            for index in range(count):
                writer.write(pack(
                    {"id": f"{split}{index}"}, torch.randn(48, 13, 12, 20),
                    (torch.randn(44, 64), torch.rand(44, 64)), torch.randn(TEXT_ROWS, WIDTH),
                    (torch.randn(64, 1024), torch.ones(64)), (44, 64),
                ))
    save_metadata(root, metadata)
    save_file({"video_empty": torch.zeros(1, WIDTH)}, root / TEXT_FILE)


def rate(root: Path, workers: int, epochs: int, step_seconds: float) -> tuple[float, ...]:
    """Samples/s of the first epoch and of later ones, share of these spent waiting, CPU seconds.

    The last is per sample and of this process: with no workers, all there is.
    """
    steps = len_of(root) // BATCH
    loader = build_loader(DataConfig(str(root), num_workers=workers), BATCH, 0, 1, 0)
    waits, began = [], time.perf_counter()
    for index, _ in enumerate(itertools.islice(iter_timed(loader, waits), steps * epochs)):
        if index == steps - 1:
            first, began = time.perf_counter() - began, time.perf_counter()
            cpu = time.process_time()
        time.sleep(step_seconds)
    later, cpu = time.perf_counter() - began, time.process_time() - cpu
    loader.close()  # type: ignore[attr-defined]
    done = steps * BATCH
    count = done * (epochs - 1)
    return done / first, count / later, sum(waits[steps:]) / later, cpu / count


def iter_timed(loader, waits):
    while True:
        began = time.perf_counter()
        batch = next(loader)
        waits.append(time.perf_counter() - began)
        yield batch


def len_of(root: Path) -> int:
    return int(json.loads((root / "dataset.json").read_text())["counts"]["train"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, args.samples)
        shards = json.loads((root / "train" / "index.json").read_text())["shards"]
        size = sum(shard["raw_data"]["bytes"] for shard in shards)
        print(f"{args.samples} samples of {size / args.samples / 1e6:.2f} MB, batches of {BATCH}, "
              f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; a GPU needs {NEEDED:.1f}/s")
        print("| workers | first epoch, samples/s | later, samples/s | x one GPU | data wait | "
              "CPU ms per sample, main process |\n| --- | --- | --- | --- | --- | --- |")
        for workers in args.workers:
            for path in (root / "train").glob("*.mds"):
                path.unlink()
            first, later, _, cpu = rate(root, workers, args.epochs, 0.0)
            _, _, wait, _ = rate(root, workers, 2, BATCH / NEEDED)
            print(f"| {workers} | {first:.0f} | {later:.0f} | {later / NEEDED:.1f} | {wait:.1%} | "
                  f"{cpu * 1e3:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
