"""Flow matching: t, noising, velocity target and loss (Eq. 2, 3, 10), and keyed randomness.

x_t = (1 - t) x_0 + t eps, one t shared by both modalities, independent eps; target eps - x_0.
Every random number is a function of (stream, seed, epoch, sample id) and drawn on the CPU: the
same sample meets the same t and noise on any device, rank, world size and batch, in t2av and t2v.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

STREAMS = ("t", "video_noise", "audio_noise", "caption_drop", "audio_vae")
DENSITIES = ("uniform", "logit_normal")


@dataclass(frozen=True)
class FlowConfig:
    """Density of t before the shift, the shift, caption dropout, and the weights of Eq. 10."""

    density: str = "uniform"
    shift: float = 5.0
    caption_dropout: float = 0.1
    video_loss_weight: float = 1.0
    audio_loss_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.density not in DENSITIES:
            raise ValueError(f"flow.density={self.density!r} is unknown; use one of {DENSITIES}")
        if self.shift <= 0:
            raise ValueError(f"flow.shift={self.shift} must be above 0; 1 means no shift")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"flow.caption_dropout={self.caption_dropout} must be within [0, 1]")
        if min(self.video_loss_weight, self.audio_loss_weight) < 0:
            raise ValueError("flow.video_loss_weight and audio_loss_weight must not be negative")


def keyed_generator(
    device: torch.device | str, stream: str, seed: int, epoch: int, sample_id: str
) -> torch.Generator:
    """A generator that depends on nothing but its arguments; ``stream`` is one of STREAMS."""
    if stream not in STREAMS:
        raise ValueError(f"stream={stream!r} is unknown; use one of {STREAMS}")
    # JSON keeps the fields apart: ("1", "23") and ("12", "3") get different digests.
    key = json.dumps([stream, seed, epoch, sample_id]).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_normal(
    stream: str,
    seed: int,
    epoch: int,
    sample_ids: Sequence[str],
    shape: Sequence[int],
    device: torch.device | str,
) -> torch.Tensor:
    """Standard normal noise (B, *shape) in float32, one keyed draw per sample."""
    draws = [
        torch.randn(tuple(shape), generator=keyed_generator("cpu", stream, seed, epoch, sample_id))
        for sample_id in sample_ids
    ]
    return torch.stack(draws).to(device)


def keyed_uniform(stream: str, seed: int, epoch: int, sample_ids: Sequence[str]) -> torch.Tensor:
    """Uniform numbers in [0, 1), (B,) float64 on the CPU, one keyed draw per sample."""
    draws = [
        torch.rand(
            (), dtype=torch.float64, generator=keyed_generator("cpu", stream, seed, epoch, sample)
        )
        for sample in sample_ids
    ]
    return torch.stack(draws)


def sample_t(config: FlowConfig, u: torch.Tensor) -> torch.Tensor:
    """Map uniform u (B,) to t (B,) float32 in [0, 1]: density first, then the flow shift."""
    u = u.double()
    t = torch.sigmoid(torch.special.ndtri(u)) if config.density == "logit_normal" else u
    return shift_t(t, config.shift).float()


def shift_t(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Wan's flow shift s t / (1 + (s - 1) t); the sampler uses the same map."""
    return shift * t / (1 + (shift - 1) * t)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Eq. 2: x_t = (1 - t) x_0 + t eps for x0 and noise (B, ...), t (B,); float32."""
    t = t.to(x0.device, torch.float32).view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0.float() + t * noise.float()


def velocity_target(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Eq. 3: d x_t / dt = eps - x_0."""
    return noise.float() - x0.float()


def flow_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error (B,) averaged over the elements of each sample (Eq. 10 weighs modalities)."""
    return (velocity.float() - target.float()).square().flatten(1).mean(dim=1)
