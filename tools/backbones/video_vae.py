"""Train the tiny AutoencoderKLWan (2.2 layout) on playground clips.

Same class and same strides (4 in time, 16 in space) as Wan2.2-TI2V-5B's VAE, only narrow. Latent
statistics are measured after training and written into its config, where the released VAE keeps
them too.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from model.files import iter_tensors, weight_files
from tools.backbones import common
from tools.backbones.clips import FIRST_FRAME, WINDOW_FRAMES, open_cache
from tools.backbones.whole_sequence import decode, encode, whole_sequence

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
    folder = common.WAN / "vae"
    common.save_tensors(vae.state_dict(), folder, "diffusion_pytorch_model")
    vae.save_config(folder)
    vae.train()


def train(cache: Path, minutes: float, resume: bool = False, seed: int = 0) -> None:
    """Fit for `minutes`, from the saved weights if `resume`; saves as it goes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + resume)
    frames, _ = open_cache(cache)
    vae = AutoencoderKLWan(**CONFIG)
    if resume:
        vae.load_state_dict(dict(iter_tensors(weight_files(common.WAN / "vae"))))
    vae = whole_sequence(vae).float().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99))
    budget = common.Budget(minutes)
    average = 0.0
    while budget.running():
        common.set_learning_rate(optimizer, budget, PEAK_RATE)
        loss, error = _loss(vae, _batch(frames, rng, budget.progress))
        common.update(vae, optimizer, loss)
        average += (float(error) - average) * max(0.02, 1 / budget.step)
        if budget.step % 50 == 0:
            psnr = 10 * np.log10(4 / average)
            print(f"video_vae step {budget.step} {budget.minutes_used:.1f} min "
                  f"loss {loss.item():.4f} psnr {psnr:.2f} dB", flush=True)
        if budget.save_due():
            save(vae, frames)
    save(vae, frames)
    common.note("video_vae_training", {"minutes": minutes, "steps": budget.step, "seed": seed})
