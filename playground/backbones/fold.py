"""Reduce the video autoencoder to the principal components of its latents: the same pictures.

Of the 48 channels that `video_vae` learns, 16 combinations hold 99 % of the variance. The others
cost a tower dearly: it predicts a velocity, noise minus latents, so it has to carry the noise of
every idle channel through its width. Three layers are multiplied with the projection; nothing is
trained. The channels are mixed so that each has variance 1.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.linalg import hadamard

from model.weights.hub import iter_tensors, weight_files
from playground.backbones import recipe


class Projection(NamedTuple):
    """Latents n (C,) -> forward @ (n - mean) (K,), and back by backward; float64."""

    forward: torch.Tensor  # (K,C)
    backward: torch.Tensor  # (C,K)
    mean: torch.Tensor  # (C,)
    kept: float  # share of the variance


def principal(latents: torch.Tensor, channels: int) -> Projection:
    """Of latents (N,C,F,h,w): the first `channels` components, a power of 2."""
    rows = latents.double().movedim(1, -1).flatten(0, -2)
    mean = rows.mean(dim=0)
    rows = rows - mean
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))  # ascending
    first = vectors[:, -channels:]
    scale = math.sqrt(float(values[-channels:].mean()))
    # Each row of a Hadamard matrix adds all components with weight 1 or -1: equal variances.
    mix = torch.from_numpy(hadamard(channels)).double() / math.sqrt(channels)
    kept = float(values[-channels:].sum() / values.sum())
    return Projection(mix @ first.T / scale, scale * first @ mix.T, mean, kept)


def project(latents: torch.Tensor, projection: Projection) -> torch.Tensor:
    """(N,C,F,h,w) -> (N,K,F,h,w) float32."""
    centred = latents.double() - projection.mean.view(-1, 1, 1, 1)
    return torch.einsum("kc,ncfhw->nkfhw", projection.forward, centred).float()


def fold(
    weights: dict[str, torch.Tensor], config: dict, projection: Projection
) -> tuple[dict[str, torch.Tensor], dict]:
    """State dict and config of an AutoencoderKLWan -> those of one with K latent channels.

    Encoding is exact. Decoding, where the mean that is left out is not zero, differs at the rim,
    where the convolution behind it pads with zeros.
    """
    forward, backward, mean, _ = projection
    channels = len(forward)
    weights = {name: tensor.double() for name, tensor in weights.items()}
    std, offset = (torch.tensor(config[f"latents_{name}"]).double() for name in ("std", "mean"))
    quant, bias = weights["quant_conv.weight"].flatten(1), weights["quant_conv.bias"]
    half = len(offset)  # the second half are log-variances, which nothing here draws from
    quant = torch.cat((forward / std @ quant[:half], torch.zeros(channels, 2 * half)))
    bias = torch.cat((
        forward @ ((bias[:half] - offset) / std - mean), torch.full((channels,), -10.0)))
    last = weights["encoder.conv_out.weight"]  # (2C,W,3,3,3), then quant_conv (2C,2C,1,1,1)
    weights["encoder.conv_out.bias"] = quant @ weights["encoder.conv_out.bias"] + bias
    weights["encoder.conv_out.weight"] = torch.einsum("qo,ochij->qchij", quant, last)
    weights["quant_conv.weight"] = torch.eye(2 * channels).view(*[2 * channels] * 2, 1, 1, 1)
    weights["quant_conv.bias"] = torch.zeros(2 * channels)

    post = weights["post_quant_conv.weight"].flatten(1)
    constant = post @ (std * mean + offset) + weights["post_quant_conv.bias"]
    into = post @ (std[:, None] * backward)  # (C,K)
    inside = torch.linalg.lstsq(into, constant).solution
    first = weights["decoder.conv_in.weight"]  # (W,C,3,3,3)
    weights["decoder.conv_in.bias"] += torch.einsum(
        "ochij,c->o", first, constant - into @ inside)
    weights["decoder.conv_in.weight"] = torch.einsum("ochij,ck->okhij", first, into)
    weights["post_quant_conv.weight"] = torch.eye(channels).view(channels, channels, 1, 1, 1)
    weights["post_quant_conv.bias"] = inside
    sizes = {"z_dim": channels, "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    return {name: tensor.float() for name, tensor in weights.items()}, config | sizes


def run(cache: Path, channels: int) -> None:
    """Fold the saved autoencoder, and the cached latents with it. Needs `video_latents`."""
    latents = torch.load(cache / "video.pt", weights_only=True)
    projection = principal(latents, channels)
    folder = recipe.WAN / "vae"
    config = json.loads((folder / "config.json").read_text())
    weights, config = fold(dict(iter_tensors(weight_files(folder))), config, projection)
    recipe.save_tensors(weights, folder, "diffusion_pytorch_model")
    recipe.save_json(config, folder / "config.json")
    torch.save(project(latents, projection), cache / "video.pt")
    recipe.note("video_fold", {"channels": channels, "variance_kept": projection.kept})
    print(f"video_fold: {latents.shape[1]} -> {channels} channels, "
          f"{projection.kept:.4f} of the variance")
