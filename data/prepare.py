"""Clips -> encoded shards: probe, cut, encode, write MDS; `python -m data.prepare --help`.

    python -m data.prepare manifest.jsonl out/ --wan W --tangoflux T --frames 49 --fps 24

makes out/{train,validation}/ (MDS, zstd, hashes), dataset.json, text.safetensors (the encoded ""
and negative prompts) and rejects.jsonl. A clip that cannot be used is named there with its
reason; nothing aborts the run and nothing disappears. The folder appears when it is complete.

A manifest line: {"id", "path" (relative to the manifest), "video_caption", "audio_caption"} and,
if wanted, "split" ("train"), "t0" (seconds; the centre window), and any key of your own.
"""

import argparse
import collections
import dataclasses
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from streaming import MDSWriter
from torch import Tensor
from tqdm import tqdm

from data.decode import Cut, CutSpec, read_cut
from data.manifest import read_manifest
from data.probe import Rejected
from data.schema import (
    HASH,
    REJECTS_FILE,
    TEXT_FILE,
    DataError,
    Metadata,
    columns,
    pack,
    save_metadata,
)
from model.encoders import (
    AUDIO_TEXT_LENGTH,
    VIDEO_TEXT_LENGTH,
    AudioTextEncoder,
    AudioVAE,
    VideoTextEncoder,
    VideoVAE,
    nearest_frame_count,
)
from model.files import one_line_errors

DIT_PATCH = 2  # the video tower's patch in height and width: latents must divide by it
SHARDS: dict[str, Any] = {"compression": "zstd", "hashes": [HASH], "size_limit": 1 << 26}

# Wan's own `sample_neg_prompt` (backbones.md 1.6); TangoFlux's negative is "".
VIDEO_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
AUDIO_NEGATIVE = ""


@dataclass(frozen=True)
class Encoders:
    """The four frozen encoders of one data set."""

    video_vae: VideoVAE
    audio_vae: AudioVAE
    video_text: VideoTextEncoder
    audio_text: AudioTextEncoder

    @classmethod
    def load(cls, wan: str, tangoflux: str, device: str, video_text_length: int) -> "Encoders":
        """VAEs in float32, text encoders in bfloat16 on a GPU and float32 on a CPU.

        DataError, in one line, if a folder is missing, damaged or of another release.
        """
        with one_line_errors(DataError, f"wan={wan}, tangoflux={tangoflux}"):
            return cls(
                VideoVAE.from_folder(wan, device),
                AudioVAE.from_folder(tangoflux, device),
                VideoTextEncoder.from_folder(wan, device, max_length=video_text_length),
                AudioTextEncoder.from_folder(tangoflux, device),
            )

    def fingerprints(self) -> dict[str, str]:
        """Encoder -> sha256 of its weights and config."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name).fingerprint for field in fields}

    def encode(self, cut: Cut, record: dict[str, Any]) -> dict[str, Any]:
        """One cut and its captions -> one MDS sample; Rejected if a latent is not finite."""
        frames = torch.from_numpy(cut.frames).permute(3, 0, 1, 2)[None]  # (1, 3, T, H, W)
        video = self.video_vae.encode(frames.float() / 127.5 - 1)[0]  # (C, F, h, w)
        wave = torch.from_numpy(cut.audio).T[None].clamp(-1, 1)  # (1, 2, N)
        mean, std = (latents[0] for latents in self.audio_vae.encode(wave))  # (L, C) each
        for name, latents in {"video": video, "audio": mean, "audio std": std}.items():
            if not latents.half().isfinite().all():  # float16 is what will be stored
                raise Rejected("not_finite", f"{name} latents are not finite in float16")
        states, mask = self.audio_text.encode([record["audio_caption"]])
        [video_text] = self.video_text.encode([record["video_caption"]])
        record = record | dataclasses.asdict(cut.facts)
        return pack(record, video, (mean, std), video_text, (states[0], mask[0]), mean.shape)

    def text_states(self) -> dict[str, Tensor]:
        """The encoded "" (caption dropout) and negative prompts (guidance), bfloat16."""
        video = self.video_text.encode(["", VIDEO_NEGATIVE])
        audio, mask = self.audio_text.encode(["", AUDIO_NEGATIVE])
        states = {}
        for index, name in enumerate(("empty", "negative")):
            states[f"video_{name}"] = video[index].bfloat16()
            states[f"audio_{name}"] = audio[index].bfloat16()
            states[f"audio_{name}_mask"] = mask[index]
        return {name: value.contiguous().cpu() for name, value in states.items()}


def build_metadata(encoders: Encoders, spec: CutSpec) -> Metadata:
    """What dataset.json will say, counts still open; DataError if the geometry cannot be."""
    vae, audio_vae = encoders.video_vae, encoders.audio_vae
    stride, multiple = vae.temporal_stride, vae.spatial_stride * DIT_PATCH
    if spec.fps <= 0:
        raise DataError(f"fps={spec.fps:g}: must be above 0; the backbones were trained at 24")
    if spec.frames % stride != 1:
        below = nearest_frame_count(spec.frames, stride)
        raise DataError(
            f"frames={spec.frames}: the video VAE takes {stride}k+1; use {below} or "
            f"{below + stride}"
        )
    for key, value in {"height": spec.height, "width": spec.width}.items():
        if value <= 0 or value % multiple:
            raise DataError(
                f"{key}={value}: must be a multiple of {multiple} (VAE stride "
                f"{vae.spatial_stride} x patch {DIT_PATCH}); use "
                f"{max(multiple, round(value / multiple) * multiple)}"
            )
    latent_frames = 1 + (spec.frames - 1) // stride
    height, width = spec.height // vae.spatial_stride, spec.width // vae.spatial_stride
    return Metadata(
        fps=spec.fps,
        frames=spec.frames,
        height=spec.height,
        width=spec.width,
        sample_rate=audio_vae.sample_rate,
        audio_hop=audio_vae.hop,
        video_temporal_stride=stride,
        video_spatial_stride=vae.spatial_stride,
        latents_mean=list(vae.vae.config.latents_mean),
        latents_std=list(vae.vae.config.latents_std),
        video_latent_shape=[vae.latent_channels, latent_frames, height, width],
        audio_latent_shape=[spec.padded_latents, audio_vae.latent_channels],
        video_text_length=encoders.video_text.max_length,
        video_text_width=encoders.video_text.width,
        audio_text_length=AUDIO_TEXT_LENGTH,
        audio_text_width=encoders.audio_text.width,
        fingerprints=encoders.fingerprints(),
    )


class Shards:
    """Writes samples to one folder per split and rejects to one file, and counts both."""

    def __init__(self, root: Path, metadata: Metadata) -> None:
        self.root, self.metadata = root, metadata
        self.writers: dict[str, MDSWriter] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.rejected: collections.Counter[str] = collections.Counter()
        self.rejects = (root / REJECTS_FILE).open(
            "w", encoding="utf-8", errors="replace"  # a refused id may be no valid text
        )

    def write(self, split: str, sample: dict[str, Any]) -> None:
        if split not in self.writers:
            out, fields = str(self.root / split), columns(self.metadata)
            self.writers[split] = MDSWriter(out=out, columns=fields, **SHARDS)
        self.writers[split].write(sample)
        self.counts[split] += 1

    def reject(self, clip_id: str, reason: str, detail: str, **where: Any) -> None:
        entry = {"id": clip_id, "reason": reason, "detail": detail} | where
        self.rejects.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.rejects.flush()
        self.rejected[reason] += 1

    def finish(self) -> None:
        for writer in self.writers.values():
            writer.finish()
        self.rejects.close()


def prepare(
    manifest: Path, out: Path, encoders: Encoders, spec: CutSpec, default_split: str = "train"
) -> Metadata:
    """Cut, encode and write every usable clip of `manifest`; returns what dataset.json says.

    DataError, and no `out`, if `out` holds something already, the manifest is empty or missing,
    the geometry is impossible, or not one clip is usable.
    """
    check_out(out)
    records, faults = read_manifest(manifest, default_split)
    metadata = build_metadata(encoders, spec)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        shards = Shards(partial, metadata)
        for fault in faults:
            shards.reject(fault.clip_id, fault.reason, fault.detail, line=fault.line)
        with tqdm(records, unit="clip", desc="prepare", mininterval=1.0) as progress:
            for record in progress:
                try:
                    cut = read_cut(manifest.parent / record["path"], spec, record.get("t0"))
                    shards.write(record["split"], encoders.encode(cut, record))
                except Rejected as rejected:
                    where = {"path": record["path"]}
                    shards.reject(record["id"], rejected.reason, rejected.detail, **where)
                progress.set_postfix(rejected=shards.rejected.total(), refresh=False)
        shards.finish()
        if not shards.counts:
            kept = out.with_name(f"{out.name}.{REJECTS_FILE}")
            shutil.move(partial / REJECTS_FILE, kept)
            raise DataError(
                f"{manifest}: none of {shards.rejected.total()} clips is usable "
                f"({_tally(shards.rejected)}); see {kept}"
            )
        metadata = dataclasses.replace(
            metadata, counts=dict(shards.counts), rejected=dict(shards.rejected)
        )
        save_file(encoders.text_states(), partial / TEXT_FILE)
        (partial / TEXT_FILE).chmod(0o644)  # safetensors writes it for its owner only
        save_metadata(partial, metadata)
        partial.chmod(0o755)  # mkdtemp's is private
        if out.is_dir():
            out.rmdir()  # empty, or this fails
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metadata


def check_out(out: Path) -> None:
    """DataError if something would be overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"out={out}: not empty; delete it or give another folder")


def _tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def parse(arguments: list[str]) -> argparse.Namespace:
    spec = CutSpec()
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser("data.prepare", description=lines[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wan", required=True, help="Wan2.2 diffusers folder or hub id")
    parser.add_argument("--tangoflux", required=True, help="TangoFlux folder or hub id")
    for name in "fps frames height width min_source_fps silence_dbfs audio_pad_seconds".split():
        default = getattr(spec, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help="default: %(default)s")
    parser.add_argument("--video-text-length", type=int, default=VIDEO_TEXT_LENGTH)
    parser.add_argument("--split", default="train", help="of records that name none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    try:
        check_out(args.out)  # before minutes go into loading weights
        read_manifest(args.manifest, args.split)
        encoders = Encoders.load(args.wan, args.tangoflux, args.device, args.video_text_length)
        spec = CutSpec(
            args.fps,
            args.frames,
            args.height,
            args.width,
            encoders.audio_vae.sample_rate,
            encoders.audio_vae.hop,
            args.min_source_fps,
            args.silence_dbfs,
            args.audio_pad_seconds,
        )
        for left in args.out.parent.glob(f".{args.out.name}.partial-*"):
            print(
                f"note: {left} is a killed run's (or a running one's); delete it", file=sys.stderr
            )
        metadata = prepare(args.manifest, args.out, encoders, spec, args.split)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {_tally(metadata.counts)}; rejected: {_tally(metadata.rejected)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
