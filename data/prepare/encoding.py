"""The four frozen encoders of one data set, and what dataset.json says of their geometry."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.clips.cut import Cut, CutSpec, Facts
from data.provenance import encoder_fingerprints
from data.reasons import Rejected
from data.schema import DataError, Metadata, pack
from model.encoders import (
    AUDIO_TEXT_LENGTH,
    AudioTextEncoder,
    AudioVAE,
    VideoTextEncoder,
    VideoVAE,
    nearest_frame_count,
)
from model.weights.hub import one_line_errors

DIT_PATCH = 2  # the video tower's patch in height and width: latents must divide by it

# Wan's own `sample_neg_prompt`; TangoFlux's negative is "".
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
    fingerprints: dict[str, str]  # encoder -> of its files
    sources: dict[str, str]  # "wan", "tangoflux" -> folder or hub id

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
                encoder_fingerprints(wan, tangoflux),
                {"wan": wan, "tangoflux": tangoflux},
            )

    @property
    def text_precision(self) -> str:
        """bfloat16 on a GPU, float32 on a CPU: one data set is encoded in one of them."""
        return str(self.video_text.encoder.dtype).removeprefix("torch.")

    def encode(self, cut: Cut, record: dict[str, Any]) -> dict[str, Any]:
        """One cut and its captions -> one MDS sample; Rejected if a latent is not finite."""
        frames = torch.from_numpy(cut.frames).permute(3, 0, 1, 2)[None]  # (1, 3, T, H, W)
        video = self.video_vae.encode(frames.float() / 127.5 - 1)[0]  # (C, F, h, w)
        audio = self._encode_sound(cut) if cut.facts.has_audio else None  # (L, C) mean and std
        named = {"video": video} | dict(zip(("audio", "audio std"), audio or (), strict=False))
        for name, latents in named.items():
            if not latents.half().isfinite().all():  # float16 is what will be stored
                raise Rejected("not_finite", f"{name} latents are not finite in float16")
        states, mask = self.audio_text.encode([record["audio_caption"]])
        [video_text] = self.video_text.encode([record["video_caption"]])
        shape = len(cut.audio) // self.audio_vae.hop, self.audio_vae.latent_channels
        record = describe(record, cut.facts)
        return pack(record, video, audio, video_text, (states[0], mask[0]), shape)

    def _encode_sound(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """Posterior mean and std, (L, C) each."""
        wave = torch.from_numpy(cut.audio).T[None].clamp(-1, 1)  # (1, 2, N)
        mean, std = self.audio_vae.encode(wave)
        return mean[0], std[0]

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


def describe(record: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """What is stored of a cut: the manifest's record and the facts, where they differ the facts.

    A clip's further cuts (`offsets`) lie elsewhere than the record's own: the end moves along, and
    its marks, of which no others are known, are left out.
    """
    told = record | dataclasses.asdict(facts)
    begin, end = record.get("t0"), record.get("t1")
    if begin not in (None, facts.t0):
        told.pop("marks", None)
        if end is not None:
            told["t1"] = facts.t0 + (end - begin)
    return told


def build_metadata(encoders: Encoders, spec: CutSpec) -> Metadata:
    """What dataset.json will say, counts still open; DataError if the geometry cannot be."""
    vae, audio_vae = encoders.video_vae, encoders.audio_vae
    stride, multiple = vae.temporal_stride, vae.spatial_stride * DIT_PATCH
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
        fingerprints=encoders.fingerprints,
    )
