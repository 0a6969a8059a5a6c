"""Train the tiny AutoencoderKLWan (2.2 layout) on playground clips.

Same class and same strides (4 in time, 16 in space) as Wan2.2-TI2V-5B's VAE, only narrow. Latent
statistics are measured after training and written into its config, where the released VAE keeps
them too.

For training it runs over a whole clip at once. diffusers walks through a clip in chunks of four
frames with a cache per convolution, which saves memory on real videos and costs most of the time on
tiny ones. Without chunks the causal padding does the caches' work, except in the two temporal
resamplings, which treat the first frame apart.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify

from model.weights.hub import iter_tensors, weight_files
from playground.backbones import recipe
from playground.backbones.clips import FIRST_FRAME, WINDOW_FRAMES, open_cache

Z_DIM = 48
CONFIG = {
    "base_dim": 16, "decoder_base_dim": 16, "z_dim": Z_DIM, "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1, "attn_scales": [], "temperal_downsample": [False, True, True],
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_temporal": 4, "scale_factor_spatial": 16,
    "latents_mean": [0.0] * Z_DIM, "latents_std": [1.0] * Z_DIM,
}
PEAK_RATE = 1.5e-3
KL_WEIGHT = 1e-4
DECODER_RATE = 1.2e-3
LATENT_NOISE = 0.05  # so that the decoder forgives what a generator gets slightly wrong
LONG_FROM = 0.3  # of the time: then whole clips
MOTION_WEIGHT = 4.0  # balls cover about 2 % of the picture and are what the world is about


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 (B,T,H,W,3) or (T,H,W,3) -> float [-1,1] (B,3,T,H,W)."""
    if frames.ndim == 4:
        frames = frames[None]
    return torch.from_numpy(np.array(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _full(frames: np.ndarray, rng: np.random.Generator, length: int) -> np.ndarray:
    """`length` whole frames (T,64,96,3) of a random clip."""
    start = int(rng.integers(0, frames.shape[1] - length + 1))
    return frames[int(rng.integers(len(frames))), start:start + length]


def _batch(frames: np.ndarray, rng: np.random.Generator, progress: float) -> torch.Tensor:
    """Short clips first, then clips as long as those that will be encoded.

    A VAE trained on short clips alone drifts in later frames: its causal convolutions together
    look back further than a clip is long.
    """
    size, length = (3, 17) if progress < LONG_FROM else (1, WINDOW_FRAMES)
    return to_tensor(np.stack([_full(frames, rng, length) for _ in range(size)]))


def _loss(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Motion-weighted L1 + L2 and a light KL; returns (loss, plain mean squared error)."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = encode(vae, video).float().chunk(2, dim=1)  # (B,C,F,h,w)
        logvar = logvar.clamp(-20, 10)
        output = decode(vae, mean + torch.randn_like(mean) * torch.exp(0.5 * logvar))
    error = output.float() - video
    backdrop = video.median(dim=2, keepdim=True).values
    moving = ((video - backdrop).abs().amax(dim=1, keepdim=True) > 0.15).float()
    squared = error.square()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = ((1 + MOTION_WEIGHT * moving) * (error.abs() + 4 * squared)).mean() + KL_WEIGHT * kl
    return loss, squared.mean().detach()


@torch.no_grad()
def encode_window(vae: AutoencoderKLWan, frames: np.ndarray) -> torch.Tensor:
    """Raw latents (1,C,13,4,6) of a clip's centre window; frames (72,64,96,3) uint8."""
    window = frames[FIRST_FRAME:FIRST_FRAME + WINDOW_FRAMES]
    return vae.encode(to_tensor(window)).latent_dist.mode()


def _measure_statistics(vae: AutoencoderKLWan, frames: np.ndarray, count: int = 64) -> None:
    latents = torch.cat([encode_window(vae, clip) for clip in frames[:count]])
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in latents.mean(dim=(0, 2, 3, 4)).tolist()],
        latents_std=[round(v, 4) for v in latents.std(dim=(0, 2, 3, 4)).tolist()],
    )


def save(vae: AutoencoderKLWan, frames: np.ndarray) -> None:
    vae.eval()
    _measure_statistics(vae, frames)
    folder = recipe.WAN / "vae"
    recipe.save_tensors(vae.state_dict(), folder, "diffusion_pytorch_model")
    vae.save_config(folder)
    vae.train()


def train(cache: Path, minutes: float, resume: bool = False, seed: int = 0) -> None:
    """Fit for `minutes`, from the saved weights if `resume`; saves as it goes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + resume)
    frames, _ = open_cache(cache)
    vae = AutoencoderKLWan(**CONFIG)
    if resume:
        vae.load_state_dict(dict(iter_tensors(weight_files(recipe.WAN / "vae"))))
    vae = whole_sequence(vae).float().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99))
    budget = recipe.Budget(minutes)
    average = 0.0
    while budget.running():
        recipe.set_learning_rate(budget, PEAK_RATE, optimizer)
        loss, error = _loss(vae, _batch(frames, rng, budget.progress))
        recipe.update(vae, loss, optimizer)
        average += (float(error) - average) * max(0.02, 1 / budget.step)
        if budget.step % 50 == 0:
            psnr = 10 * np.log10(4 / average)
            print(f"video_vae step {budget.step} {budget.minutes_used:.1f} min "
                  f"loss {loss.item():.4f} psnr {psnr:.2f} dB", flush=True)
        if budget.save_due():
            save(vae, frames)
    save(vae, frames)
    recipe.note("video_vae_training", {"minutes": minutes, "steps": budget.step, "seed": seed})


def _ball_loss(output: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """As in `_loss`, with colour counted apart: a pale ball on a pale wall differs by hue alone.

    The less a ball stands out, the more its pixels count: else the palest are painted over.
    """
    error = output - video
    hue = error - error.mean(dim=1, keepdim=True)  # (B,3,T,H,W)
    backdrop = video.median(dim=2, keepdim=True).values
    contrast = (video - backdrop).abs().amax(dim=1, keepdim=True)  # (B,1,T,H,W)
    moving = (contrast > 0.05) * (0.5 / contrast.clamp(min=0.05)).clamp(1, 4)
    size = error.abs() + 4 * error.square() + 2 * hue.abs() + 4 * hue.square()
    return ((1 + 2 * MOTION_WEIGHT * moving) * size).mean()


def train_decoder(cache: Path, minutes: float, seed: int = 0) -> None:
    """Go on with the decoder alone, from cached latents: the latents stay what they are.

    Towers that were trained on them stay valid. Needs `video_latents`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    frames, _ = open_cache(cache)
    vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(recipe.WAN / "vae"))
    vae.load_state_dict(dict(iter_tensors(weight_files(recipe.WAN / "vae"))))
    stored = torch.load(cache / "video.pt", weights_only=True)  # (N,C,13,4,6) normalised
    scales = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(scale).view(-1, 1, 1, 1) for scale in scales)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    vae = whole_sequence(vae).float().requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=DECODER_RATE, betas=(0.9, 0.99))
    budget, average = recipe.Budget(minutes, save_minutes=3), 0.0
    while budget.running():
        recipe.set_learning_rate(budget, DECODER_RATE, optimizer)
        size, latent_frames = (3, 5) if rng.uniform() < 0.5 else (1, 13)
        chosen = rng.integers(0, min(len(stored), len(frames)), size)
        length = 4 * (latent_frames - 1) + 1
        video = to_tensor(np.stack([frames[c, FIRST_FRAME:FIRST_FRAME + length] for c in chosen]))
        latents = stored[torch.from_numpy(chosen)][:, :, :latent_frames]
        latents = (latents + LATENT_NOISE * torch.randn_like(latents)) * std + mean
        with torch.autocast("cpu", torch.bfloat16):
            output = decode(vae, latents)
        loss = _ball_loss(output.float(), video)
        recipe.update(vae, loss, optimizer)
        error = float((output.detach().float() - video).square().mean())
        average += (error - average) * max(0.02, 1 / budget.step)
        if budget.step % 50 == 0:
            print(f"video_decoder step {budget.step} {budget.minutes_used:.1f} min psnr "
                  f"{10 * np.log10(4 / average):.2f} dB", flush=True)
        if budget.save_due():
            recipe.save_tensors(vae.state_dict(), recipe.WAN / "vae", "diffusion_pytorch_model")
    recipe.save_tensors(vae.state_dict(), recipe.WAN / "vae", "diffusion_pytorch_model")
    recipe.note("video_decoder_training", {"minutes": minutes, "steps": budget.step, "seed": seed})


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
