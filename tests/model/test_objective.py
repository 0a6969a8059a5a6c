"""The objective: audio's own t, and captions on their distinct rows."""

import pytest
import torch

from model import AVFullDiT
from model.flow import FlowConfig, add_noise, keyed_normal
from model.objective import VALIDATION_EPOCH, Batch, Objective
from tests.support.models import tiny, towers

IDS = ["a", "b"]
CPU = torch.device("cpu")


@pytest.fixture
def batch():
    torch.manual_seed(0)
    text = torch.zeros(2, 64, tiny.WIDTH)
    text[0, :9], text[1, :5] = torch.randn(9, tiny.WIDTH), torch.randn(5, tiny.WIDTH)
    return Batch(
        torch.randn(2, 48, 3, 4, 6), torch.randn(2, 10, 6), torch.zeros(2, 10, 6),
        torch.ones(2, dtype=torch.bool), torch.ones(2), text,
        torch.randn(2, 5, tiny.WIDTH), torch.ones(2, 5, dtype=torch.bool), torch.ones(2), IDS,
    )


def objective(task="t2av", **flow):
    return Objective(task, 0, FlowConfig(**flow))


def test_one_t_is_shared_by_default(batch):
    ours = objective()
    t = ours.draw_t(IDS, 0)
    assert torch.equal(ours.noise(batch, t, 0, CPU).inputs["audio_t"], t)


@pytest.mark.parametrize("mode", ["shifted", "independent"])
def test_audio_is_noised_at_its_own_t(batch, mode):
    ours = objective(audio_t=mode, audio_shift=1.0)
    t = ours.draw_t(IDS, 0)
    assert torch.equal(t, objective().draw_t(IDS, 0))  # the video's t is that of its twin
    inputs = ours.noise(batch, t, 0, CPU).inputs
    audio_t = inputs["audio_t"]
    assert (audio_t < t).all() if mode == "shifted" else not torch.allclose(audio_t, t)
    noise = keyed_normal("audio_noise", 0, 0, IDS, (10, 6), "cpu")
    assert torch.equal(inputs["noisy_audio"], add_noise(batch.audio_mean, noise, audio_t))
    assert torch.equal(inputs["t"], t)


def test_independent_t_depends_on_the_sample_alone(batch):
    ours = objective(audio_t="independent")
    t = ours.draw_t(IDS, 3)
    one = ours.audio_t(t[1:], IDS[1:], 3)
    assert torch.equal(one, ours.audio_t(t, IDS, 3)[1:])
    assert not torch.equal(one, ours.audio_t(t[1:], IDS[1:], 4))
    assert torch.equal(ours.audio_t(t, IDS, VALIDATION_EPOCH), t)  # the validation grid is one t


def test_validation_noise_is_that_of_every_run_and_training_noise_is_the_runs_own(batch):
    ours, other = objective(), Objective("t2av", 7, FlowConfig())
    t = torch.full((2,), 0.5)
    for epoch, same in ((VALIDATION_EPOCH, True), (0, False)):
        a, b = (one.noise(batch, t, epoch, CPU).inputs for one in (ours, other))
        for name in ("noisy_video", "noisy_audio"):
            assert torch.equal(a[name], b[name]) == same, (name, epoch)


@torch.no_grad()
def test_audio_t_reaches_the_audio_tower_alone(batch):
    model = towers.randomise_new(AVFullDiT(towers.CONFIG))
    inputs = objective().noise(batch, torch.tensor([0.3, 0.6]), 0, CPU).inputs
    shared = model(**inputs, cross_modal=False)
    own = model(**inputs | {"audio_t": torch.tensor([0.9, 0.1])}, cross_modal=False)
    assert torch.equal(shared[0], own[0]) and not torch.allclose(shared[1], own[1])


def test_t2v_meets_no_audio(batch):
    inputs = objective("t2v").noise(batch, torch.tensor([0.3, 0.6]), 0, CPU).inputs
    assert inputs.keys() == {"noisy_video", "t", "video_text", "video_text_length"}


def test_text_on_its_distinct_rows_equals_the_plain_path(batch):
    """Outputs and every gradient; the padding is computed once, not cut."""
    results = []
    for rows in (64, 32, 10):
        torch.manual_seed(1)
        model = towers.randomise_new(AVFullDiT(towers.CONFIG))
        trimmed = batch._replace(video_text=batch.video_text[:, :rows], video_text_length=64)
        assert torch.equal(trimmed.padded_video_text, batch.padded_video_text)
        outputs = model(**objective().noise(trimmed, torch.tensor([0.3, 0.6]), 0, CPU).inputs)
        sum(out.square().mean() for out in outputs).backward()
        results.append([*outputs, *(parameter.grad for parameter in model.parameters())])
    for other in results[1:]:
        for plain, distinct in zip(results[0], other, strict=True):
            torch.testing.assert_close(distinct, plain, atol=1e-6, rtol=1e-4)


def test_a_clip_without_sound_has_no_audio_loss_and_no_gradient_through_it(batch):
    torch.manual_seed(0)
    model = towers.randomise_new(AVFullDiT(towers.CONFIG))
    ours, t = objective(), objective().draw_t(IDS, 0)
    silent = batch._replace(has_audio=torch.tensor([True, False]))
    noised = ours.noise(silent, t, 0, CPU)
    assert noised.inputs["audio_present"].tolist() == [True, False]
    assert "audio_present" not in ours.noise(batch, t, 0, CPU).inputs  # all heard: no mask at all
    noised.inputs["noisy_audio"].requires_grad_()
    video, audio = ours.losses(model, noised)
    assert audio[1] == 0 and audio[0] > 0 and (video > 0).all()
    (video.sum() + audio.sum()).backward()
    gradient = noised.inputs["noisy_audio"].grad
    assert gradient[0].any() and not gradient[1].any()
    # Every parameter has a gradient also when nothing is heard: the same graph on every rank.
    model.zero_grad()
    nothing = ours.noise(batch._replace(has_audio=torch.zeros(2, dtype=torch.bool)), t, 0, CPU)
    sum(loss.sum() for loss in ours.losses(model, nothing)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
