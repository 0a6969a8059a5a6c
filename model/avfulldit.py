"""AVFullDiT: two pretrained towers whose last layers share one attention (Eq. 4-9).

Early layers are unimodal. Each joint layer is a Wan block and a TangoFlux single block whose
self-attentions are replaced by AVFull-Attention over video and audio tokens; cross-attention and
FFN stay as they are. ``task: t2v`` builds the video tower alone. Called by train.py and sampling.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.attention import QKV, Attention
from model.audio_dit import AudioContext, AudioDiT, AudioDiTConfig, AudioSingleBlock
from model.config import strict_config
from model.video_dit import VideoBlock, VideoContext, VideoDiT, VideoDiTConfig

RECOMPUTE = ("none", "full")


@dataclass(frozen=True)
class AVFullDiTConfig:
    """Structure of the model, and the rates from which AVSyncRoPE's tau follows."""

    task: str = "t2av"
    video: VideoDiTConfig = VideoDiTConfig()
    audio: AudioDiTConfig | None = AudioDiTConfig()
    num_joint_blocks: int = 18
    fps: float = 24.0
    video_temporal_stride: int = 4  # frames per video latent frame
    sample_rate: int = 44100
    audio_hop: int = 2048  # samples per audio latent

    @property
    def avsync_tau(self) -> float:
        """Eq. 11: duration of one video latent frame over that of one audio latent."""
        return (self.video_temporal_stride / self.fps) / (self.audio_hop / self.sample_rate)

    @property
    def num_video_blocks(self) -> int:
        """Unimodal video blocks (Nv); all of them for t2v."""
        joint = self.num_joint_blocks if self.task == "t2av" else 0
        return self.video.num_layers - joint

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model") -> "AVFullDiTConfig":
        """Build from nested plain mappings (YAML); unknown keys are refused."""
        values = dict(values)
        if isinstance(values.get("video"), Mapping):
            values["video"] = VideoDiTConfig.from_dict(values["video"], f"{where}.video")
        if isinstance(values.get("audio"), Mapping):
            values["audio"] = AudioDiTConfig.from_dict(values["audio"], f"{where}.audio")
        return strict_config(cls, values, where)

    def __post_init__(self) -> None:
        if self.task not in ("t2av", "t2v"):
            raise ValueError(f"model.task={self.task!r} is unknown; use t2av or t2v")
        for name in ("fps", "video_temporal_stride", "sample_rate", "audio_hop"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be above 0")
        if self.task == "t2av":
            _check_pair(self.video, self.audio, self.num_joint_blocks)


class AVFullAttention(nn.Module):
    """One attention over the concatenated streams (Eq. 7), without parameters of its own.

    The sequence is [video | audio | text]. Video sees {V, A}, audio sees {V, A, T}, the audio
    caption sees {T, A}: between V and A this is Eq. 7, and text stays unimodal as pretrained. In
    this order every key set is a contiguous slice, so three calls need no mask.
    """

    def __init__(self, attend: Attention) -> None:
        super().__init__()
        self.attend = attend

    def forward(
        self, video: QKV, stream: QKV, num_audio: int, cross_modal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """video (B, Nv, H, D), stream [audio | text] (B, La + Lt, H, D) -> outputs alike.

        ``cross_modal`` False masks V <-> A: the outputs are then those of the two towers.
        """
        if not cross_modal:
            return self.attend(*video), self.attend(*stream)
        key = torch.cat((video.key, stream.key), dim=1)  # (B, Nv + La + Lt, H, D)
        value = torch.cat((video.value, stream.value), dim=1)
        num_video = video.key.shape[1]
        last_audio = num_video + num_audio
        audio_query, text_query = stream.query[:, :num_audio], stream.query[:, num_audio:]
        video_out = self.attend(video.query, key[:, :last_audio], value[:, :last_audio])
        audio_out = self.attend(audio_query, key, value)
        text_out = self.attend(text_query, stream.key, stream.value)
        return video_out, torch.cat((audio_out, text_out), dim=1)


class JointBlock(nn.Module):
    """A Wan block and a TangoFlux single block around one AVFull-Attention."""

    def __init__(self, config: AVFullDiTConfig, attend: Attention) -> None:
        super().__init__()
        assert config.audio is not None
        new_heads = config.video.num_attention_heads - config.audio.num_attention_heads
        self.video = VideoBlock(config.video, attend)
        self.audio = AudioSingleBlock(config.audio, attend, new_heads)
        self.attention = AVFullAttention(attend)

    def forward(
        self,
        video: torch.Tensor,
        stream: torch.Tensor,
        video_context: VideoContext,
        audio_context: AudioContext,
        cross_modal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """video (B, Nv, Cv), stream [audio | text] (B, La + Lt, Ca) -> the same."""
        video_qkv, modulation = self.video.before_attention(video, video_context)
        audio_qkv, hidden, gate = self.audio.before_attention(stream, audio_context)
        video_out, stream_out = self.attention(
            video_qkv, audio_qkv, audio_context.num_audio, cross_modal
        )
        video = self.video.after_attention(video, video_out, modulation, video_context)
        return video, self.audio.after_attention(stream, stream_out, hidden, gate)


class AVFullDiT(nn.Module):
    """The whole model.

    ``recompute`` "full" recomputes each block in the backward pass (a joint block as one unit);
    ``attention`` is a name of `model.attention.KERNELS`; ``attention_kernel`` tells the choice.
    """

    def __init__(
        self, config: AVFullDiTConfig, recompute: str = "none", attention: str = "auto"
    ) -> None:
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute={recompute!r} is unknown; use one of {RECOMPUTE}")
        self.config = config
        self.recompute = recompute
        self.attend = Attention(attention)
        self.video = VideoDiT(config.video, config.num_video_blocks, self.attend)
        if config.task == "t2v":
            return
        assert config.audio is not None
        num_single = config.audio.num_single_layers - config.num_joint_blocks
        self.audio = AudioDiT(config.audio, num_single, self.attend)
        self.joint_blocks = nn.ModuleList(
            JointBlock(config, self.attend) for _ in range(config.num_joint_blocks)
        )

    @property
    def attention_kernel(self) -> str:
        """Name of the kernel in use, chosen by the weights' dtype and device if not yet run."""
        weight = self.video.proj_out.weight
        return self.attend.resolve(weight.device, weight.dtype)

    def forward(
        self,
        noisy_video: torch.Tensor,
        t: torch.Tensor,
        video_text: torch.Tensor,
        noisy_audio: torch.Tensor | None = None,
        audio_text: torch.Tensor | None = None,
        audio_text_mask: torch.Tensor | None = None,
        duration: torch.Tensor | None = None,
        cross_modal: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Velocities eps - x0 of both modalities at one shared t (Eq. 2-3), in float32.

        noisy_video (B, C, T, H, W), t (B,) in [0, 1] with 1 = noise, video_text (B, Nt, Dt) zero
        padded, noisy_audio (B, L, C), audio_text (B, 64, Da), audio_text_mask (B, 64) True on real
        tokens, duration (B,) seconds. Task t2v takes the first three and returns (video, None).
        """
        if t.shape != noisy_video.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}; it must be ({noisy_video.shape[0]},)")
        video, video_context = self.video.embed(noisy_video, t, video_text)
        for block in self.video.blocks:
            video = self._run(block, video, video_context)
        audio_inputs = (noisy_audio, audio_text, audio_text_mask, duration)
        if self.config.task == "t2v":
            if any(value is not None for value in audio_inputs):
                raise ValueError("task=t2v takes no audio inputs; use task=t2av")
            return self.video.velocity(video, video_context), None
        stream, audio_context = self._embed_audio(t, *audio_inputs)
        for block in self.joint_blocks:
            video, stream = self._run(
                block, video, stream, video_context, audio_context, cross_modal
            )
        audio = stream[:, : audio_context.num_audio]  # the caption's tokens end here
        return (
            self.video.velocity(video, video_context),
            self.audio.velocity(audio, audio_context),
        )

    def _embed_audio(
        self,
        t: torch.Tensor,
        noisy_audio: torch.Tensor | None,
        audio_text: torch.Tensor | None,
        audio_text_mask: torch.Tensor | None,
        duration: torch.Tensor | None,
    ) -> tuple[torch.Tensor, AudioContext]:
        """Run the unimodal audio tower -> stream [audio | text] (B, La + Lt, Ca), context."""
        if noisy_audio is None or audio_text is None or audio_text_mask is None or duration is None:
            raise ValueError(
                "task=t2av needs noisy_audio, audio_text, audio_text_mask and duration; "
                "use task=t2v for video alone"
            )
        audio, text, context = self.audio.embed(
            noisy_audio, t, audio_text, audio_text_mask, duration, self.config.avsync_tau
        )
        for block in self.audio.transformer_blocks:
            audio, text = self._run(block, audio, text, context)
        stream = torch.cat((audio, text), dim=1)  # (B, La + Lt, Ca)
        for block in self.audio.single_transformer_blocks:
            stream = self._run(block, stream, context)
        return stream, context

    def _run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        if self.recompute == "full" and torch.is_grad_enabled():
            # There is no dropout, hence no random state to keep.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)


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
    most = min(video.num_layers, audio.num_single_layers)
    if not 1 <= num_joint <= most:
        raise ValueError(
            f"model.num_joint_blocks={num_joint} must be 1 to {most}: a joint block pairs a video "
            f"block (of {video.num_layers}) with an audio single block (of "
            f"{audio.num_single_layers})"
        )
