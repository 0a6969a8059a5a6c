"""Rotary positions: three-axis video RoPE and AVSyncRoPE for audio (Eq. 11-12).

Both pretrained towers rotate interleaved pairs (x[2i], x[2i+1]) with theta 10000; they differ only
in how the frequencies are laid out inside a head. Tables are computed in float64, kept in float32
and cached per shape and device. They are no buffers, because `deepspeed.zero.Init` turns float32
buffers into bfloat16. Called by the forward of the towers and of the joint model.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

THETA = 10000.0


class Rope(NamedTuple):
    """Rotation of every position and channel pair; the same for all heads, or one per head."""

    cos: torch.Tensor  # (L, D/2) or (L, H, D/2) float32
    sin: torch.Tensor  # alike


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate the interleaved channel pairs of x (B, L, H, D) in float32; returns x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # 2 x (B, L, H, D/2)
    cos, sin = (t if t.dim() == 3 else t[:, None] for t in rope)  # (L, 1 or H, D/2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)  # (B, L, H, D)


def video_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of one head given to time, height and width, as Wan splits them."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


@lru_cache(maxsize=32)
def video_rope(
    frames: int, height: int, width: int, head_dim: int, device: torch.device,
    time_scale: float = 1.0,
) -> Rope:
    """Table for frames x height x width tokens, frame-major, at integer positions from 0.

    ``time_scale`` multiplies the time index: tau under rope=expand_video.
    """
    grid = torch.meshgrid(
        *(_positions(size) for size in (frames, height, width)), indexing="ij"
    )  # 3 x (F, H, W)
    scaled = (grid[0] * time_scale, *grid[1:])
    angles = [_angles(axis.flatten(), dim) for axis, dim in zip(scaled, video_axes(head_dim),
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
    return _table(_native(_stream_positions(num_audio, num_text, tau), axes), device)


@lru_cache(maxsize=32)
def joint_audio_rope(
    num_audio: int, num_text: int, axes: tuple[int, ...], tau: float, device: torch.device,
    layout: str, heads: int, new_heads: int,
) -> Rope:
    """Table for the audio stream inside AVFull-Attention of ``heads`` + ``new_heads`` heads.

    ``layout`` "native" is `audio_rope`. "wan" rotates by Wan's time channels and leaves
    its height and width channels alone, so that Eq. 12 holds on every channel. "hybrid" does
    so on the new heads and leaves the pretrained heads their own frequencies.
    """
    positions = _stream_positions(num_audio, num_text, tau)
    if layout == "native":
        return _table(_native(positions, axes), device)
    wan = _wan_time(positions, sum(axes))  # (L, D/2)
    if layout == "wan":
        return _table(wan, device)
    per_head = [_native(positions, axes)] * heads + [wan] * new_heads
    return _table(torch.stack(per_head, dim=1), device)  # (L, H, D/2)


@lru_cache(maxsize=32)
def fusion_ropes(
    grid: tuple[int, int, int], num_audio: int, num_text: int, axes: tuple[int, ...],
    time_scale: float, tau: float, device: torch.device, layout: str,
) -> tuple[Rope, Rope]:
    """Time-only tables of video tokens and of [audio | text] for cross-attention between them.

    Queries and keys come from different streams, so both use one layout: TangoFlux's ("native")
    or Wan's time channels ("wan"). Only the time of a video token counts, not its place.
    """
    frames, height, width = grid
    video = (_positions(frames) * time_scale).repeat_interleave(height * width)  # (Nv)
    stream = _stream_positions(num_audio, num_text, tau)
    if layout == "native":
        return _table(_native(video, axes), device), _table(_native(stream, axes), device)
    head_dim = sum(axes)
    return _table(_wan_time(video, head_dim), device), _table(_wan_time(stream, head_dim), device)


def _stream_positions(num_audio: int, num_text: int, tau: float) -> torch.Tensor:
    return torch.cat((_positions(num_audio) / tau, 0 * _positions(num_text)))  # (La + Lt)


def _native(positions: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([_angles(positions, dim) for dim in axes], dim=1)  # (L, D/2)


def _wan_time(positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    time = _angles(positions, video_axes(head_dim)[0])
    still = time.new_zeros(len(positions), head_dim // 2 - time.shape[1])
    return torch.cat((time, still), dim=1)  # (L, D/2)


def _positions(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float64, device="cpu")


def _angles(positions: torch.Tensor, dim: int) -> torch.Tensor:
    frequencies = THETA ** (-_positions(dim // 2) * 2 / dim)
    return torch.outer(positions, frequencies)  # (L, dim/2) float64


def _table(angles: torch.Tensor, device: torch.device) -> Rope:
    # A table first needed under inference_mode must stay usable by a later training step.
    with torch.inference_mode(False):
        return Rope(angles.cos().float().to(device), angles.sin().float().to(device))
