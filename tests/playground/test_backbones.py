"""The shipped weights of the built-in world, measured again on a few held-out clips.

weights/playground/QUALITY.md has the numbers on many clips; the limits here leave room for the
small sample only where that is said.
"""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck, WanTransformer3DModel
from safetensors import safe_open

from model.encoders import AudioVAE, VideoVAE
from model.weights.hub import iter_tensors, read_json, weight_files
from playground.backbones import latents as cached
from playground.backbones import recipe
from playground.backbones.clips import TRAIN_SEED, halve_frames, small_clip, third_rate
from playground.backbones.video_vae import decode, encode, to_tensor, whole_sequence
from playground.quality import measure, scores

CLIPS = 12


@pytest.fixture(scope="module")
def clips():
    return measure.reconstruct(range(CLIPS))


@pytest.fixture(scope="module")
def vae(clips):
    return measure.vae_quality(clips)


@pytest.fixture(scope="module")
def latents(clips):
    return measure.held_out_latents(clips)


@pytest.fixture(scope="module")
def towers():
    return measure.load_towers()


def test_video_reconstruction(vae):
    assert vae["psnr_db"]["mean"] >= 24
    assert vae["ball_centre_error_px"]["mean"] <= 2
    assert vae["ball_centre_error_px"]["count"] > 100


def test_impacts_keep_their_time_through_the_audio_vae(vae):
    assert vae["onset_error_ms"]["count"] >= 10
    assert vae["onset_error_ms"]["median"] <= 20
    assert vae["onset_error_ms"]["p90"] <= 20
    assert 0.5 < vae["audio_latent_std"] < 2


def test_video_latents_have_unit_scale(latents):
    """latents_mean and latents_std in the config are those of the data."""
    assert abs(float(latents.video.mean())) < 0.15
    assert 0.8 < float(latents.video.std()) < 1.2


def test_text_states_hold_the_attributes():
    quality = measure.text_quality(train=500, test=150)
    for name in ("colours", "count", "material"):
        assert quality["video"][name] >= 0.95, quality
    assert quality["audio"]["material"] >= 0.95, quality


def test_one_pass_over_a_clip_equals_the_chunks():
    """The towers' latents are made in one pass, those of `data.prepare` in diffusers' chunks."""
    video_vae = VideoVAE.from_folder(recipe.WAN)
    clip = next(c for c in map(lambda i: measure.make_clip(5, i), range(20)) if c.facts.colours)
    video = to_tensor(halve_frames(clip.frames)[:25])
    latents = video_vae.encode(video)
    frames = video_vae.vae.decode(latents).sample
    vae = whole_sequence(video_vae.vae)
    with torch.no_grad():
        torch.testing.assert_close(encode(vae, video).chunk(2, dim=1)[0], latents)
        torch.testing.assert_close(decode(vae, latents).clamp(-1, 1), frames, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["video", "audio"])
def test_captions_matter(name, towers, latents):
    """The right caption beats another clip's on held-out clips, at the same t and noise."""
    tower = towers[0] if name == "video" else towers[1]
    gain = measure.caption_gain(tower, latents)
    assert gain.right < 0.99 * gain.shuffled, gain
    assert gain.wins >= 0.6, gain


def test_files_are_small_and_half_precision():
    files = sorted(recipe.WEIGHTS.rglob("*.safetensors"))
    assert files and all(path.stat().st_size < 4 * 2**20 for path in files)
    assert sum(path.stat().st_size for path in files) < 30e6
    for path in files:
        with safe_open(path, framework="pt") as file:
            dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}
        assert dtypes == {"F16"}, (path, dtypes)


def test_weights_load_into_the_released_classes():
    """Strictly, by the classes of diffusers themselves, from config.json as it is."""
    for cls, part in ((AutoencoderKLWan, "vae"), (WanTransformer3DModel, "transformer")):
        folder = recipe.WAN / part
        module = cls.from_config(cls.load_config(folder))
        module.load_state_dict(dict(iter_tensors(weight_files(folder))))
    config = read_json(recipe.TANGOFLUX / "config.json")
    audio = AutoencoderOobleck(**config["vae"])
    audio.load_state_dict(dict(iter_tensors([recipe.TANGOFLUX / "vae.safetensors"])))
    index = read_json(recipe.WAN / "model_index.json")
    parts = [name for name, value in index.items() if isinstance(value, list)]
    assert all((recipe.WAN / name).is_dir() for name in parts) and len(parts) == 5


def test_measured_quality_is_shipped_beside_the_weights():
    quality = recipe.load_json(recipe.WEIGHTS / "quality.json")
    assert quality["vae"]["psnr_db"]["mean"] >= 24
    assert quality["vae"]["ball_centre_error_px"]["mean"] <= 2
    assert quality["vae"]["onset_error_ms"]["p90"] <= 20
    assert "| what | measured | asked |" in (recipe.WEIGHTS / "QUALITY.md").read_text()


def test_the_metrics_see_what_they_should():
    """Exact pictures have no error, a shifted ball has its shift, a lost one is counted."""
    clip = next(c for c in map(lambda i: measure.make_clip(5, i), range(20)) if c.facts.colours)
    frames = halve_frames(clip.frames)
    assert scores.centre_errors(frames, frames, clip.facts).max() == 0
    shifted = scores.centre_errors(np.roll(frames, 3, axis=2), frames, clip.facts)
    assert abs(np.median(shifted) - 3) < 0.3
    blank = np.full_like(frames, 128)
    assert (scores.centre_errors(blank, frames, clip.facts) == scores.MISSED_PIXELS).all()
    assert scores.psnr(frames, frames) > 80


def test_onsets_of_a_delayed_sound_are_late_by_the_delay():
    clip = next(
        c for c in map(lambda i: measure.make_clip(5, i), range(40))
        if len(scores.clear_events(c.facts, 32_768)) >= 3
    )
    wave = measure.window_of(third_rate(clip.audio))[0].numpy()
    late = np.roll(wave, 160, axis=1)  # 10 ms
    assert scores.onset_errors(wave, wave, clip.facts).max() == 0
    assert abs(np.median(scores.onset_errors(late, wave, clip.facts)) - 10) <= 1


def test_cached_latents_are_those_of_the_clips(tmp_path, monkeypatch):
    """Made side by side from (seed, index), in order; captions in more than one batch."""
    monkeypatch.setattr(cached, "TEXTS", 2)
    for kind in ("video", "audio"):
        cached.build(tmp_path, kind, 3, 1)
    video, audio = (cached.open_latents(tmp_path, kind) for kind in ("video", "audio"))
    frames, sound = small_clip(measure.make_clip(TRAIN_SEED, 2))
    encoders = VideoVAE.from_folder(recipe.WAN), AudioVAE.from_folder(recipe.TANGOFLUX)
    expected = cached.encode_clip(*encoders, frames, sound)
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
    for found, wanted in zip((video.video, audio.audio_mean, audio.audio_std), expected,
                             strict=True):
        assert len(found) == 3
        close(found[2:], wanted)
    facts = measure.describe(TRAIN_SEED, 2)
    alone = cached.encode_captions([facts.video_caption], [facts.audio_caption])
    close(video.video_text[2:], alone.video)
    close(audio.audio_text[2:], alone.audio)


def test_captions_are_encoded_as_prepare_does(latents):
    """Zero rows after the caption for the video tower, all rows for the audio tower."""
    used = (latents.video_text.abs().sum(-1) > 0).sum(1)
    assert 5 < int(used.min()) and int(used.max()) < latents.video_text.shape[1]
    assert (latents.audio_text.abs().sum(-1) > 0).all()
    assert torch.equal(latents.audio_text_mask.sum(1) > 3, torch.ones(CLIPS, dtype=torch.bool))
