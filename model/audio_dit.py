"""The audio tower, in the exact structure of TangoFlux (Flux blocks plus duration token and fc).

TangoFlux has no cross-attention: its caption enters as text tokens inside self-attention. Double
blocks keep weights of their own for audio and text; single blocks run both as one stream, which we
order [audio | text] (the checkpoint's order is text first; attention does not care).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from model.attention import QKV, Attention
from model.config import strict_config
from model.layers import (
    AdaModulation,
    DurationEmbedder,
    Embedder,
    ExpandedLinear,
    FeedForward,
    SingleOutput,
    gelu,
    layer_norm,
    timestep_sinusoid,
)
from model.rope import Rope, audio_rope, rotate

SINUSOID_DIM = 256  # fixed in diffusers' Flux classes
MLP_RATIO = 4  # fixed in diffusers' Flux classes


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


class TimeTextEmbedder(nn.Module):
    def __init__(self, config: AudioDiTConfig) -> None:
        super().__init__()
        self.timestep_embedder = Embedder(SINUSOID_DIM, config.hidden_dim, nn.SiLU())
        self.text_embedder = Embedder(config.pooled_projection_dim, config.hidden_dim, nn.SiLU())

    def forward(self, t: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        sinusoid = timestep_sinusoid(t, SINUSOID_DIM).to(pooled.dtype)
        return self.timestep_embedder(sinusoid) + self.text_embedder(pooled)  # (B, Ca)


class AudioDoubleAttention(nn.Module):
    """Joint attention of audio and text with weights of their own; RMSNorm per head."""

    def __init__(self, config: AudioDiTConfig, attend: Attention) -> None:
        super().__init__()
        dim, head_dim = config.hidden_dim, config.attention_head_dim
        self.head_dim = head_dim
        self.attend = attend
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(dim, dim))  # checkpoint name to_out.0
        self.to_add_out = nn.Linear(dim, dim)

    def forward(
        self, audio: torch.Tensor, text: torch.Tensor, context: AudioContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """audio (B, La, Ca), text (B, Lt, Ca) -> both, attended over [audio | text]."""
        heads = (-1, self.head_dim)
        query = torch.cat((
            self.norm_q(self.to_q(audio).unflatten(2, heads)),
            self.norm_added_q(self.add_q_proj(text).unflatten(2, heads)),
        ), dim=1)  # (B, La + Lt, H, D)
        key = torch.cat((
            self.norm_k(self.to_k(audio).unflatten(2, heads)),
            self.norm_added_k(self.add_k_proj(text).unflatten(2, heads)),
        ), dim=1)
        value = torch.cat((self.to_v(audio), self.add_v_proj(text)), dim=1).unflatten(2, heads)
        attended = self.attend(rotate(query, context.rope), rotate(key, context.rope), value)
        audio_out, text_out = attended.flatten(2).split((audio.shape[1], text.shape[1]), dim=1)
        return self.to_out(audio_out), self.to_add_out(text_out)


class AudioDoubleBlock(nn.Module):
    def __init__(self, config: AudioDiTConfig, attend: Attention) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.norm1 = AdaModulation(dim, 6)
        self.norm1_context = AdaModulation(dim, 6)
        self.attn = AudioDoubleAttention(config, attend)
        self.ff = FeedForward(dim, MLP_RATIO * dim)
        self.ff_context = FeedForward(dim, MLP_RATIO * dim)

    def forward(
        self, audio: torch.Tensor, text: torch.Tensor, context: AudioContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """audio (B, La, Ca), text (B, Lt, Ca) -> the same."""
        shift, scale, gate, *audio_ffn = self.norm1(context.embedding)
        text_shift, text_scale, text_gate, *text_ffn = self.norm1_context(context.embedding)
        audio_out, text_out = self.attn(
            layer_norm(audio) * (1 + scale) + shift,
            layer_norm(text) * (1 + text_scale) + text_shift,
            context,
        )
        audio = _gated_ffn(audio + gate * audio_out, self.ff, *audio_ffn)
        text = _gated_ffn(text + text_gate * text_out, self.ff_context, *text_ffn)
        return audio, text


class AudioSingleAttention(nn.Module):
    """q, k, v of a single block. With ``new_heads`` > 0 they get new columns (Eq. 6).

    RMSNorm is per head with one weight for all heads, so it covers the new heads and leaves the
    pretrained ones mathematically untouched; a full-width norm would rescale them.
    """

    def __init__(self, config: AudioDiTConfig, new_heads: int) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim
        # v starts at zero: video heads receive no foreign values at step 0. q and k must not: the
        # RMSNorm of a zero vector has a gradient of 1/sqrt(eps) = 1000.
        self.to_q = _projection(config, new_heads, new_std=0.02)
        self.to_k = _projection(config, new_heads, new_std=0.02)
        self.to_v = _projection(config, new_heads, new_std=0.0)
        self.norm_q = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(self.head_dim, eps=1e-6)

    def forward(self, stream: torch.Tensor, rope: Rope) -> QKV:
        """stream (B, La + Lt, Ca) -> q, k, v (B, La + Lt, Ha + new_heads, D)."""
        heads = (-1, self.head_dim)
        query = self.norm_q(self.to_q(stream).unflatten(2, heads))
        key = self.norm_k(self.to_k(stream).unflatten(2, heads))
        return QKV(rotate(query, rope), rotate(key, rope), self.to_v(stream).unflatten(2, heads))


class AudioSingleBlock(nn.Module):
    """Attention and MLP in parallel over the stream [audio | text].

    ``new_heads`` > 0 makes it the audio half of a joint block, as wide as the video's attention.
    """

    def __init__(self, config: AudioDiTConfig, attend: Attention, new_heads: int = 0) -> None:
        super().__init__()
        dim, hidden_dim = config.hidden_dim, MLP_RATIO * config.hidden_dim
        self.attend = attend
        self.norm = AdaModulation(dim, 3)
        self.attn = AudioSingleAttention(config, new_heads)
        self.proj_mlp = nn.Linear(dim, hidden_dim)
        self.proj_out = SingleOutput(dim, hidden_dim, new_heads * config.attention_head_dim)

    def forward(self, stream: torch.Tensor, context: AudioContext) -> torch.Tensor:
        """Unimodal block: stream (B, La + Lt, Ca) -> the same."""
        qkv, hidden, gate = self.before_attention(stream, context)
        return self.after_attention(stream, self.attend(*qkv), hidden, gate)

    def before_attention(
        self, stream: torch.Tensor, context: AudioContext
    ) -> tuple[QKV, torch.Tensor, torch.Tensor]:
        """q, k, v (B, La + Lt, H, D), the MLP's hidden (B, La + Lt, 4 Ca) and the gate."""
        shift, scale, gate = self.norm(context.embedding)
        normed = layer_norm(stream) * (1 + scale) + shift
        return self.attn(normed, context.rope), gelu(self.proj_mlp(normed)), gate

    def after_attention(
        self, stream: torch.Tensor, attended: torch.Tensor, hidden: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        """attended (B, La + Lt, H, D) -> stream (B, La + Lt, Ca)."""
        return stream + gate * self.proj_out(attended.flatten(2), hidden)


class AudioDiT(nn.Module):
    """Embeddings, double blocks, ``num_single_blocks`` unimodal single blocks and head."""

    def __init__(self, config: AudioDiTConfig, num_single_blocks: int, attend: Attention) -> None:
        super().__init__()
        self.config = config
        dim, text_dim = config.hidden_dim, config.joint_attention_dim
        self.fc = nn.Sequential(nn.Linear(text_dim, config.pooled_projection_dim), nn.ReLU())
        self.duration_embedder = DurationEmbedder(text_dim, config.max_duration)
        self.time_text_embed = TimeTextEmbedder(config)
        self.context_embedder = nn.Linear(text_dim, dim)
        self.x_embedder = nn.Linear(config.in_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            AudioDoubleBlock(config, attend) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            AudioSingleBlock(config, attend) for _ in range(num_single_blocks)
        )
        self.norm_out = AdaModulation(dim, 2)
        self.proj_out = nn.Linear(dim, config.in_channels)

    def embed(
        self,
        noisy_audio: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        duration: torch.Tensor,
        tau: float,
    ) -> tuple[torch.Tensor, torch.Tensor, AudioContext]:
        """Audio tokens (B, La, Ca), text tokens (B, Nt + 1, Ca) and the context.

        noisy_audio (B, La, C), t (B,), text (B, Nt, Da) with text_mask (B, Nt) True on real
        tokens, duration (B,) seconds. The mask enters only the pooled mean: as pretrained, all
        rows are attended, and the duration token comes last.
        """
        self._check_audio(noisy_audio)
        dtype = self.x_embedder.weight.dtype
        weights = text_mask[..., None].float()
        pooled = (text.float() * weights).sum(dim=1) / weights.sum(dim=1)  # (B, Da)
        embedding = self.time_text_embed(t, self.fc(pooled.to(dtype)))
        states = torch.cat((text.to(dtype), self.duration_embedder(duration)), dim=1)
        audio, text_tokens = self.x_embedder(noisy_audio.to(dtype)), self.context_embedder(states)
        rope = audio_rope(
            audio.shape[1], text_tokens.shape[1], self.config.axes_dims_rope, tau, audio.device
        )
        return audio, text_tokens, AudioContext(embedding, rope, audio.shape[1])

    def velocity(self, audio: torch.Tensor, context: AudioContext) -> torch.Tensor:
        """Head: audio tokens (B, La, Ca) -> velocity (B, La, C) in float32."""
        scale, shift = self.norm_out(context.embedding)  # scale first, unlike Wan's head
        return self.proj_out(layer_norm(audio) * (1 + scale) + shift).float()

    def _check_audio(self, noisy_audio: torch.Tensor) -> None:
        channels, longest = self.config.in_channels, self.config.audio_seq_len
        if noisy_audio.shape[2] != channels or noisy_audio.shape[1] > longest:
            raise ValueError(
                f"noisy_audio has shape {tuple(noisy_audio.shape)}; it must be (B, L, {channels}) "
                f"with L at most audio_seq_len={longest}"
            )


def _projection(config: AudioDiTConfig, new_heads: int, new_std: float) -> nn.Linear:
    dim = config.hidden_dim
    if new_heads == 0:
        return nn.Linear(dim, dim)
    return ExpandedLinear(dim, new_heads * config.attention_head_dim, new_std)


def _gated_ffn(
    x: torch.Tensor, ffn: FeedForward, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    return x + gate * ffn(layer_norm(x) * (1 + scale) + shift)
