"""What the two backbones do not say themselves: the structure of the joint model, as config.

`JointConfig` holds every ablation of the paper and of what it leaves open; it is the `model:`
section of a run's YAML. `AVFullDiTConfig` adds the shapes of the towers and the rates from which
AVSyncRoPE's tau follows. A combination that means nothing is refused with the reason.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from common.strict_config import strict_config
from model.towers.audio_blocks import AudioDiTConfig
from model.towers.video_dit import VideoDiTConfig

CHOICES = {
    "fusion": ("full", "cross"),
    "rope": ("shrink_audio", "expand_video", "vanilla"),
    "rope_layout": ("native", "hybrid", "wan"),
    "audio_text": ("masked", "stream"),
    "init": ("normal", "zero_output", "bias_warmup"),
}
# Values in files of earlier commits -> what they are called now.
RENAMED = {"init": {"I0": "normal", "I1": "zero_output", "I2": "bias_warmup"}}


@dataclass(frozen=True)
class JointConfig:
    """Ablations. The defaults are the paper's method, else the choice of docs/paper.md."""

    num_joint_blocks: Annotated[
        int, "Joint layers (the paper's Nav), 1 to 24. Up to TangoFlux's 18 single blocks; beyond, "
        "its double blocks join, too."] = 18
    fusion: Annotated[
        str, "full: AVFull-Attention (Eq. 6-9); cross: the cross-attention baseline (Table 3a)."
    ] = "full"
    rope: Annotated[
        str, "shrink_audio: audio index / tau (Eq. 12); expand_video: video time index x tau in "
        "every video self-attention; vanilla: neither."] = "shrink_audio"
    rope_layout: Annotated[
        str, "Frequencies of audio in the joint attention: native, TangoFlux's; wan, Wan's time "
        "channels; hybrid, native on pretrained heads and wan on new ones."] = "native"
    audio_text: Annotated[
        str, "masked: video and the audio caption never see each other; stream: everything sees "
        "everything."] = "masked"
    init: Annotated[
        str, "New weights: normal, all N(0, 0.02); zero_output, new v and output zero; "
        "bias_warmup, zero_output and a bias on V <-> A logits that rises to 0."] = "zero_output"
    bias_start: Annotated[float, "Of init=bias_warmup: the bias at step 0; at most 0."] = -10.0
    bias_steps: Annotated[
        int, "Of init=bias_warmup: updates until the bias is 0; at least 1."] = 300

    def cross_modal_bias(self, step: int) -> float:
        """Bias of V <-> A logits in the update that leads to step + 1; 0 is the paper's attention.

        A schedule, not a parameter: at -10 a learned bias would have a gradient near zero.
        """
        if self.init != "bias_warmup" or step >= self.bias_steps:
            return 0.0
        return self.bias_start * (1 - step / self.bias_steps)

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value in RENAMED.get(name, {}):
                word = RENAMED[name][value]
                raise ValueError(f"model.{name}={value} is called {word} now: write {name}: {word}")
            if value not in known:
                raise ValueError(
                    f"model.{name}={value!r} is unknown; use one of "
                    f"{', '.join(known)}"
                )
        if self.num_joint_blocks < 1:
            raise ValueError(f"model.num_joint_blocks={self.num_joint_blocks} must be at least 1")
        if self.bias_start > 0 or self.bias_steps < 1:
            raise ValueError(
                f"model.bias_start={self.bias_start} must not be above 0 and "
                f"model.bias_steps={self.bias_steps} must be at least 1"
            )
        for name in ("bias_start", "bias_steps"):
            if self.init != "bias_warmup" and getattr(self, name) != getattr(JointConfig, name):
                raise ValueError(
                    f"model.{name}={getattr(self, name)} has no effect with model.init="
                    f"{self.init}; use init=bias_warmup or remove the key"
                )
        if self.fusion == "cross":
            self._check_cross()

    def _check_cross(self) -> None:
        if self.rope_layout == "hybrid":
            raise ValueError(
                "model.rope_layout=hybrid gives new audio heads another layout, but "
                "model.fusion=cross has no new heads; use native or wan"
            )
        if self.init != "zero_output":
            raise ValueError(
                f"model.init={self.init} speaks of AVFull-Attention's new columns, but "
                "model.fusion=cross always starts from a zero output; use init=zero_output"
            )


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored `model:` section in today's words."""
    return {key: RENAMED.get(key, {}).get(value, value) if isinstance(value, str) else value
            for key, value in values.items()}


@dataclass(frozen=True)
class AVFullDiTConfig(JointConfig):
    """Structure of the model, and the rates from which AVSyncRoPE's tau follows."""

    task: str = "t2av"
    video: VideoDiTConfig = VideoDiTConfig()
    audio: AudioDiTConfig | None = AudioDiTConfig()
    fps: float = 24.0
    video_temporal_stride: int = 4  # frames per video latent frame
    sample_rate: int = 44100
    audio_hop: int = 2048  # samples per audio latent

    @property
    def avsync_tau(self) -> float:
        """Eq. 11: duration of one video latent frame over that of one audio latent."""
        return (self.video_temporal_stride / self.fps) / (self.audio_hop / self.sample_rate)

    @property
    def video_time_scale(self) -> float:
        """Factor on the video time index; the same in t2v, whose twin it must stay."""
        return self.avsync_tau if self.rope == "expand_video" else 1.0

    @property
    def audio_time_divisor(self) -> float:
        """Eq. 12: the audio index is divided by tau in every audio attention."""
        return self.avsync_tau if self.rope == "shrink_audio" else 1.0

    @property
    def num_video_blocks(self) -> int:
        """Unimodal video blocks (Nv); all of them for t2v."""
        joint = self.num_joint_blocks if self.task == "t2av" else 0
        return self.video.num_layers - joint

    @property
    def num_joint_double(self) -> int:
        """Joint blocks whose audio half is a double block: those beyond the single blocks."""
        assert self.audio is not None
        return max(0, self.num_joint_blocks - self.audio.num_single_layers)

    @property
    def new_heads(self) -> int:
        """Audio heads that Eq. 6 adds in a joint block; none in the cross-attention baseline."""
        assert self.audio is not None
        if self.fusion == "cross":
            return 0
        return self.video.num_attention_heads - self.audio.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model") -> "AVFullDiTConfig":
        """Build from nested plain mappings, also of earlier commits; unknown keys are refused."""
        values = renamed(values)
        if isinstance(values.get("video"), Mapping):
            values["video"] = VideoDiTConfig.from_dict(values["video"], f"{where}.video")
        if isinstance(values.get("audio"), Mapping):
            values["audio"] = AudioDiTConfig.from_dict(values["audio"], f"{where}.audio")
        return strict_config(cls, values, where)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in ("t2av", "t2v"):
            raise ValueError(f"model.task={self.task!r} is unknown; use t2av or t2v")
        for name in ("fps", "video_temporal_stride", "sample_rate", "audio_hop"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be above 0")
        if self.task == "t2av":
            _check_pair(self.video, self.audio, self.num_joint_blocks)


def _check_pair(video: VideoDiTConfig, audio: AudioDiTConfig | None, num_joint: int) -> None:
    if audio is None:
        raise ValueError("model.task=t2av needs model.audio; use task=t2v for video alone")
    if video.attention_head_dim != audio.attention_head_dim:
        raise ValueError(
            f"video.attention_head_dim={video.attention_head_dim} and audio.attention_head_dim="
            f"{audio.attention_head_dim} must be equal: joint attention shares its heads"
        )
    if video.num_attention_heads <= audio.num_attention_heads:
        raise ValueError(
            f"video.num_attention_heads={video.num_attention_heads} must be above "
            f"audio.num_attention_heads={audio.num_attention_heads}: Eq. 6 widens audio to video"
        )
    most = min(video.num_layers, audio.num_layers + audio.num_single_layers)
    if num_joint > most:
        raise ValueError(
            f"model.num_joint_blocks={num_joint} must be 1 to {most}: a joint block pairs a video "
            f"block (of {video.num_layers}) with an audio block (of {audio.num_single_layers} "
            f"single and {audio.num_layers} double)"
        )
