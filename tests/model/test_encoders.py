"""Each encoder convention against the diffusers and transformers classes called directly."""

import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel, UMT5EncoderModel

from model.encoders import (
    AudioTextEncoder,
    AudioVAE,
    VideoTextEncoder,
    VideoVAE,
    clean_text,
    nearest_frame_count,
)
from tests.support.models import tiny


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return tiny.write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def tangoflux(tmp_path_factory):
    return tiny.write_tangoflux(tmp_path_factory.mktemp("tangoflux"))


@pytest.fixture(scope="module")
def video_vae(wan):
    return VideoVAE.from_folder(wan)


@pytest.fixture(scope="module")
def audio_vae(tangoflux):
    return AudioVAE.from_folder(tangoflux)


def test_video_latents_are_the_posterior_mode(video_vae, wan):
    frames = torch.rand(2, 3, 9, 32, 64) * 2 - 1
    reference = AutoencoderKLWan.from_pretrained(wan / "vae")
    with torch.no_grad():
        mode = reference.encode(frames).latent_dist.mode()
    assert torch.equal(video_vae.encode(frames), mode)
    assert video_vae.encode(frames).shape == (2, 48, 3, 2, 4)  # 1 + 8/4 frames, stride 16


def test_video_normalisation_is_mode_minus_mean_over_std(video_vae):
    raw = torch.randn(1, 48, 2, 2, 2)
    mean = torch.tensor(tiny.VIDEO_VAE["latents_mean"]).view(1, 48, 1, 1, 1)
    std = torch.tensor(tiny.VIDEO_VAE["latents_std"]).view(1, 48, 1, 1, 1)
    assert torch.equal(video_vae.normalize(raw), (raw - mean) / std)
    # The pipeline's words: latents / (1/std) + mean with "latents_std" = 1/std.
    pipeline = video_vae.normalize(raw) / (1.0 / std) + mean
    torch.testing.assert_close(video_vae.denormalize(video_vae.normalize(raw)), pipeline)


def test_video_decode_denormalises_first_and_stays_in_range(video_vae, wan):
    raw = torch.randn(1, 48, 3, 2, 2)
    reference = AutoencoderKLWan.from_pretrained(wan / "vae")
    with torch.no_grad():
        expected = reference.decode(raw).sample
    decoded = video_vae.decode(video_vae.normalize(raw))
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-4)
    assert decoded.shape == (1, 3, 9, 32, 32)
    assert decoded.abs().max() <= 1


@pytest.mark.parametrize("num_frames, nearest", [(8, 5), (10, 9), (48, 45), (51, 49)])
def test_frame_count_must_be_4k_plus_1(video_vae, num_frames, nearest):
    with pytest.raises(ValueError, match=rf"{num_frames} frames.*4k\+1.*use {nearest}"):
        video_vae.encode(torch.zeros(1, 3, num_frames, 32, 32))
    assert nearest_frame_count(num_frames, 4) == nearest


def test_frame_size_must_be_a_multiple_of_the_stride(video_vae):
    with pytest.raises(ValueError, match="40x32.*multiples of 16"):
        video_vae.encode(torch.zeros(1, 3, 5, 40, 32))


def test_causality_first_frame_alone_makes_the_first_latent(video_vae):
    frames = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    changed = frames.clone()
    changed[:, :, 1:] = 0
    assert torch.equal(video_vae.encode(frames)[:, :, 0], video_vae.encode(changed)[:, :, 0])


def test_audio_latents_are_mean_and_std_without_scaling(audio_vae, tangoflux):
    wave = torch.rand(2, 2, 4 * tiny.HOP) * 2 - 1
    reference = AutoencoderOobleck(**tiny.AUDIO_VAE)
    reference.load_state_dict(load_file(tangoflux / "vae.safetensors"))  # weight_g, weight_v
    with torch.no_grad():
        raw = reference.encoder(wave)  # (B, 2C, L)
    mean, scale = raw.chunk(2, dim=1)
    got_mean, got_std = audio_vae.encode(wave)
    assert torch.equal(got_mean, mean.transpose(1, 2))
    std = torch.nn.functional.softplus(scale) + 1e-4
    torch.testing.assert_close(got_std, std.transpose(1, 2))
    with torch.no_grad():
        expected = reference.decode(mean).sample
    torch.testing.assert_close(audio_vae.decode(got_mean), expected)


def test_released_audio_vae_has_old_style_weight_norm_names(tangoflux):
    names = load_file(tangoflux / "vae.safetensors")
    assert {n.rsplit(".", 1)[1] for n in names} == {"weight_g", "weight_v", "bias", "alpha", "beta"}


@pytest.mark.parametrize("extra, latents", [(0, 3), (1, 3), (tiny.HOP - 1, 3), (tiny.HOP, 4)])
def test_number_of_audio_latents_is_floored(audio_vae, extra, latents):
    mean, std = audio_vae.encode(torch.zeros(1, 2, 3 * tiny.HOP + extra))
    assert mean.shape == std.shape == (1, latents, 6)
    assert audio_vae.decode(mean).shape == (1, 2, latents * tiny.HOP)


def test_mono_is_duplicated_and_other_counts_are_refused(audio_vae):
    mono = torch.rand(1, 1, 2 * tiny.HOP)
    assert torch.equal(audio_vae.encode(mono)[0], audio_vae.encode(mono.repeat(1, 2, 1))[0])
    with pytest.raises(ValueError, match="1 or 2 channels"):
        audio_vae.encode(torch.rand(1, 6, 2 * tiny.HOP))
    with pytest.raises(ValueError, match=f"at least {tiny.HOP} samples"):
        audio_vae.encode(torch.rand(1, 2, tiny.HOP - 1))


DIRTY = [
    "  rain &amp;amp; wind \n\t falls  ",
    "cafÃ© on the Floor",
    "&lt;b&gt;a ball&lt;/b&gt;",
    "the wall\u00a0rings\u2028twice",
    "",
]


@pytest.mark.parametrize("text", DIRTY)
def test_cleaning_equals_the_wan_pipeline(text):
    assert clean_text(text) == prompt_clean(text)


def test_cleaning_keeps_case_and_mends():
    assert clean_text(DIRTY[0]) == "rain & wind falls"
    assert clean_text(DIRTY[1]) == "café on the Floor"
    assert clean_text(DIRTY[2]) == "<b>a ball</b>"


def test_video_text_equals_umt5_padded_masked_and_cut(wan):
    encoder = VideoTextEncoder.from_folder(wan, max_length=40)
    texts = [*tiny.CAPTIONS, "", "a " * 100]
    tokenizer = AutoTokenizer.from_pretrained(wan / "tokenizer")
    reference = UMT5EncoderModel.from_pretrained(wan / "text_encoder")
    for text, states in zip(texts, encoder.encode(texts), strict=True):
        tokens = tokenizer(
            text, padding="max_length", max_length=40, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            expected = reference(**tokens).last_hidden_state[0]
        length = int(tokens["attention_mask"].sum())
        assert states.shape == (length, tiny.WIDTH)  # trimmed: the reader pads with zeros
        torch.testing.assert_close(states, expected[:length])
    empty, long = encoder.encode(["", "a " * 100])
    assert len(empty) == 1  # EOS alone
    assert len(long) == 40  # truncated, EOS still inside
    assert encoder.encode(["rain &amp; wind"])[0].shape == encoder.encode(["rain & wind"])[0].shape


def test_audio_text_keeps_all_64_rows_whatever_the_batch(tangoflux):
    encoder = AudioTextEncoder.from_folder(tangoflux)
    states, mask = encoder.encode([tiny.CAPTIONS[0], "", "rain " * 200])
    assert states.shape == (3, 64, tiny.WIDTH)
    assert mask.shape == (3, 64) and mask.dtype == torch.bool
    assert mask.sum(1).tolist()[1:] == [1, 64]
    pad_rows = states[0][~mask[0]]
    assert pad_rows.abs().min(dim=1).values.max() > 0  # as they come out of T5, not zeroed
    alone, _ = encoder.encode([tiny.CAPTIONS[0]])
    torch.testing.assert_close(alone[0], states[0])  # independent of the batch it is in


def test_audio_text_weights_come_from_tangoflux_safetensors(tangoflux):
    tensors = load_file(tangoflux / "tangoflux.safetensors")
    assert "text_encoder.encoder.embed_tokens.weight" not in tensors  # tied, one name only
    encoder = AudioTextEncoder.from_folder(tangoflux)
    reference = T5EncoderModel(encoder.encoder.config).eval()
    prefix = "text_encoder."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    reference.load_state_dict(state, strict=False)
    tokens = encoder.tokenizer(
        tiny.CAPTIONS, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = reference(**tokens).last_hidden_state
    torch.testing.assert_close(encoder.encode(tiny.CAPTIONS)[0], expected)


def test_nothing_is_trainable(video_vae, audio_vae, wan, tangoflux):
    modules = [video_vae.vae, audio_vae.vae]
    modules += [VideoTextEncoder.from_folder(wan).encoder]
    modules += [AudioTextEncoder.from_folder(tangoflux).encoder]
    for module in modules:
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_missing_folders_and_files_are_one_clear_line(wan, tangoflux, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        VideoVAE.from_folder(tmp_path / "absent")
    assert "absent" in str(error.value) and "Wan-AI/Wan2.2-TI2V-5B-Diffusers" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="vae/config.json.*Wan-AI"):
        VideoVAE.from_folder(tmp_path)
    copy = shutil.copytree(tangoflux, tmp_path / "tangoflux")
    (copy / "vae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="vae.safetensors.*declare-lab/TangoFlux"):
        AudioVAE.from_folder(copy)


def test_weights_that_do_not_match_are_refused(tangoflux, tmp_path):
    copy = shutil.copytree(tangoflux, tmp_path / "tangoflux")
    tensors = load_file(copy / "vae.safetensors")
    tensors["encoder.extra"] = tensors.pop("encoder.conv1.bias")
    save_file(tensors, copy / "vae.safetensors")
    shape = re.escape(str(tuple(tensors["encoder.extra"].shape)))
    with pytest.raises(ValueError, match=f"encoder.conv1.bias: model {shape}, file has none; "
                                         f"encoder.extra: model has none, file {shape}"):
        AudioVAE.from_folder(copy)


def test_video_text_weights_that_do_not_match_are_refused_with_both_shapes(wan, tmp_path):
    copy = shutil.copytree(wan, tmp_path / "wan")
    path = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("encoder.block.0.layer.0.SelfAttention.o.weight")
    tensors["encoder.final_layer_norm.weight"] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"2 tensors do not fit.*SelfAttention.o.weight: model "
                       r"\(32, 32\), file has none; .*norm.weight: model \(32,\), file \(3,\)"):
        VideoTextEncoder.from_folder(copy)
