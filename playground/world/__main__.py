"""Write playground clips as ordinary mp4 files with a manifest.

    python -m playground.world out/ --clips 60 --seed 0 --validation 12 --processes 2

writes out/clips/<id>.mp4, out/manifest.jsonl (what `python -m data.prepare` reads) and
out/events.jsonl (ground truth: impacts, materials, colours, in pixels and seconds). Clip `index`
of a seed is always the same clip; the last `--validation` indices get split "validation".
"""

import argparse
import json
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from data.arguments import non_negative, positive
from data.clips.mux import write_clip
from playground.world.clip import FPS, Clip, make_clip
from playground.world.impacts import SAMPLE_RATE


def _manifest_record(clip: Clip, split: str) -> dict:
    facts = clip.facts
    return {
        "id": facts.id,
        "path": f"clips/{facts.id}.mp4",
        "video_caption": facts.video_caption,
        "audio_caption": facts.audio_caption,
        "split": split,
        "source": "playground",
        "class": facts.clip_class,
    }


def _truth_record(clip: Clip) -> dict:
    facts = clip.facts
    record = {key: getattr(facts, key) for key in ("id", "scene", "material", "colours", "motion")}
    return record | {"events": [event._asdict() for event in facts.events]}


def _write_clip(out: Path, clips: int, seed: int, index: int) -> tuple[dict, dict]:
    """One mp4; its lines of the manifest and of the ground truth."""
    clip = make_clip(seed, index)
    record = _manifest_record(clip, "train" if index < clips else "validation")
    write_clip(out / record["path"], clip.frames, FPS, clip.audio, SAMPLE_RATE)
    return record, _truth_record(clip)


def write_clips(out: Path, clips: int, validation: int, seed: int, processes: int = 1) -> None:
    """Write `clips` training clips, then `validation` held-out ones (later indices)."""
    (out / "clips").mkdir(parents=True, exist_ok=True)
    write = partial(_write_clip, out, clips, seed)
    with (open(out / "manifest.jsonl", "w") as manifest, open(out / "events.jsonl", "w") as truth,
          Pool(processes) as pool):
        for record, facts in pool.imap(write, range(clips + validation), chunksize=8):
            manifest.write(json.dumps(record) + "\n")
            truth.write(json.dumps(facts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m playground.world", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--clips", type=positive, default=60, help="training clips")
    parser.add_argument("--validation", type=non_negative, default=0,
                        help="held-out clips after them")
    parser.add_argument("--seed", type=int, default=0, help="which world")
    parser.add_argument("--processes", type=positive, default=1, help="that draw side by side")
    args = parser.parse_args()
    write_clips(args.out, args.clips, args.validation, args.seed, args.processes)
    print(f"{args.clips} + {args.validation} clips in {args.out / 'manifest.jsonl'}")


if __name__ == "__main__":
    main()
