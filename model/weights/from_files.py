"""The model's config from what exists: the backbones' own files and the stored latents.

Shapes come from the released configs, rates from the data, the rest from the experiment. Called by
train.py before anything is built.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from model.towers.attention import Attention
from model.variants import AVFullDiTConfig, JointConfig
from model.weights.hub import fingerprint, tangoflux_file
from model.weights.load import read_tower_configs
from model.weights.released import wan_files


class Stored(Protocol):
    """What is asked of a data set; `data.schema.Metadata` is one."""

    @property
    def fps(self) -> float: ...
    @property
    def video_temporal_stride(self) -> int: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def audio_hop(self) -> int: ...
    @property
    def video_latent_shape(self) -> Sequence[int]: ...  # (C, F, h, w)
    @property
    def audio_latent_shape(self) -> Sequence[int]: ...  # (L, C)
    @property
    def video_text_width(self) -> int: ...
    @property
    def audio_text_width(self) -> int: ...


def config_from_files(
    task: str, joint: JointConfig, attention: str, wan: str | Path, tangoflux: str | Path,
    stored: Stored, place: str,
) -> AVFullDiTConfig:
    """Raises ValueError, in one line, when data, backbones and experiment do not fit together.

    Args:
        joint, attention: the experiment's. place: where `stored` lies, for the message.
    """
    video, audio = read_tower_configs(wan, tangoflux if task == "t2av" else None)
    widths = [("video latents", stored.video_latent_shape[0], video.in_channels),
              ("video text states", stored.video_text_width, video.text_dim)]
    if audio:
        widths += [("audio latents", stored.audio_latent_shape[1], audio.in_channels),
                   ("audio text states", stored.audio_text_width, audio.joint_attention_dim)]
    for what, width, taken in widths:
        if width != taken:
            raise ValueError(
                f"data.root={place} holds {what} of width {width}, but the backbones "
                f"(wan={wan}, tangoflux={tangoflux}) take {taken}: prepare the data "
                "with the encoders of the same folders"
            )
    Attention(attention)
    return AVFullDiTConfig(
        task=task,
        video=video,
        audio=audio,
        **dataclasses.asdict(joint),
        fps=stored.fps,
        video_temporal_stride=stored.video_temporal_stride,
        sample_rate=stored.sample_rate,
        audio_hop=stored.audio_hop,
    )


def weight_fingerprints(
    task: str, wan: str | Path, tangoflux: str | Path
) -> dict[str, str]:
    """Tower -> sha256 over names, shapes and sampled bytes of its released tensors; seconds."""
    found = {"wan": fingerprint(wan_files(wan), {})}
    if task == "t2av":
        path, _ = tangoflux_file(tangoflux, "tangoflux.safetensors")
        found["tangoflux"] = fingerprint([path], {}, prefix="transformer.")
    return found
