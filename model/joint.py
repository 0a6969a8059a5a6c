"""Joint layers: a Wan block and a TangoFlux block that hear each other (Eq. 5-9).

`AVFullAttention` is the paper's method: one attention over both token streams. `CrossFusion` is its
baseline (Table 3a): both blocks stay unimodal and each modality then attends to the other. In both,
Wan's cross-attention and FFN and TangoFlux's MLP stay as they are. Called by model.avfulldit.
"""

from typing import NamedTuple

import torch
from torch import nn

from model.towers.attention import QKV, Attention
from model.towers.audio_blocks import AudioContext, AudioDoubleBlock, AudioSingleBlock, NewHeads
from model.towers.layers import layer_norm
from model.towers.rope import Rope, rotate
from model.towers.video_dit import VideoBlock, VideoContext
from model.variants import AVFullDiTConfig


class Coupling(NamedTuple):
    """How the two streams are coupled in one forward pass; the same in every joint block."""

    cross_modal: bool  # False masks V <-> A: the outputs are then those of the two towers
    bias: float  # on V <-> A logits; 0 is the paper's attention
    ropes: tuple[Rope, Rope] | None  # time of video and of [audio | text], for CrossFusion
    audio_present: torch.Tensor | None = None  # (B,) bool, False: a clip without sound; None: all


class AVFullAttention(nn.Module):
    """One attention over the concatenated streams (Eq. 7), without parameters of its own.

    The sequence is [video | audio | text]. Under audio_text "masked" video sees {V, A}, audio
    sees {V, A, T}, the audio caption sees {T, A}: between V and A this is Eq. 7, and text stays
    unimodal as pretrained. In this order every key set is a contiguous slice, so three calls need
    no mask. Under "stream" everything sees everything, in one call.
    """

    def __init__(self, attend: Attention, audio_text: str = "masked") -> None:
        super().__init__()
        self.attend = attend
        self.audio_text = audio_text

    def forward(
        self, video: QKV, stream: QKV, num_audio: int, cross_modal: bool, bias: float = 0.0,
        audio_present: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """video (B, Nv, H, D), stream [audio | text] (B, La + Lt, H, D) -> outputs alike.

        Where ``audio_present`` (B,) is False, video attends to itself alone: that clip has no
        sound, and what its audio stream computes enters neither the video nor the loss.
        """
        if not cross_modal:
            return self.attend(*video), self.attend(*stream)
        key = torch.cat((video.key, stream.key), dim=1)  # (B, Nv + La + Lt, H, D)
        value = torch.cat((video.value, stream.value), dim=1)
        num_video, num_stream = video.key.shape[1], stream.key.shape[1]
        on_stream_keys = on_video_keys = None  # biases per key, each for the other side's queries
        if bias or audio_present is not None:
            of_stream = torch.arange(key.shape[1], device=key.device) >= num_video
            on_stream_keys = bias * of_stream
            on_video_keys = bias - on_stream_keys if bias else None
            if audio_present is not None:
                silent = ~audio_present[:, None] & of_stream  # (B, keys)
                on_stream_keys = on_stream_keys.masked_fill(silent, -torch.inf)
        elif self.audio_text == "stream":
            query = torch.cat((video.query, stream.query), dim=1)
            return self.attend(query, key, value).split((num_video, num_stream), dim=1)
        if self.audio_text == "stream":
            return (
                self.attend(video.query, key, value, on_stream_keys),
                self.attend(stream.query, key, value, on_video_keys),
            )
        last_audio = num_video + num_audio
        video_out = self.attend(
            video.query, key[:, :last_audio], value[:, :last_audio],
            None if on_stream_keys is None else on_stream_keys[..., :last_audio],
        )
        audio_query, text_query = stream.query[:, :num_audio], stream.query[:, num_audio:]
        audio_out = self.attend(audio_query, key, value, on_video_keys)
        text_out = self.attend(text_query, stream.key, stream.value)
        return video_out, torch.cat((audio_out, text_out), dim=1)


class NewLinear(nn.Linear):
    """torch's own start, drawn in float32 also under a bf16 `zero.Init`: every engine starts alike.

    Drawing into bf16 in place gives other numbers than rounding what is drawn in float32.
    """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        for parameter in (self.weight, self.bias):
            drawn = torch.rand(parameter.shape, dtype=torch.float32, device=parameter.device)
            parameter.copy_((2 * drawn - 1) * bound)


class ZeroLinear(nn.Linear):
    """A Linear that starts at zero: what it adds to a residual is nothing at step 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class CrossFusion(nn.Module):
    """One modality attends to the other: queries in its own width, heads of its own number.

    Both streams are normalised without parameters, q and k per head by RMSNorm; positions are time
    alone. Every parameter is new.
    """

    def __init__(
        self, dim: int, other_dim: int, head_dim: int, eps: float, attend: Attention
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.eps = eps
        self.attend = attend
        self.to_q = NewLinear(dim, dim)
        self.to_k = NewLinear(other_dim, dim)
        self.to_v = NewLinear(other_dim, dim)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.to_out = ZeroLinear(dim, dim)

    def forward(
        self, x: torch.Tensor, other: torch.Tensor, rope: Rope, other_rope: Rope
    ) -> torch.Tensor:
        """x (B, L, C), other (B, M, C') -> what to add to x (B, L, C)."""
        heads = (-1, self.head_dim)
        own, source = layer_norm(x, self.eps), layer_norm(other, self.eps)
        query = self.norm_q(self.to_q(own).unflatten(2, heads))  # (B, L, H, D)
        key = self.norm_k(self.to_k(source).unflatten(2, heads))  # (B, M, H, D)
        value = self.to_v(source).unflatten(2, heads)
        attended = self.attend(rotate(query, rope), rotate(key, other_rope), value)
        return self.to_out(attended.flatten(2))


class JointBlock(nn.Module):
    """A Wan block and a TangoFlux block (double or single) around what joins them."""

    def __init__(self, config: AVFullDiTConfig, attend: Attention, double: bool) -> None:
        super().__init__()
        assert config.audio is not None
        self.fusion, self.audio_text = config.fusion, config.audio_text
        new = NewHeads(config.new_heads, config.init == "normal")
        build = AudioDoubleBlock if double else AudioSingleBlock
        self.video = VideoBlock(config.video, attend)
        self.audio: AudioDoubleBlock | AudioSingleBlock = build(config.audio, attend, new)
        self.attend = attend
        if config.fusion == "full":
            self.attention = AVFullAttention(attend, config.audio_text)
            return
        video_dim, audio_dim = config.video.hidden_dim, config.audio.hidden_dim
        head_dim, eps = config.video.attention_head_dim, config.video.eps
        self.new_video_fusion = CrossFusion(video_dim, audio_dim, head_dim, eps, attend)
        self.new_audio_fusion = CrossFusion(audio_dim, video_dim, head_dim, eps, attend)

    def forward(
        self,
        video: torch.Tensor,
        stream: torch.Tensor,
        video_context: VideoContext,
        audio_context: AudioContext,
        coupling: Coupling,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """video (B, Nv, Cv), stream [audio | text] (B, La + Lt, Ca) -> the same."""
        video_qkv, modulation = self.video.before_attention(video, video_context)
        audio_qkv, state = self.audio.before_attention(stream, audio_context)
        if self.fusion == "full":
            video_out, stream_out = self.attention(
                video_qkv, audio_qkv, audio_context.num_audio, coupling.cross_modal, coupling.bias,
                coupling.audio_present,
            )
        else:
            video_out, stream_out = self.attend(*video_qkv), self.attend(*audio_qkv)
        video = self.video.add_attention(video, video_out, modulation)
        stream = self.audio.add_attention(stream, stream_out, state, audio_context)
        if self.fusion == "cross" and coupling.cross_modal:
            video, stream = self._fuse(video, stream, audio_context.num_audio, coupling)
        return (
            self.video.feed(video, modulation, video_context),
            self.audio.feed(stream, state, audio_context),
        )

    def _fuse(
        self, video: torch.Tensor, stream: torch.Tensor, num_audio: int, coupling: Coupling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides read the other as it was after its self-attention's residual."""
        assert coupling.ropes is not None
        video_rope, stream_rope = coupling.ropes
        # masked: video and the audio caption never see each other; stream: it is part of audio.
        size = num_audio if self.audio_text == "masked" else stream.shape[1]
        heard, rope = stream[:, :size], Rope(*(table[:size] for table in stream_rope))
        to_video = self.new_video_fusion(video, heard, video_rope, rope)
        if coupling.audio_present is not None:
            to_video = to_video * coupling.audio_present[:, None, None]
        to_stream = self.new_audio_fusion(heard, video, rope, video_rope)
        return video + to_video, torch.cat((heard + to_stream, stream[:, size:]), dim=1)
