"""AutoencoderKLWan over a whole clip at once: the same function as its chunked pass, for training.

diffusers walks through a clip in chunks of four frames with a cache per convolution, which saves
memory on real videos and costs most of the time on tiny ones. Without chunks the causal padding
does the caches' work, except in the two temporal resamplings, which treat the first frame apart.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify


def _resample(self: Any, x: torch.Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Any:
    if feat_cache is not None:
        return WanResample.forward(self, x, feat_cache, feat_idx)
    if self.mode == "upsample3d" and x.shape[2] > 1:
        batch, channels, frames, height, width = x.shape
        later = self.time_conv(x[:, :, 1:])  # (B, 2C, T-1, H, W): two frames from each
        later = later.reshape(batch, 2, channels, frames - 1, height, width)
        later = torch.stack((later[:, 0], later[:, 1]), 3).flatten(2, 3)
        x = torch.cat((x[:, :, :1], later), 2)  # the first frame stays one frame
    batch, _, frames = x.shape[:3]
    flat = self.resample(x.transpose(1, 2).flatten(0, 1))  # (B T, C, H, W)
    x = flat.unflatten(0, (batch, frames)).transpose(1, 2)
    if self.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat((x[:, :, :1], self.time_conv(x)), 2)
    return x


def whole_sequence(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Make `encode` and `decode` below possible; the chunked methods still work."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = _resample.__get__(module)
    return vae


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Frames (B,3,T,H,W) -> posterior moments (B,2C,F,h,w)."""
    return vae.quant_conv(vae.encoder(patchify(video, 2)))


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Raw latents (B,C,F,h,w) -> frames (B,3,T,H,W), without `_decode`'s clamp to [-1,1], which
    would stop gradients at white and black."""
    return unpatchify(vae.decoder(vae.post_quant_conv(latents), first_chunk=True), 2)
