"""What is inside a prepared data set.

    python -m data.inspect out/ [--decode 4]

prints a table per split, the statistics of the latents, whether sound and picture are of one
length, and every sample that stands out (not finite, constant, still, sound that stops early).
With --decode N, N samples go back through the VAEs: mp4 files and one contact sheet with
spectrograms in out.inspect/. Exits 1 if a latent is not finite or constant.
"""

import argparse
import collections
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.arguments import non_negative, positive
from data.clips.contact_sheet import draw_contact_sheet, write_contact_sheet
from data.clips.mux import write_clip
from data.loading.index import read_index
from data.provenance import check_provenance
from data.schema import DataError, Metadata, load_metadata
from data.stored import iter_samples
from model.encoders import AudioVAE, VideoVAE
from model.weights.hub import one_line_errors

FLAT = 1e-4  # standard deviation below which latents say nothing
BROKEN = ("not finite", "constant")  # what no encoder gives for a clip that can be used


@dataclass
class Moments:
    """Mean and standard deviation of many arrays, in one pass."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values)].astype(np.float64)
        self.count += values.size
        self.total += float(values.sum())
        self.squares += float(np.square(values).sum())

    def __str__(self) -> str:
        if not self.count:
            return "-"
        mean = self.total / self.count
        return f"{mean:+.3f} +- {max(0.0, self.squares / self.count - mean * mean) ** 0.5:.3f}"


@dataclass
class SplitReport:
    """What was found in the samples of one split that were looked at."""

    name: str
    samples: int
    shards: int
    size: int  # bytes on disk
    seen: int = 0
    with_sound: int = 0
    text_rows: Moments = field(default_factory=Moments)
    video: Moments = field(default_factory=Moments)  # normalised latents
    audio: Moments = field(default_factory=Moments)  # posterior means
    audio_std: Moments = field(default_factory=Moments)
    flags: list[tuple[str, str]] = field(default_factory=list)  # (sample id, what)


def look(root: Path, metadata: Metadata, split: str, most: int) -> SplitReport:
    """Statistics over at most `most` samples of a split, evenly spread."""
    shards = read_index(root, split)
    sizes = [(shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards]
    total = sum(shard["samples"] for shard in shards)
    report = SplitReport(split, total, len(shards), sum(sizes))
    indices = np.unique(np.linspace(0, total - 1, min(total, most)).astype(int)).tolist()
    for sample in iter_samples(root, split, indices):
        video = normalized(sample, metadata)
        report.seen += 1
        report.with_sound += int(sample["has_audio"])
        report.text_rows.add(np.array([len(sample["video_text"])]))
        report.video.add(video)
        if sample["has_audio"]:
            report.audio.add(sample["audio_mean"])
            report.audio_std.add(sample["audio_std"])
        report.flags += [(sample["id"], flag) for flag in flags(sample, video, metadata)]
    return report


def normalized(sample: dict[str, Any], metadata: Metadata) -> np.ndarray:
    """Video latents (C, F, h, w) as the model sees them."""
    mean, std = (np.array(v, np.float32)[:, None, None, None]  # (C, 1, 1, 1)
                 for v in (metadata.latents_mean, metadata.latents_std))
    return (sample["video_latents"].astype(np.float32) - mean) / std


def flags(sample: dict[str, Any], video: np.ndarray, metadata: Metadata) -> list[str]:
    """What is wrong or odd about a sample."""
    found = []
    latents = {"video latents": video}
    if sample["has_audio"]:
        latents |= {"audio mean": sample["audio_mean"], "audio std": sample["audio_std"]}
    for name, values in latents.items():
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            found.append(f"{name}: not finite")
        elif values.std() < FLAT:
            found.append(f"{name}: constant")
    moving = video[:, 1:]  # the first latent frame is one picture, the others are four
    if not found and moving.shape[1] > 1 and np.abs(np.diff(moving, axis=1)).max() < FLAT:
        found.append("the picture stands still")
    missing = metadata.duration - sample["record"].get("sound_seconds", metadata.duration)
    if sample["has_audio"] and missing > metadata.audio_hop / metadata.sample_rate:
        found.append(f"{missing:.2f} s of the cut are without sound")
    return found


def length_agreement(metadata: Metadata) -> str:
    """One line on the lengths of picture and sound; DataError if they cannot belong together."""
    frame_count = 1 + (metadata.video_latent_shape[1] - 1) * metadata.video_temporal_stride
    latent = metadata.audio_hop / metadata.sample_rate
    sound = metadata.audio_latent_shape[0] * latent
    padding = float(metadata.settings.get("audio_pad_seconds", 0.0))
    if frame_count != metadata.frames or not (
        0 <= sound - metadata.duration < latent or padding - latent < sound <= padding
    ):
        raise DataError(
            f"video_latent_shape={metadata.video_latent_shape} holds {frame_count} pictures, "
            f"audio_latent_shape={metadata.audio_latent_shape} {sound:.3f} s; dataset.json says "
            f"{metadata.frames} pictures, {metadata.duration:.3f} s; prepare the clips again"
        )
    return (
        f"picture {metadata.duration:.4f} s, sound {sound:.4f} s: "
        f"{1000 * (sound - metadata.duration):+.1f} ms (a latent is {1000 * latent:.1f} ms)"
    )


def table(reports: list[SplitReport]) -> str:
    """One row per split."""
    head = ["split", "samples", "shards", "MB", "looked at", "with sound", "umT5 rows",
            "video latents", "audio mean", "audio std", "flagged"]
    rows = [head] + [
        [r.name, str(r.samples), str(r.shards), f"{r.size / 1e6:.1f}", str(r.seen),
         str(r.with_sound), str(r.text_rows), str(r.video), str(r.audio), str(r.audio_std),
         str(len({name for name, _ in r.flags}))]
        for r in reports
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
             for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def decode_sample(
    sample: dict[str, Any], metadata: Metadata, video_vae: VideoVAE, audio_vae: AudioVAE
) -> tuple[np.ndarray, np.ndarray | None]:
    """Stored latents -> frames (T, H, W, 3) uint8 and sound (N, 2) of the pictures' length."""
    latents = torch.from_numpy(normalized(sample, metadata))[None]  # (1, C, F, h, w)
    frames = (video_vae.decode(latents)[0] + 1) * 127.5  # (3, T, H, W)
    pictures = frames.round().permute(1, 2, 3, 0).to(torch.uint8).cpu().numpy()
    if not sample["has_audio"]:
        return pictures, None
    mean = torch.from_numpy(sample["audio_mean"].astype(np.float32))[None]  # (1, L, C)
    wave = audio_vae.decode(mean)[0, :, : round(metadata.duration * metadata.sample_rate)]
    return pictures, wave.clamp(-1, 1).T.cpu().numpy()


def decode(
    root: Path, metadata: Metadata, count: int, vaes: tuple[VideoVAE, AudioVAE], out: Path
) -> None:
    """`count` samples, evenly spread over all splits, as mp4 files and one contact sheet."""
    out.mkdir(parents=True, exist_ok=True)
    places = [(split, index) for split, held in metadata.counts.items() for index in range(held)]
    picked: dict[str, list[int]] = collections.defaultdict(list)
    for place in np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)):
        split, index = places[place]
        picked[split].append(index)
    sheets: list[Image.Image] = []
    for split, indices in picked.items():
        for index, sample in zip(indices, iter_samples(root, split, indices), strict=True):
            frames, sound = decode_sample(sample, metadata, *vaes)
            path = out / f"{split}-{index:06d}.mp4"
            write_clip(path, frames, metadata.fps, sound, metadata.sample_rate)
            record = sample["record"]
            title = f"{sample['id']}: {record['video_caption']} / {record['audio_caption']}"
            sheets.append(
                draw_contact_sheet(frames, metadata.fps, sound, metadata.sample_rate, title)
            )
            print(f"{path}: {sample['id']}")
    write_contact_sheet(out / "sheet.png", *sheets)
    print(f"{out / 'sheet.png'}: {len(sheets)} samples, decoded")


def run(args: argparse.Namespace) -> int:
    metadata = load_metadata(args.root)
    settings = dataclasses.asdict(metadata) | metadata.settings
    shown = ("fps", "frames", "height", "width", "sample_rate", "video_latent_shape",
             "audio_latent_shape", "encoding_version", "commit")
    print("  ".join(f"{name}={settings[name]}" for name in shown if name in settings))
    print(length_agreement(metadata))
    reports = [look(args.root, metadata, split, args.samples) for split in metadata.counts]
    print(table(reports))
    lines = [(r.name, *flag) for r in reports for flag in r.flags]
    for split, name, flag in lines:
        print(f"FLAG {split} {name}: {flag}")
    if args.decode:
        wan, tangoflux = (
            given or metadata.settings.get(name)
            for name, given in (("wan", args.wan), ("tangoflux", args.tangoflux))
        )
        if not (wan and tangoflux):
            raise DataError(f"{args.root}: --decode needs --wan and --tangoflux; dataset.json "
                            "does not name the folders")
        for note in check_provenance({str(args.root): metadata}, wan, tangoflux):
            print(f"note: {note}", file=sys.stderr)
        with one_line_errors(DataError, f"wan={wan}, tangoflux={tangoflux}"):
            vaes = (VideoVAE.from_folder(wan, args.device),
                    AudioVAE.from_folder(tangoflux, args.device))
        out = args.to or args.root.with_name(f"{args.root.name}.inspect")
        decode(args.root, metadata, args.decode, vaes, out)
    return 1 if any(flag.endswith(BROKEN) for _, _, flag in lines) else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "data.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--samples", type=positive, default=1000,
                        help="per split; default: %(default)s")
    parser.add_argument("--decode", type=non_negative, default=0, metavar="N")
    parser.add_argument("--wan", help="folder or hub id; default: the one that encoded the clips")
    parser.add_argument("--tangoflux", help="folder or hub id; default: as above")
    parser.add_argument("--to", type=Path, help="folder for what is decoded; default: ROOT.inspect")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
