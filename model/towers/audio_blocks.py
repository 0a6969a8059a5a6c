"""TangoFlux's blocks (Flux double and single blocks), unimodal or as half of a joint block.

Every block takes the stream [audio | text] and is split at its attention: `before_attention`
gives q, k, v; `add_attention` adds what came back; `feed` is what follows. So a joint block can put
AVFull-Attention between the halves, or a cross-attention after them. With ``new_heads`` > 0 the
projections get new columns and rows (Eq. 6 and 9). Called by model.towers.audio_dit and
model.joint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from common.strict_config import strict_config
from model.towers.attention import QKV, Attention
from model.towers.layers import (
    AdaModulation,
    ExpandedLinear,
    FeedForward,
    HeadsOutput,
    SingleOutput,
    gelu,
    layer_norm,
)
from model.towers.rope import Rope, rotate

MLP_RATIO = 4  # fixed in diffusers' Flux classes
NEW_STD = 0.02  # of new weights that do not start at zero


@dataclass(frozen=True)
class AudioDiTConfig:
    """Field names of diffusers' FluxTransformer2DModel and TangoFlux; defaults are TangoFlux."""

    in_channels: int = 64
    num_layers: int = 6
    num_single_layers: int = 18
    attention_head_dim: int = 128
    num_attention_heads: int = 8
    joint_attention_dim: int = 1024
    pooled_projection_dim: int = 1024
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    max_duration: float = 30.0
    audio_seq_len: int = 645

    @property
    def hidden_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model.audio") -> "AudioDiTConfig":
        return strict_config(cls, values, where)

    def __post_init__(self) -> None:
        axes = self.axes_dims_rope
        if sum(axes) != self.attention_head_dim or any(dim % 2 for dim in axes):
            raise ValueError(
                f"audio.axes_dims_rope={axes} must be even numbers that add up to "
                f"attention_head_dim={self.attention_head_dim}"
            )


class AudioContext(NamedTuple):
    """What every block of one forward shares."""

    embedding: torch.Tensor  # (B, C) timestep plus pooled caption
    rope: Rope  # of the stream [audio | text]
    num_audio: int
    num_text: int


class NewHeads(NamedTuple):
    """How many heads a joint block adds, and whether all of them start random (init=normal)."""

    heads: int = 0
    random: bool = False

    def std(self, pretrained_safe: bool) -> float:
        """Standard deviation of a new weight; ``pretrained_safe`` ones are
        zero except under init=normal, because they would act on a pretrained stream at step 0."""
        return NEW_STD if self.random or not pretrained_safe else 0.0


NO_NEW_HEADS = NewHeads()


class AudioDoubleAttention(nn.Module):
    """q, k, v and outputs of audio and text with weights of their own; RMSNorm per head."""

    def __init__(self, config: AudioDiTConfig, new: NewHeads) -> None:
        super().__init__()
        dim, head_dim = config.hidden_dim, config.attention_head_dim
        new_dim = new.heads * head_dim
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = _projections(config, new)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = _projections(config, new)
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
        std = new.std(pretrained_safe=True)
        # checkpoint name to_out.0
        self.to_out = nn.Sequential(HeadsOutput(dim, dim, new_dim, std))
        self.to_add_out = HeadsOutput(dim, dim, new_dim, std)

    def project(self, audio: torch.Tensor, text: torch.Tensor, rope: Rope) -> QKV:
        """audio (B, La, Ca), text (B, Lt, Ca) -> q, k, v (B, La + Lt, Ha + new, D)."""
        heads = (-1, self.head_dim)
        query = torch.cat((
            self.norm_q(self.to_q(audio).unflatten(2, heads)),
            self.norm_added_q(self.add_q_proj(text).unflatten(2, heads)),
        ), dim=1)
        key = torch.cat((
            self.norm_k(self.to_k(audio).unflatten(2, heads)),
            self.norm_added_k(self.add_k_proj(text).unflatten(2, heads)),
        ), dim=1)
        value = torch.cat((self.to_v(audio), self.add_v_proj(text)), dim=1).unflatten(2, heads)
        return QKV(rotate(query, rope), rotate(key, rope), value)

    def output(
        self, attended: torch.Tensor, num_audio: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """attended (B, La + Lt, H, D) -> audio (B, La, Ca), text (B, Lt, Ca)."""
        flat = attended.flatten(2)
        return self.to_out(flat[:, :num_audio]), self.to_add_out(flat[:, num_audio:])


class AudioDoubleBlock(nn.Module):
    """Attention over [audio | text], then an FFN per stream; weights of their own throughout."""

    def __init__(
        self, config: AudioDiTConfig, attend: Attention, new: NewHeads = NO_NEW_HEADS
    ) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.attend = attend
        self.norm1 = AdaModulation(dim, 6)
        self.norm1_context = AdaModulation(dim, 6)
        self.attn = AudioDoubleAttention(config, new)
        self.ff = FeedForward(dim, MLP_RATIO * dim)
        self.ff_context = FeedForward(dim, MLP_RATIO * dim)

    def forward(self, stream: torch.Tensor, context: AudioContext) -> torch.Tensor:
        """Unimodal block: stream [audio | text] (B, La + Lt, Ca) -> the same."""
        qkv, state = self.before_attention(stream, context)
        stream = self.add_attention(stream, self.attend(*qkv), state, context)
        return self.feed(stream, state, context)

    def before_attention(
        self, stream: torch.Tensor, context: AudioContext
    ) -> tuple[QKV, tuple[torch.Tensor, ...]]:
        """q, k, v (B, La + Lt, H, D) and the eight modulation vectors still to be used."""
        shift, scale, *audio_state = self.norm1(context.embedding)
        text_shift, text_scale, *text_state = self.norm1_context(context.embedding)
        audio, text = _split(stream, context)
        qkv = self.attn.project(
            layer_norm(audio) * (1 + scale) + shift,
            layer_norm(text) * (1 + text_scale) + text_shift,
            context.rope,
        )
        return qkv, (*audio_state, *text_state)

    def add_attention(
        self,
        stream: torch.Tensor,
        attended: torch.Tensor,
        state: tuple[torch.Tensor, ...],
        context: AudioContext,
    ) -> torch.Tensor:
        """attended (B, La + Lt, H, D) -> stream (B, La + Lt, Ca)."""
        audio, text = _split(stream, context)
        audio_out, text_out = self.attn.output(attended, context.num_audio)
        return torch.cat((audio + state[0] * audio_out, text + state[4] * text_out), dim=1)

    def feed(
        self, stream: torch.Tensor, state: tuple[torch.Tensor, ...], context: AudioContext
    ) -> torch.Tensor:
        audio, text = _split(stream, context)
        audio = _gated_ffn(audio, self.ff, *state[1:4])
        return torch.cat((audio, _gated_ffn(text, self.ff_context, *state[5:8])), dim=1)


class AudioSingleAttention(nn.Module):
    """q, k, v of a single block; its output projection is shared with the MLP.

    RMSNorm is per head with one weight for all heads, so it covers the new heads and leaves the
    pretrained ones mathematically untouched; a full-width norm would rescale them.
    """

    def __init__(self, config: AudioDiTConfig, new: NewHeads) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim
        self.to_q, self.to_k, self.to_v = _projections(config, new)
        self.norm_q = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(self.head_dim, eps=1e-6)

    def forward(self, stream: torch.Tensor, rope: Rope) -> QKV:
        """stream (B, La + Lt, Ca) -> q, k, v (B, La + Lt, Ha + new, D)."""
        heads = (-1, self.head_dim)
        query = self.norm_q(self.to_q(stream).unflatten(2, heads))
        key = self.norm_k(self.to_k(stream).unflatten(2, heads))
        return QKV(rotate(query, rope), rotate(key, rope), self.to_v(stream).unflatten(2, heads))


class AudioSingleBlock(nn.Module):
    """Attention and MLP in parallel over the stream [audio | text]."""

    def __init__(
        self, config: AudioDiTConfig, attend: Attention, new: NewHeads = NO_NEW_HEADS
    ) -> None:
        super().__init__()
        dim, hidden_dim = config.hidden_dim, MLP_RATIO * config.hidden_dim
        self.attend = attend
        self.norm = AdaModulation(dim, 3)
        self.attn = AudioSingleAttention(config, new)
        self.proj_mlp = nn.Linear(dim, hidden_dim)
        self.proj_out = SingleOutput(
            dim, hidden_dim, new.heads * config.attention_head_dim, new.std(pretrained_safe=True)
        )

    def forward(self, stream: torch.Tensor, context: AudioContext) -> torch.Tensor:
        """Unimodal block: stream (B, La + Lt, Ca) -> the same."""
        qkv, state = self.before_attention(stream, context)
        return self.add_attention(stream, self.attend(*qkv), state, context)

    def before_attention(
        self, stream: torch.Tensor, context: AudioContext
    ) -> tuple[QKV, tuple[torch.Tensor, ...]]:
        """q, k, v (B, La + Lt, H, D); the MLP's hidden (B, La + Lt, 4 Ca) and the gate."""
        shift, scale, gate = self.norm(context.embedding)
        normed = layer_norm(stream) * (1 + scale) + shift
        return self.attn(normed, context.rope), (gelu(self.proj_mlp(normed)), gate)

    def add_attention(
        self,
        stream: torch.Tensor,
        attended: torch.Tensor,
        state: tuple[torch.Tensor, ...],
        context: AudioContext,
    ) -> torch.Tensor:
        """attended (B, La + Lt, H, D) -> stream (B, La + Lt, Ca)."""
        hidden, gate = state
        return stream + gate * self.proj_out(attended.flatten(2), hidden)

    def feed(
        self, stream: torch.Tensor, state: tuple[torch.Tensor, ...], context: AudioContext
    ) -> torch.Tensor:
        """Nothing follows: the MLP ran parallel to the attention."""
        return stream


def _projections(config: AudioDiTConfig, new: NewHeads) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """to_q, to_k, to_v, with new columns where there are new heads.

    v starts at zero: video heads receive no foreign values at step 0. q and k must not: the
    RMSNorm of a zero vector has a gradient of 1/sqrt(eps) = 1000.
    """
    dim, new_dim = config.hidden_dim, new.heads * config.attention_head_dim
    if not new_dim:
        return nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
    return (
        ExpandedLinear(dim, new_dim, new.std(pretrained_safe=False)),
        ExpandedLinear(dim, new_dim, new.std(pretrained_safe=False)),
        ExpandedLinear(dim, new_dim, new.std(pretrained_safe=True)),
    )


def _split(stream: torch.Tensor, context: AudioContext) -> tuple[torch.Tensor, torch.Tensor]:
    return stream[:, : context.num_audio], stream[:, context.num_audio :]


def _gated_ffn(
    x: torch.Tensor, ffn: FeedForward, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    return x + gate * ffn(layer_norm(x) * (1 + scale) + shift)
