"""The video tower, in the exact structure of Wan2.2-TI2V-5B (diffusers WanTransformer3DModel).

Parameter names equal the checkpoint's, except that every `scale_shift_table` lives in a small
`modulation` module. A block is split at its self-attention, so that a joint block can put
AVFull-Attention between the two halves and leave cross-attention and FFN unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from common.strict_config import strict_config
from model.towers.attention import QKV, Attention
from model.towers.layers import Embedder, FeedForward, Modulation, layer_norm, timestep_sinusoid
from model.towers.rope import Rope, rotate, video_rope


@dataclass(frozen=True)
class VideoDiTConfig:
    """Field names of diffusers' WanTransformer3DModel; defaults are Wan2.2-TI2V-5B."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    in_channels: int = 48
    out_channels: int = 48
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 14336
    num_layers: int = 30
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    @property
    def hidden_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model.video") -> "VideoDiTConfig":
        return strict_config(cls, values, where)

    def __post_init__(self) -> None:
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise ValueError(
                f"video.attention_head_dim={self.attention_head_dim}: RoPE needs an even number "
                "of at least 6"
            )


class VideoContext(NamedTuple):
    """What every block of one forward shares."""

    time: torch.Tensor  # (B, C) timestep embedding, for the head
    modulation: torch.Tensor  # (B, 6, C) its projection, for the blocks
    text: torch.Tensor  # (B, rows, C): the caption's distinct rows, one padding row last
    num_text: int  # keys of cross-attention; the last row stands for all beyond it
    rope: Rope
    grid: tuple[int, int, int]  # tokens per axis: frames, height, width


class VideoAttention(nn.Module):
    """Wan's attention: RMSNorm over the full width of q and k, before the head split."""

    def __init__(self, config: VideoDiTConfig, attend: Attention) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.head_dim = config.attention_head_dim
        self.attend = attend
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))  # checkpoint name to_out.0
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)

    def forward(self, x: torch.Tensor, text: torch.Tensor, num_text: int) -> torch.Tensor:
        """Cross-attention of x (B, L, C) to ``num_text`` rows, zero-padded ones included.

        text (B, rows, C) holds the distinct rows; its last one is repeated up to ``num_text``
        only after k and v were computed. The padding is attended as pretrained, not dropped.
        """
        query, key, value = self.project(x, text)
        key, value = _repeat_last(key, num_text), _repeat_last(value, num_text)
        return self.output(self.attend(query, key, value))

    def project(self, x: torch.Tensor, source: torch.Tensor) -> QKV:
        """Queries from x, keys and values from ``source``; heads are split head-major."""
        query, key = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(source))
        heads = (-1, self.head_dim)
        return QKV(
            query.unflatten(2, heads), key.unflatten(2, heads),
            self.to_v(source).unflatten(2, heads),
        )  # (B, L, H, D)

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        return self.to_out(attended.flatten(2))  # (B, L, H, D) -> (B, L, C)


class VideoBlock(nn.Module):
    """Self-attention, cross-attention to the video caption, FFN. Residual math is float32."""

    def __init__(self, config: VideoDiTConfig, attend: Attention) -> None:
        super().__init__()
        self.eps = config.eps
        self.attend = attend
        self.modulation = Modulation(6, config.hidden_dim)
        self.attn1 = VideoAttention(config, attend)
        self.norm2 = nn.LayerNorm(config.hidden_dim, eps=config.eps)
        self.attn2 = VideoAttention(config, attend)
        self.ffn = FeedForward(config.hidden_dim, config.ffn_dim)

    def forward(self, tokens: torch.Tensor, context: VideoContext) -> torch.Tensor:
        """Unimodal block: tokens (B, Nv, C) -> (B, Nv, C)."""
        qkv, modulation = self.before_attention(tokens, context)
        tokens = self.add_attention(tokens, self.attend(*qkv), modulation)
        return self.feed(tokens, modulation, context)

    def before_attention(
        self, tokens: torch.Tensor, context: VideoContext
    ) -> tuple[QKV, tuple[torch.Tensor, ...]]:
        """Rotated q, k, v (B, Nv, H, D) and the six modulation vectors (B, 1, C)."""
        modulation = self.modulation(context.modulation)
        shift, scale = modulation[:2]
        normed = self._norm(tokens, shift, scale)
        qkv = self.attn1.project(normed, normed)
        return QKV(rotate(qkv.query, context.rope), rotate(qkv.key, context.rope),
                   qkv.value), modulation

    def add_attention(
        self, tokens: torch.Tensor, attended: torch.Tensor, modulation: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """attended (B, Nv, H, D) -> tokens (B, Nv, C)."""
        return (tokens.float() + self.attn1.output(attended) * modulation[2]).to(tokens.dtype)

    def feed(
        self, tokens: torch.Tensor, modulation: tuple[torch.Tensor, ...], context: VideoContext
    ) -> torch.Tensor:
        """Cross-attention to the caption, then FFN: tokens (B, Nv, C) -> the same."""
        shift, scale, gate = modulation[3:]
        dtype = tokens.dtype
        # norm2 computes in float32 inside for bfloat16 input too; cross-attention has no gate.
        tokens = tokens + self.attn2(self.norm2(tokens), context.text, context.num_text)
        hidden = self.ffn(self._norm(tokens, shift, scale))
        return (tokens.float() + hidden.float() * gate).to(dtype)

    def _norm(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (layer_norm(x.float(), self.eps) * (1 + scale) + shift).to(x.dtype)


class VideoConditionEmbedder(nn.Module):
    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.freq_dim = config.freq_dim
        self.time_embedder = Embedder(config.freq_dim, dim, nn.SiLU())
        self.time_act = nn.SiLU()
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = Embedder(config.text_dim, dim, nn.GELU(approximate="tanh"))

    def forward(
        self, t: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """t (B,), text (B, Nt, Dt) -> time (B, C), modulation (B, 6, C), text (B, Nt, C)."""
        time = self.time_embedder(timestep_sinusoid(t, self.freq_dim).to(text.dtype))
        modulation = self.time_proj(self.time_act(time)).unflatten(1, (6, -1))
        return time, modulation, self.text_embedder(text)


class VideoDiT(nn.Module):
    """Embeddings, ``num_blocks`` unimodal blocks and head of the video tower."""

    def __init__(self, config: VideoDiTConfig, num_blocks: int, attend: Attention) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.hidden_dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=patch, stride=patch)
        self.condition_embedder = VideoConditionEmbedder(config)
        self.blocks = nn.ModuleList(VideoBlock(config, attend) for _ in range(num_blocks))
        self.modulation = Modulation(2, dim)
        self.proj_out = nn.Linear(dim, config.out_channels * patch[0] * patch[1] * patch[2])

    def embed(
        self,
        noisy_video: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        text_length: int | None = None,
        time_scale: float = 1.0,
    ) -> tuple[torch.Tensor, VideoContext]:
        """Latents (B, C, T, H, W), t (B,), text (B, rows, Dt) -> tokens (B, Nv, Cv), context.

        ``text_length`` is how many rows of text there are with those left out, which equal the
        last one (zero padding). ``time_scale`` multiplies the time index of RoPE.
        """
        grid = self._token_grid(noisy_video)
        dtype = self.patch_embedding.weight.dtype
        tokens = self.patch_embedding(noisy_video.to(dtype))  # (B, C, F, H, W)
        tokens = tokens.permute(0, 2, 3, 4, 1).flatten(1, 3)  # (B, Nv, C), frame-major
        time, modulation, rows = self.condition_embedder(t, text.to(dtype))
        rope = video_rope(*grid, self.config.attention_head_dim, tokens.device, time_scale)
        return tokens, VideoContext(
            time, modulation, rows, text_length or text.shape[1], rope, grid
        )

    def velocity(self, tokens: torch.Tensor, context: VideoContext) -> torch.Tensor:
        """Head: tokens (B, Nv, Cv) -> velocity (B, C, T, H, W) in float32."""
        shift, scale = self.modulation(context.time[:, None])  # shift first, unlike Flux's head
        normed = layer_norm(tokens.float(), self.config.eps) * (1 + scale) + shift
        patches = self.proj_out(normed.to(tokens.dtype)).float()
        # Out of a token come (pt, ph, pw, C), channels fastest.
        patches = patches.unflatten(2, (*self.config.patch_size, -1)).unflatten(1, context.grid)
        video = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, F, pt, H, ph, W, pw)
        return video.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # (B, C, T, H, W)

    def _token_grid(self, noisy_video: torch.Tensor) -> tuple[int, int, int]:
        channels, *sizes = noisy_video.shape[1:]
        patch, longest = self.config.patch_size, self.config.rope_max_seq_len
        if channels != self.config.in_channels or any(
            size % p or size // p > longest for size, p in zip(sizes, patch, strict=True)
        ):
            raise ValueError(
                f"noisy_video has shape {tuple(noisy_video.shape)}; it must be (B, "
                f"{self.config.in_channels}, T, H, W) with T, H, W divisible by {patch} and at "
                f"most rope_max_seq_len={longest} tokens on each axis"
            )
        frames, height, width = (size // p for size, p in zip(sizes, patch, strict=True))
        return frames, height, width


def _repeat_last(x: torch.Tensor, length: int) -> torch.Tensor:
    """(B, rows, H, D) -> (B, length, H, D) with the last row in every place beyond the rows."""
    beyond = length - x.shape[1]
    return x if not beyond else torch.cat((x, x[:, -1:].expand(-1, beyond, -1, -1)), dim=1)
