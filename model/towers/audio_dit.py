"""The audio tower, in the exact structure of TangoFlux (Flux blocks plus duration token and fc).

TangoFlux has no cross-attention: its caption enters as text tokens inside self-attention. Both
kinds of block run on one stream, which we order [audio | text] (the checkpoint's order is text
first; attention does not care).
"""

import torch
from torch import nn

from model.towers.attention import Attention
from model.towers.audio_blocks import (
    AudioContext,
    AudioDiTConfig,
    AudioDoubleBlock,
    AudioSingleBlock,
)
from model.towers.layers import (
    AdaModulation,
    DurationEmbedder,
    Embedder,
    layer_norm,
    timestep_sinusoid,
)
from model.towers.rope import audio_rope

SINUSOID_DIM = 256  # fixed in diffusers' Flux classes


class TimeTextEmbedder(nn.Module):
    def __init__(self, config: AudioDiTConfig) -> None:
        super().__init__()
        self.timestep_embedder = Embedder(SINUSOID_DIM, config.hidden_dim, nn.SiLU())
        self.text_embedder = Embedder(config.pooled_projection_dim, config.hidden_dim, nn.SiLU())

    def forward(self, t: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        sinusoid = timestep_sinusoid(t, SINUSOID_DIM).to(pooled.dtype)
        return self.timestep_embedder(sinusoid) + self.text_embedder(pooled)  # (B, Ca)


class AudioDiT(nn.Module):
    """Embeddings, the unimodal ones of its double and single blocks, and head."""

    def __init__(
        self,
        config: AudioDiTConfig,
        num_double_blocks: int,
        num_single_blocks: int,
        attend: Attention,
    ) -> None:
        super().__init__()
        self.config = config
        dim, text_dim = config.hidden_dim, config.joint_attention_dim
        self.fc = nn.Sequential(nn.Linear(text_dim, config.pooled_projection_dim), nn.ReLU())
        self.duration_embedder = DurationEmbedder(text_dim, config.max_duration)
        self.time_text_embed = TimeTextEmbedder(config)
        self.context_embedder = nn.Linear(text_dim, dim)
        self.x_embedder = nn.Linear(config.in_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            AudioDoubleBlock(config, attend) for _ in range(num_double_blocks)
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
    ) -> tuple[torch.Tensor, AudioContext]:
        """The stream [audio | text] (B, La + Nt + 1, Ca) and the context.

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
        sizes = audio.shape[1], text_tokens.shape[1]
        rope = audio_rope(*sizes, self.config.axes_dims_rope, tau, audio.device)
        return torch.cat((audio, text_tokens), dim=1), AudioContext(embedding, rope, *sizes)

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
