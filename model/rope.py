"""Rotary positions: three-axis video RoPE and AVSyncRoPE for audio (Eq. 11-12).

Both pretrained towers rotate interleaved pairs (x[2i], x[2i+1]) with theta 10000; they differ only
in how the frequencies are laid out inside a head. Tables are computed in float64, kept in float32
and cached per shape and device. They are no buffers, because `deepspeed.zero.Init` turns float32
buffers into bfloat16. Called by the forward of the towers.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

THETA = 10000.0


class Rope(NamedTuple):
    """Rotation of every position and channel pair; the same for all heads."""

    cos: torch.Tensor  # (L, D/2) float32
    sin: torch.Tensor  # (L, D/2) float32


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate the interleaved channel pairs of x (B, L, H, D) in float32; returns x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # 2 x (B, L, H, D/2)
    cos, sin = rope.cos[:, None], rope.sin[:, None]  # (L, 1, D/2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)  # (B, L, H, D)


def video_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of one head given to time, height and width, as Wan splits them."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


@lru_cache(maxsize=32)
def video_rope(frames: int, height: int, width: int, head_dim: int, device: torch.device) -> Rope:
    """Table for frames x height x width tokens, frame-major, at integer positions from 0."""
    grid = torch.meshgrid(
        *(_positions(size) for size in (frames, height, width)), indexing="ij"
    )  # 3 x (F, H, W)
    angles = [_angles(axis.flatten(), dim) for axis, dim in zip(grid, video_axes(head_dim),
                                                                strict=True)]
    return _table(torch.cat(angles, dim=1), device)


@lru_cache(maxsize=32)
def audio_rope(
    num_audio: int, num_text: int, axes: tuple[int, ...], tau: float, device: torch.device
) -> Rope:
    """Table for the audio stream [audio | text] with AVSyncRoPE.

    Eq. 12: the audio index is divided by tau, so equal time means equal position. TangoFlux uses
    the same index on all ``axes`` of a head. Text and duration tokens sit at 0: no rotation.
    """
    positions = torch.cat((_positions(num_audio) / tau, 0 * _positions(num_text)))  # (La + Lt)
    return _table(torch.cat([_angles(positions, dim) for dim in axes], dim=1), device)


def _positions(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float64, device="cpu")


def _angles(positions: torch.Tensor, dim: int) -> torch.Tensor:
    frequencies = THETA ** (-_positions(dim // 2) * 2 / dim)
    return torch.outer(positions, frequencies)  # (L, dim/2) float64


def _table(angles: torch.Tensor, device: torch.device) -> Rope:
    # A table first needed under inference_mode must stay usable by a later training step.
    with torch.inference_mode(False):
        return Rope(angles.cos().float().to(device), angles.sin().float().to(device))
