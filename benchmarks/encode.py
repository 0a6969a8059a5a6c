"""How fast one process encodes: every stage alone, then `prepare` with decoding overlapped.

    python benchmarks/encode.py clips/manifest.jsonl --wan W --tangoflux T --frames 49 ...

prints a table (median per clip, wall and CPU seconds: on a shared machine only the latter is its
own). The clips should be real or the built-in world's, never zeros.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.clips.cut import CutSpec  # noqa: E402
from data.clips.decode import read_cut  # noqa: E402
from data.manifest import read_manifest  # noqa: E402
from data.prepare import Encoders, prepare  # noqa: E402

WARM_UP = 3


def stage(work: Callable[[Any], Any], items: list[Any]) -> tuple[float, float]:
    """Median (wall, CPU) seconds per item, after a warm-up."""
    walls, cpus = [], []
    for item in items:
        wall, cpu = time.perf_counter(), time.process_time()
        work(item)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return statistics.median(walls[WARM_UP:]), statistics.median(cpus[WARM_UP:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--wan", required=True)
    parser.add_argument("--tangoflux", required=True)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--height", type=int, default=192)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--video-text-length", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    encoders = Encoders.load(args.wan, args.tangoflux, args.device, args.video_text_length)
    audio_vae = encoders.audio_vae
    spec = CutSpec(frames=args.frames, height=args.height, width=args.width,
                   sample_rate=audio_vae.sample_rate, hop=audio_vae.hop)
    records, _ = read_manifest(args.manifest, "train")
    print(f"{len(records)} clips of {spec.frames} x {spec.height} x {spec.width}, {args.device}, "
          f"{torch.get_num_threads()} torch threads, {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f}\n")
    rows = list(_stages(args.manifest, records, encoders, spec))
    print("| stage | wall ms per clip | CPU ms per clip |\n| --- | --- | --- |")
    for name, (wall, cpu) in rows:
        print(f"| {name} | {1000 * wall:.0f} | {1000 * cpu:.0f} |")
    print("\n| `prepare`, one process | clips/s | CPU s per clip |\n| --- | --- | --- |")
    for decoders in (1, 2, 1, 2):  # twice, in turn: both arms meet the same neighbours
        rate, cpu = _whole(args.manifest, encoders, spec, decoders, len(records))
        print(f"| {decoders} decoding threads | {rate:.2f} | {cpu:.3f} |", flush=True)
    return 0


def _stages(manifest: Path, records: list[dict], encoders: Encoders, spec: CutSpec) -> Any:
    paths = [manifest.parent / record["path"] for record in records]
    yield "probe, decode, cut", stage(lambda path: read_cut(path, spec), paths)
    cuts = [read_cut(path, spec) for path in paths]
    frames = [torch.from_numpy(c.frames).permute(3, 0, 1, 2)[None] / 127.5 - 1 for c in cuts]
    waves = [torch.from_numpy(cut.audio).T[None] for cut in cuts]
    yield "video VAE", stage(encoders.video_vae.encode, frames)
    yield "audio VAE", stage(encoders.audio_vae.encode, waves)
    captions = [(record["video_caption"], record["audio_caption"]) for record in records]
    yield "text encoders", stage(
        lambda pair: (encoders.video_text.encode([pair[0]]), encoders.audio_text.encode([pair[1]])),
        captions,
    )


def _whole(
    manifest: Path, encoders: Encoders, spec: CutSpec, decoders: int, clips: int
) -> tuple[float, float]:
    """(clips/s, CPU seconds per clip) of a whole data set, shards and merge included."""
    folder = Path(tempfile.mkdtemp())
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        prepare(manifest, folder / "out", encoders, spec, decoders=decoders)
        return clips / (time.perf_counter() - wall), (time.process_time() - cpu) / clips
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
