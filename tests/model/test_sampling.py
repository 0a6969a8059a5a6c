"""The sampler: Wan's sigma grid, dual guidance, exact integration of a straight path."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from evaluation.samples import Preview, _sample
from model import AVFullDiT
from model.flow import FlowConfig, add_noise, shift_t
from model.sampling import Prompts, build_scheduler, sample
from tests.support.models import towers


@pytest.mark.parametrize("num_steps", [1, 10, 50])
def test_grid_is_shifted_exactly_once(num_steps):
    sigmas = build_scheduler(num_steps, 5.0).sigmas
    linear = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    expected = torch.cat((shift_t(linear, 5.0), torch.zeros(1))).float()
    torch.testing.assert_close(sigmas, expected, atol=1e-6, rtol=0)


def test_num_steps_must_be_positive():
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        build_scheduler(0, 5.0)


def test_straight_paths_are_integrated_exactly():
    """With the true velocity eps - x0, any number of steps lands on x0."""
    torch.manual_seed(0)
    video_x0, audio_x0 = torch.randn(2, 48, 3, 4, 6), torch.randn(2, 10, 6)
    video_noise, audio_noise = torch.randn_like(video_x0), torch.randn_like(audio_x0)

    def model(noisy_video, t, video_text, noisy_audio, **conditions):
        assert t.shape == (2,) and t.dtype == torch.float32
        return video_noise - video_x0, audio_noise - audio_x0

    prompts = Prompts(torch.zeros(2, 7, 32), torch.zeros(2, 5, 32), torch.ones(2, 5).bool())
    steps = []
    video, audio = sample(
        model, prompts, prompts, video_noise, audio_noise, torch.ones(2), num_steps=7,
        on_step=lambda done, total: steps.append((done, total)),
    )
    torch.testing.assert_close(video, video_x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(audio, audio_x0, atol=1e-5, rtol=0)
    assert steps == [(step, 7) for step in range(1, 8)]


def test_equals_diffusers_scheduler_with_each_scale_of_its_own():
    """The released scheduler's own step() on our model's velocities, both passes joint."""
    torch.manual_seed(0)
    model = towers.fill(AVFullDiT(towers.CONFIG), *towers.build_released())
    inputs = towers.joint_inputs()
    video, audio, duration = inputs["noisy_video"], inputs["noisy_audio"], inputs["duration"]
    positive = Prompts(inputs["video_text"], inputs["audio_text"], inputs["audio_text_mask"])
    negative = Prompts(*(torch.randn_like(text) for text in positive[:2]), positive[2])
    result = sample(model, positive, negative, video, audio, duration, num_steps=3, shift=5.0,
                    guidance_video=5.0, guidance_audio=4.5)
    schedulers = [FlowMatchEulerDiscreteScheduler(shift=5.0) for _ in range(2)]
    for scheduler in schedulers:
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
    for step in schedulers[0].timesteps:
        t = (step / 1000).expand(2)
        with torch.no_grad():
            cond = model(video, t, positive[0], audio, *positive[1:], duration)
            uncond = model(video, t, negative[0], audio, *negative[1:], duration)
        video_velocity = uncond[0] + 5.0 * (cond[0] - uncond[0])
        audio_velocity = uncond[1] + 4.5 * (cond[1] - uncond[1])
        video = schedulers[0].step(video_velocity, step, video, return_dict=False)[0]
        audio = schedulers[1].step(audio_velocity, step, audio, return_dict=False)[0]
    for ours, expected in zip(result, (video, audio), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_t2v_samples_video_alone():
    model = AVFullDiT(towers.T2V)
    inputs = towers.video_inputs()
    prompts = Prompts(inputs["video_text"])
    video, audio = sample(model, prompts, prompts, inputs["noisy_video"], num_steps=2)
    assert audio is None and video.shape == inputs["noisy_video"].shape and video.isfinite().all()


def test_a_shifted_audio_t_is_followed():
    """An exact velocity field at each modality's own t integrates to its data."""
    torch.manual_seed(0)
    video_x0, audio_x0 = torch.randn(1, 4, 1, 2, 2), torch.randn(1, 5, 3)
    video_noise, audio_noise = torch.randn_like(video_x0), torch.randn_like(audio_x0)
    seen = []

    def model(video, t, text, noisy_audio, audio_t, **others):
        seen.append((t.item(), audio_t.item()))
        torch.testing.assert_close(noisy_audio, add_noise(audio_x0, audio_noise, audio_t))
        return video_noise - video_x0, audio_noise - audio_x0

    prompts = Prompts(torch.zeros(1, 7, 32), torch.zeros(1, 5, 32), torch.ones(1, 5).bool())
    video, audio = sample(model, prompts, prompts, video_noise, audio_noise, torch.ones(1),
                          num_steps=4, audio_t=lambda t: t.square())
    torch.testing.assert_close(video, video_x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(audio, audio_x0, atol=1e-5, rtol=0)
    assert all(abs(own - t * t) < 1e-6 for t, own in seen) and len(seen) == 8


@pytest.mark.parametrize(("negative_prompts", "kind"), [(True, "negative"), (False, "empty")])
def test_samples_are_guided_away_from_the_prompts_that_were_asked_for(negative_prompts, kind):
    states = {"video_empty": torch.ones(1, 3), "video_negative": torch.full((2, 3), 2.0),
              "audio_empty": torch.ones(4, 3), "audio_negative": torch.full((4, 3), 2.0),
              "audio_empty_mask": torch.eye(4)[0].bool(),
              "audio_negative_mask": torch.eye(4)[1].bool()}
    asked = SimpleNamespace(
        video_latents=torch.zeros(1, 2, 1, 2, 2), audio_mean=torch.zeros(1, 5, 2),
        padded_video_text=torch.zeros(1, 4, 3), audio_text=torch.zeros(1, 4, 3),
        audio_text_mask=torch.ones(1, 4, dtype=torch.bool), duration=torch.ones(1))
    preview = Preview(Path(), None, "", "", states, FlowConfig(), 0, 1, 1, 5.0, 4.5,
                      negative_prompts)
    seen = []

    def model(video, t, text, noisy_audio, audio_text, audio_text_mask, duration):
        seen.append((text, audio_text, audio_text_mask))
        return video, noisy_audio

    _sample(preview, model, torch.device("cpu"), asked, 0, (5.0, 4.5))
    (text, audio_text, mask), (other, other_audio, other_mask) = seen
    assert not text.any() and not audio_text.any() and mask.all()
    rows = states[f"video_{kind}"]
    assert torch.equal(other[0, : len(rows)], rows) and not other[0, len(rows):].any()
    assert torch.equal(other_audio[0], states[f"audio_{kind}"])
    assert torch.equal(other_mask[0], states[f"audio_{kind}_mask"])
