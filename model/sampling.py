"""Joint sampling with dual guidance: noise in, latents out.

One shared sigma schedule serves both modalities, because training shares t. Each step runs a
positive pass with both prompts and a negative pass with both negative prompts, and guides each
modality with its own scale. Latents are those of training (video normalised); the frozen decoders
are the caller's. Called by tools/sample.py with a bare model, or with an engine that shards it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class Prompts(NamedTuple):
    """Encoded captions of a batch, as the model's forward takes them; t2v needs the first alone."""

    video_text: torch.Tensor  # (B, Nt, Dt) zero padded
    audio_text: torch.Tensor | None = None  # (B, 64, Da)
    audio_text_mask: torch.Tensor | None = None  # (B, 64) True on real tokens


def build_scheduler(num_steps: int, shift: float) -> Any:  # diffusers' classes are untyped
    """Euler scheduler on Wan's grid: linspace(1, 1/N, N), shifted exactly once."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1; the paper uses 50")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    # Without explicit sigmas set_timesteps(N) starts from already shifted ones and shifts twice.
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps))
    return scheduler


@torch.no_grad()
def sample(
    model: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    positive: Prompts,
    negative: Prompts,
    video_noise: torch.Tensor,
    audio_noise: torch.Tensor | None = None,
    duration: torch.Tensor | None = None,
    num_steps: int = 50,
    shift: float = 5.0,
    guidance_video: float = 5.0,
    guidance_audio: float = 4.5,
    audio_t: Callable[[torch.Tensor], torch.Tensor] | None = None,
    on_step: Callable[[int, int], Any] = lambda step, num_steps: None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Integrate the velocity from noise (t = 1) to latents (t = 0) with Euler steps.

    ``model`` has the signature of AVFullDiT.forward. video_noise (B, C, T, H, W), and for t2av
    audio_noise (B, L, C) and duration (B,) seconds; without audio_noise the model is run as t2v.
    Returns normalised video latents and audio latents (or None), float32. ``on_step(done, total)``
    reports progress. Guidance is uncond + scale * (cond - uncond), per modality. ``audio_t`` maps
    video's t (N,) to audio's where training shifted it (`flow.shifted_audio_t`); None shares t.
    """
    device = video_noise.device
    scheduler = build_scheduler(num_steps, shift)
    sigmas = scheduler.sigmas.to(device, torch.float32)  # (N + 1), from 1 to 0
    audio_sigmas = sigmas if audio_t is None else audio_t(sigmas)
    video, audio = video_noise.float(), None if audio_noise is None else audio_noise.float()
    for step in range(num_steps):
        t = sigmas[step].expand(video.shape[0])  # (B,)
        # None, not an equal copy, keeps the call that every model of this signature takes.
        own = None if audio_t is None else audio_sigmas[step].expand(video.shape[0])
        video_cond, audio_cond = _velocities(model, video, audio, t, own, positive, duration)
        video_uncond, audio_uncond = _velocities(model, video, audio, t, own, negative, duration)
        delta = sigmas[step + 1] - sigmas[step]
        video = video + delta * _guide(video_cond, video_uncond, guidance_video)
        if audio is not None:
            assert audio_cond is not None and audio_uncond is not None
            audio_delta = audio_sigmas[step + 1] - audio_sigmas[step]
            audio = audio + audio_delta * _guide(audio_cond, audio_uncond, guidance_audio)
        on_step(step + 1, num_steps)
    return video, audio


def _velocities(
    model: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    video: torch.Tensor,
    audio: torch.Tensor | None,
    t: torch.Tensor,
    audio_t: torch.Tensor | None,
    prompts: Prompts,
    duration: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if audio is None:
        return model(video, t, prompts.video_text)
    own_t = {} if audio_t is None else {"audio_t": audio_t}
    return model(
        video, t, prompts.video_text, **own_t, noisy_audio=audio, audio_text=prompts.audio_text,
        audio_text_mask=prompts.audio_text_mask, duration=duration,
    )


def _guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    return uncond + scale * (cond - uncond)
