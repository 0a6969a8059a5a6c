"""Small layers shared by the two towers, named as in the pretrained checkpoints.

Each parameter is used only in the forward of the module that owns it, and each module initialises
itself: both are needed under DeepSpeed ZeRO-3, which partitions a module's parameters as soon as
its own __init__ returns and gathers them only around its own forward.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

DURATION_FREQUENCIES = 128  # fixed in TangoFlux


def timestep_sinusoid(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal features [cos, sin] of t (B,) in [0, 1] -> (B, dim) float32.

    Both towers were pretrained on 1000 * t. The angles reach 1000 rad and are computed in
    float64: bfloat16 would round them to steps of 4.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = 1000.0 * t.double()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def layer_norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """LayerNorm over the last axis without affine parameters, in the dtype of x."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


class Embedder(nn.Module):
    """Linear, activation, Linear: timestep and text embedders of both towers."""

    def __init__(self, in_dim: int, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.activation = activation
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class GeluProjection(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu(self.proj(x))


class FeedForward(nn.Module):
    """Linear, GELU(tanh), Linear, under the checkpoint names net.0.proj and net.2."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        # net.1 is a dropout of rate 0 in the released classes; it keeps the numbering.
        self.net = nn.Sequential(
            GeluProjection(dim, hidden_dim), nn.Identity(), nn.Linear(hidden_dim, dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Modulation(nn.Module):
    """Wan's learned table added to the timestep projection; alone in a module for ZeRO-3."""

    def __init__(self, num_vectors: int, dim: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(1, num_vectors, dim) / dim**0.5)

    def forward(self, projection: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """projection (B, num_vectors or 1, C) -> num_vectors tensors (B, 1, C) in float32."""
        vectors = self.scale_shift_table.float() + projection.float()  # (B, num_vectors, C)
        return vectors.split(1, dim=1)


class AdaModulation(nn.Module):
    """Flux's modulation: Linear(SiLU(timestep embedding)) -> num_vectors tensors (B, 1, C)."""

    def __init__(self, dim: int, num_vectors: int) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(dim, num_vectors * dim)

    def forward(self, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        vectors = self.linear(F.silu(embedding))  # (B, num_vectors * C)
        return vectors[:, None].chunk(self.num_vectors, dim=2)


class DurationEmbedder(nn.Module):
    """Clip length as one text token: TangoFlux's only signal of how long the sound is."""

    def __init__(self, dim: int, max_duration: float) -> None:
        super().__init__()
        self.max_duration = max_duration
        self.frequencies = DurationFrequencies()
        self.projection = nn.Linear(2 * DURATION_FREQUENCIES + 1, dim)

    def forward(self, duration: torch.Tensor) -> torch.Tensor:
        """duration (B,) in seconds, clamped to [0, max_duration] -> (B, 1, Da)."""
        fraction = duration.float().clamp(0, self.max_duration) / self.max_duration
        features = self.frequencies(fraction)  # (B, 257) float32
        return self.projection(features.to(self.projection.weight.dtype))[:, None]


class DurationFrequencies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(DURATION_FREQUENCIES))

    def forward(self, fraction: torch.Tensor) -> torch.Tensor:
        angles = 2 * math.pi * fraction[:, None] * self.weights.float()  # (B, 128)
        return torch.cat((fraction[:, None], angles.sin(), angles.cos()), dim=1)


class ExpandedLinear(nn.Linear):
    """A pretrained Linear (Ca -> Ca) with new output columns: h [W_a ; W_an] of Eq. 6.

    ``new_std`` 0 starts the new columns at zero. `new_weight` and `new_bias` are parameters of
    their own, so that `weight` and `bias` stay the pretrained tensors, bit for bit.
    """

    def __init__(self, dim: int, new_dim: int, new_std: float) -> None:
        super().__init__(dim, dim)
        # Drawn in float32 also under a bf16 `zero.Init`, so that every engine starts alike.
        self.new_weight = nn.Parameter(torch.randn(new_dim, dim) * new_std)
        self.new_bias = nn.Parameter(torch.zeros(new_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, L, Ca) -> (B, L, Ca + new_dim): pretrained heads first, then the new ones."""
        pretrained = F.linear(x, self.weight, self.bias)
        return torch.cat((pretrained, F.linear(x, self.new_weight, self.new_bias)), dim=-1)


class ExpandedOutput(nn.Linear):
    """An output projection with new rows: A_a [W_a^o ; W_an^o] of Eq. 9.

    The new rows (``new_dim`` > 0) act on the new heads' output. With ``new_std`` 0 they start at
    zero, so that at step 0 the new heads add nothing to the audio. No new bias. ``mute_new`` leaves
    them out of the forward: the self-check's way to see the pretrained projection alone.
    """

    def __init__(self, in_dim: int, out_dim: int, new_dim: int, new_std: float = 0.0) -> None:
        super().__init__(in_dim, out_dim)
        self.mute_new = False
        self.new_weight = _new_weight(out_dim, new_dim, new_std) if new_dim else None

    def add_new(self, output: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """output (B, L, Ca) plus the new heads' (B, L, new_dim) share of it."""
        if self.new_weight is None or self.mute_new:
            return output
        return output + F.linear(new, self.new_weight)


class HeadsOutput(ExpandedOutput):
    """Output projection of one stream of a double block: all its inputs are heads."""

    def forward(self, attended: torch.Tensor) -> torch.Tensor:
        """attended (B, L, Ca + new_dim) -> (B, L, Ca)."""
        dim = self.weight.shape[1]
        output = F.linear(attended[..., :dim], self.weight, self.bias)
        return self.add_new(output, attended[..., dim:])


class SingleOutput(ExpandedOutput):
    """TangoFlux's output projection over [attention | MLP]; new rows belong between the two."""

    def __init__(self, dim: int, hidden_dim: int, new_dim: int, new_std: float = 0.0) -> None:
        super().__init__(dim + hidden_dim, dim, new_dim, new_std)

    def forward(  # type: ignore[override]
        self, attended: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """attended (B, L, Ca + new_dim), hidden (B, L, hidden_dim) -> (B, L, Ca)."""
        dim = self.weight.shape[0]
        pretrained = torch.cat((attended[..., :dim], hidden), dim=-1)
        output = F.linear(pretrained, self.weight, self.bias)
        return self.add_new(output, attended[..., dim:])


def _new_weight(rows: int, columns: int, std: float) -> nn.Parameter:
    # Drawn in float32 also under a bf16 `zero.Init`: `normal_` in place would draw others there.
    return nn.Parameter(torch.randn(rows, columns) * std if std else torch.zeros(rows, columns))
