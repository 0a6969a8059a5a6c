"""Folding an autoencoder to its latents' principal components changes what is stored, not seen."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from playground.backbones.fold import fold, principal, project
from playground.backbones.video_vae import CONFIG

CHANNELS = 8


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    sizes = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": CHANNELS,
             "latents_mean": torch.randn(CHANNELS).tolist(),
             "latents_std": (torch.rand(CHANNELS) + 0.5).tolist()}
    return AutoencoderKLWan(**CONFIG | sizes).eval()


@torch.no_grad()
def normalised(vae, video):
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1, 1)
                 for name in ("mean", "std"))
    return (vae.encode(video).latent_dist.mode() - mean) / std


@torch.no_grad()
def decode(vae, latents):
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1, 1)
                 for name in ("mean", "std"))
    return vae.decode(latents * std + mean).sample


@pytest.fixture(scope="module")
def video():
    torch.manual_seed(1)
    return torch.rand(4, 3, 9, 32, 48) * 2 - 1


def folded(vae, video, channels):
    latents = normalised(vae, video)
    projection = principal(latents, channels)
    weights, config = fold(vae.state_dict(), dict(vae.config), projection)
    other = AutoencoderKLWan.from_config(config).eval()
    other.load_state_dict(weights)
    return latents, projection, other


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_the_folded_encoder_gives_the_projected_latents_of_variance_1(vae, video, channels):
    latents, projection, other = folded(vae, video, channels)
    found = normalised(other, video)
    torch.testing.assert_close(found, project(latents, projection), atol=2e-4, rtol=2e-4)
    rows = found.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(rows.mean(0), torch.zeros(channels), atol=1e-3, rtol=0)
    torch.testing.assert_close(rows.var(0, correction=0), torch.ones(channels), atol=1e-3, rtol=0)


def test_the_share_of_variance_that_is_kept_is_told(vae, video):
    latents, projection, _ = folded(vae, video, 4)
    back = torch.einsum("ck,nkfhw->ncfhw", projection.backward.float(),
                        project(latents, projection)) + projection.mean.float().view(-1, 1, 1, 1)
    lost = (back - latents).square().mean() / latents.var(dim=(0, 2, 3, 4), correction=0).mean()
    assert float(lost) == pytest.approx(1 - projection.kept, rel=1e-3)


def test_with_all_channels_the_picture_is_the_same(vae, video):
    latents, projection, other = folded(vae, video, CHANNELS)
    assert projection.kept == pytest.approx(1)
    torch.testing.assert_close(decode(other, normalised(other, video)), decode(vae, latents),
                               atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_the_decoder_reads_the_same_wherever_no_zero_padding_reaches(vae, video):
    _, projection, other = folded(vae, video, 4)
    small = torch.randn(1, 4, 5, 6, 7)
    full = torch.einsum("ck,nkfhw->ncfhw", projection.backward.float(), small)
    full = full + projection.mean.float().view(-1, 1, 1, 1)
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1, 1)
                 for name in ("mean", "std"))
    found, wanted = (model.decoder.conv_in(model.post_quant_conv(latents))
                     for model, latents in ((other, small), (vae, full * std + mean)))
    inside = (..., slice(2, None), slice(1, -1), slice(1, -1))  # causal in time
    torch.testing.assert_close(found[inside], wanted[inside], atol=1e-4, rtol=1e-4)
