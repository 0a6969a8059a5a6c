"""Flow matching: t, noising, velocity target and loss (Eq. 2, 3, 10), and keyed randomness.

x_t = (1 - t) x_0 + t eps, independent eps; target eps - x_0. Both modalities share one t, unless
audio_t says otherwise.
Every random number is a function of (stream, seed, epoch, sample id) and drawn on the CPU: the
same sample has the same t and noise on any device, rank, world size and batch, in t2av and t2v.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

STREAMS = ("t", "audio_t", "video_noise", "audio_noise", "caption_drop", "audio_vae")
DENSITIES = ("uniform", "logit_normal")
AUDIO_T = ("shared", "shifted", "independent")


@dataclass(frozen=True)
class FlowConfig:
    """Density of t, caption dropout, and the weights of Eq. 10."""

    density: Annotated[str, "Of t before the shift: uniform or logit_normal."] = "uniform"
    shift: Annotated[
        float, "Flow shift of t, in training and in the sampler; above 0, 1: none."] = 5.0
    caption_dropout: Annotated[float, "Share of samples that train without captions; 0 to 1."] = 0.1
    video_loss_weight: Annotated[float, "Weight of the video's loss (Eq. 10); at least 0."] = 1.0
    audio_loss_weight: Annotated[float, "Weight of the audio's loss (Eq. 10); at least 0."] = 1.0
    audio_t: Annotated[
        str, "The audio's t: shared, the paper's one t; shifted, the same quantile of "
        "audio_density and audio_shift, which the sampler follows; independent, a random stream."
    ] = "shared"
    audio_density: Annotated[str, "As density, for the audio's own t."] = "uniform"
    audio_shift: Annotated[float, "As shift, for the audio's own t."] = 5.0

    def __post_init__(self) -> None:
        for name, known in (
            ("density", DENSITIES), ("audio_density", DENSITIES), ("audio_t", AUDIO_T),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"flow.{name}={getattr(self, name)!r} is unknown; use {known}")
        for name in ("shift", "audio_shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"flow.{name}={getattr(self, name)} must be above 0; 1 means no shift"
                )
        for name in ("audio_density", "audio_shift"):
            if self.audio_t == "shared" and getattr(self, name) != getattr(FlowConfig, name):
                raise ValueError(
                    f"flow.{name}={getattr(self, name)} has no effect with flow.audio_t=shared; "
                    "use audio_t=shifted or independent, or remove the key"
                )
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"flow.caption_dropout={self.caption_dropout} must be within [0, 1]")
        if not all(0 <= weight < math.inf for weight in
                   (self.video_loss_weight, self.audio_loss_weight)):
            raise ValueError("flow.video_loss_weight and audio_loss_weight must be finite and not "
                             "negative")


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
    return _from_quantile(u.double(), config.density, config.shift).float()


def sample_audio_t(config: FlowConfig, u: torch.Tensor) -> torch.Tensor:
    """`sample_t` with the audio's own density and shift."""
    return _from_quantile(u.double(), config.audio_density, config.audio_shift).float()


def shifted_audio_t(config: FlowConfig, t: torch.Tensor) -> torch.Tensor:
    """The audio's t (B,) at the quantile that ``t`` (B,) has among the video's."""
    t = shift_t(t.double(), 1 / config.shift).clamp(0, 1)  # rounding may step past 1
    u = torch.special.ndtr(torch.logit(t)) if config.density == "logit_normal" else t
    return sample_audio_t(config, u)


def _from_quantile(u: torch.Tensor, density: str, shift: float) -> torch.Tensor:
    t = torch.sigmoid(torch.special.ndtri(u)) if density == "logit_normal" else u
    return shift_t(t, shift)


def shift_t(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Wan's flow shift s t / (1 + (s - 1) t), undone by 1 / s; the sampler uses the same map."""
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
