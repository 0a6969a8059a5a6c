"""What one stored sample is, once: written by `data.prepare`, read by `data.loading.loader`.

Latents are stored raw as float16 (video: posterior mode; audio: posterior mean and std), so that
normalisation can change without encoding again. Text states are stored as the bits of bfloat16:
umT5 rows cut to their true length, Flan-T5 always 64 rows.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import ExpectedError
from common.files import json_sha256, write_json
from model.objective import Batch

FORMAT = 3  # raise it when a column changes its meaning
# Raise it when the same clip, settings and encoder weights become another sample than before: other
# pictures or sound (seeking, choice of frames, scaling, cropping, resampling, padding, rejection),
# or another way into the encoders or out of them (value range, caption cleaning, rows of text,
# posterior mode, rounding). Code that moves, gets faster or says something else keeps it.
ENCODING_VERSION = 1
# Up to commit bfb3d05 dataset.json had `code` instead, a hash of source files: this one is known.
ENCODING_OF_CODE = {"958bcba47c48484e": 1}
TEXT_ROWS = 32  # a batch keeps a multiple of so many rows of video text
HASH = "xxh64"  # of every shard, in its index; checked when a process first touches it
METADATA_FILE, TEXT_FILE, REJECTS_FILE = "dataset.json", "text.safetensors", "rejects.jsonl"


# What decoding bytes that are not a sample may raise.
UNREADABLE = (ArithmeticError, AssertionError, LookupError, MemoryError, OSError, RecursionError,
              TypeError, ValueError)


class DataError(ExpectedError, ValueError):
    """Data that cannot be used; the message names key, value, rule and fix in one line."""


@dataclass(frozen=True)
class Metadata:
    """dataset.json: how all samples of a data set were cut and encoded."""

    fps: float
    frames: int
    height: int
    width: int
    sample_rate: int
    audio_hop: int
    video_temporal_stride: int
    video_spatial_stride: int
    latents_mean: list[float]  # (C,) per channel of the video latents
    latents_std: list[float]  # (C,)
    video_latent_shape: list[int]  # (C, F, h, w)
    audio_latent_shape: list[int]  # (L, C)
    video_text_length: int  # rows that the video text is zero-padded to
    video_text_width: int
    audio_text_length: int
    audio_text_width: int
    fingerprints: dict[str, str] = field(default_factory=dict)  # encoder -> data.provenance's
    settings: dict[str, Any] = field(default_factory=dict)  # what else a sample depends on
    files: dict[str, str] = field(default_factory=dict)  # file that is not a shard -> its HASH
    counts: dict[str, int] = field(default_factory=dict)  # split -> samples
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> clips
    format: int = FORMAT

    @property
    def duration(self) -> float:
        """Seconds of a sample, frames / fps: the duration token's value."""
        return self.frames / self.fps


_ADAPTER = TypeAdapter(Metadata)


def columns(metadata: Metadata) -> dict[str, str]:
    """MDS column -> encoding; fixed shapes, so that the writer refuses any other."""
    video = ",".join(map(str, metadata.video_latent_shape))
    audio = ",".join(map(str, metadata.audio_latent_shape))
    text = f"{metadata.audio_text_length},{metadata.audio_text_width}"
    return {
        "id": "str",
        "video_latents": f"ndarray:float16:{video}",  # (C, F, h, w) raw
        "audio_mean": f"ndarray:float16:{audio}",  # (L, C) raw
        "audio_std": f"ndarray:float16:{audio}",  # (L, C)
        "has_audio": "uint8",  # 0: a clip without sound
        "video_text": "ndarray:uint16",  # (n, D) bits of bfloat16
        "audio_text": f"ndarray:uint16:{text}",  # (64, D) bits of bfloat16
        "audio_text_mask": f"ndarray:uint8:{metadata.audio_text_length}",  # (64,)
        "record": "json",  # the manifest's record and what was found out about the source
    }


def pack(
    record: dict[str, Any],
    video_latents: Tensor,
    audio: tuple[Tensor, Tensor] | None,
    video_text: Tensor,
    audio_text: tuple[Tensor, Tensor],
    audio_latent_shape: Sequence[int],
) -> dict[str, Any]:
    """One sample as MDS columns, from tensors without a batch axis.

    Args:
        record: JSON values; `id` is the sample's name.
        video_latents: (C, F, h, w) raw.
        audio: mean and std, (L, C) each; None for a clip without sound.
        video_text: (n, D).
        audio_text: states (64, D) and mask (64,).
        audio_latent_shape: (L, C) of every sample of the data set, with and without sound.
    """
    mean, std = audio or (torch.zeros(tuple(audio_latent_shape)),) * 2
    return {
        "id": record["id"],
        "video_latents": _half(video_latents),
        "audio_mean": _half(mean),
        "audio_std": _half(std),
        "has_audio": int(audio is not None),
        "video_text": _bits(video_text),
        "audio_text": _bits(audio_text[0]),
        "audio_text_mask": audio_text[1].cpu().numpy().astype(np.uint8),
        "record": record,
    }


def collate(samples: list[dict[str, Any]], metadata: Metadata) -> Batch:
    """MDS samples -> Batch: latents normalised, video text zero-padded to `rows`.

    That is the longest caption and a row of padding, up to a multiple of TEXT_ROWS, so that few
    shapes occur, and at most Nt. The rest of the Nt rows that the model attends to would be three
    quarters of a batch's bytes; all are zero, and the model computes one (AVFullDiT.forward).
    """
    longest = max(len(sample["video_text"]) for sample in samples)
    rows = min(-(-(longest + 1) // TEXT_ROWS) * TEXT_ROWS, metadata.video_text_length)
    latents = torch.stack([_float(sample["video_latents"]) for sample in samples])
    mean, std = torch.tensor(metadata.latents_mean), torch.tensor(metadata.latents_std)
    shape = (1, -1, 1, 1, 1)  # per channel
    return Batch(
        video_latents=(latents - mean.view(shape)) / std.view(shape),  # (B, C, F, h, w)
        audio_mean=torch.stack([_float(sample["audio_mean"]) for sample in samples]),
        audio_std=torch.stack([_float(sample["audio_std"]) for sample in samples]),
        has_audio=torch.tensor([bool(sample["has_audio"]) for sample in samples]),
        audio_weight=torch.tensor([float(sample["has_audio"]) for sample in samples]),
        video_text=torch.stack([_padded(_bfloat16(s["video_text"]), rows) for s in samples]),
        audio_text=torch.stack([_bfloat16(sample["audio_text"]) for sample in samples]),
        audio_text_mask=torch.stack(
            [torch.from_numpy(s["audio_text_mask"].astype(bool)) for s in samples]
        ),
        duration=torch.full((len(samples),), metadata.duration, dtype=torch.float32),
        sample_ids=[sample["id"] for sample in samples],
        video_text_length=metadata.video_text_length,
    )


def sample_fault(sample: dict[str, Any], metadata: Metadata) -> str | None:
    """Why a stored sample cannot be trained on, in words; None for a good one."""
    shapes = {"video_latents": metadata.video_latent_shape,
              "audio_mean": metadata.audio_latent_shape, "audio_std": metadata.audio_latent_shape,
              "audio_text": [metadata.audio_text_length, metadata.audio_text_width]}
    for column, shape in shapes.items():
        if list(sample[column].shape) != list(shape):
            return f"{column} has shape {list(sample[column].shape)}, not {list(shape)}"
    rows = sample["video_text"].shape
    longest, width = metadata.video_text_length, metadata.video_text_width
    if len(rows) != 2 or rows[1] != width or rows[0] > longest:
        return f"video_text has shape {list(rows)}, not at most [{longest}, {width}]"
    for column in ("video_latents", "audio_mean", "audio_std"):
        if not np.isfinite(sample[column]).all():
            return f"{column} is not finite"
    for column in ("video_text", "audio_text"):  # bits of bfloat16, all of the exponent set
        if ((sample[column] & 0x7F80) == 0x7F80).any():
            return f"{column} is not finite"
    return None


def save_metadata(root: Path, metadata: Metadata) -> None:
    """Write dataset.json, with a hash of itself."""
    values = dataclasses.asdict(metadata)
    write_json(root / METADATA_FILE, values | {"sha256": json_sha256(values)})


def load_metadata(root: str | Path) -> Metadata:
    """Read dataset.json; DataError if it is not there, of another format or not as written."""
    path = Path(root) / METADATA_FILE
    if not path.is_file():
        raise DataError(f"data.root={root}: no {METADATA_FILE}; {how_to_prepare(root)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise DataError(
                f"{path}: format {values.get('format')}, this code reads format {FORMAT}; "
                f"{how_to_prepare(root)}"
            )
        if values.pop("sha256", None) != json_sha256(values):
            raise DataError(f"{path}: differs from its own sha256; copy the data set again")
        metadata = _ADAPTER.validate_python(values)
        return dataclasses.replace(metadata, settings=_versioned(metadata.settings))
    except DataError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}); copy the data set again") from error


def _versioned(settings: dict[str, Any]) -> dict[str, Any]:
    """`code` as `encoding_version`: 1 for a known hash; an unknown one equals no version."""
    if "code" not in settings:
        return settings
    version = ENCODING_OF_CODE.get(settings["code"], f"code {settings['code']}")
    return {"encoding_version": version} | {k: v for k, v in settings.items() if k != "code"}


def load_text_states(root: str | Path) -> dict[str, Tensor]:
    """Encoded "" and negative prompts, bfloat16, stored next to the shards.

    Returns: video_empty (n, D), video_negative (n, D), and audio_empty, audio_negative (64, D)
    with audio_empty_mask, audio_negative_mask (64,) bool. Video rows are not padded.
    """
    path = Path(root) / TEXT_FILE
    if not path.is_file():
        raise DataError(f"data.root={root}: no {TEXT_FILE}; {how_to_prepare(root)}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path}: damaged ({error}); {how_to_prepare(root)}") from error


def how_to_prepare(root: str | Path) -> str:
    """The fix that every error about missing shards ends with."""
    return f"make it with `python -m data.prepare manifest.jsonl {root} --wan ... --tangoflux ...`"


def _half(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float16).contiguous().numpy()


def _bits(tensor: Tensor) -> np.ndarray:
    """MDS has no bfloat16: its bits travel as uint16."""
    bits = tensor.detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16)
    return bits.numpy().view(np.uint16)


def _float(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _bfloat16(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


def _padded(states: Tensor, length: int) -> Tensor:
    """(n, D) -> (length, D), zeros below."""
    return torch.nn.functional.pad(states, (0, 0, 0, length - len(states)))
