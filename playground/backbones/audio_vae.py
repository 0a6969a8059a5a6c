"""Train the tiny AutoencoderOobleck (TangoFlux's VAE class) on playground sound.

16 kHz stereo, hop 512 (32 ms), 16 channels. Trained end to end from nothing, it first learns that
silence is the safest guess and stays there for hours. So it starts from a teacher: 16 whitened
principal components of band energies every 8 ms. The encoder learns to compute them, the decoder
to make sound of them; then both go on together, with the teacher as a light anchor, which also
keeps the latents at unit scale (TangoFlux trains on them without any normalisation).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderOobleck
from diffusers.models.autoencoders.autoencoder_oobleck import Snake1d

from playground.backbones import recipe
from playground.backbones.clips import HOP, SAMPLE_RATE, WINDOW_FRAMES, WINDOW_LATENTS, open_cache

CONFIG: dict[str, Any] = {
    "encoder_hidden_size": 32, "downsampling_ratios": [8, 4, 4, 4],
    "channel_multiples": [1, 2, 4, 8], "decoder_channels": 24, "decoder_input_channels": 16,
    "audio_channels": 2, "sampling_rate": SAMPLE_RATE,
}
PEAK_RATE = 8e-4
TEACHER_SHARE = 0.4  # of the time; after it encoder and decoder train end to end
ANCHOR_WEIGHT = 0.1
KL_WEIGHT = 1e-4
FIRST_STD = -3.0  # before softplus: posteriors start narrow (0.05)
CROP = 8192  # samples: 16 latents, 0.51 s
BATCH = 4
WINDOWS = (64, 160, 400, 1024)  # STFT lengths: 4 ms pins onsets, 64 ms pins pitches
TEACHER_STEP, TEACHER_LENGTH, BANDS = 128, 256, 14
WINDOW_START = round((3.0 - WINDOW_FRAMES / 24) / 2 * SAMPLE_RATE)
WINDOW_SAMPLES = WINDOW_LATENTS * HOP


@torch.compile(dynamic=True)
def _snake(x: torch.Tensor, frequency: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    return x + inverse * torch.sin(frequency * x).square()


def fuse_snakes(vae: AutoencoderOobleck) -> None:
    """Run the Snake activations as one fused kernel: eager, they take two thirds of a step."""

    def forward(snake: Snake1d, x: torch.Tensor) -> torch.Tensor:  # x (B,C,N)
        return _snake(x, snake.alpha.exp(), (snake.beta.exp() + 1e-9).reciprocal())

    for module in vae.modules():
        if isinstance(module, Snake1d):
            module.forward = forward.__get__(module)


def spectral_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Distance of log magnitudes over WINDOWS; inputs (M,N). Half L1, half L2.

    No phase: at 64 numbers to one latent it cannot be kept, and asking for it favours silence.
    """
    total = output.new_zeros(())
    for length in WINDOWS:
        args: dict[str, Any] = {"n_fft": length, "hop_length": length // 4}
        args["window"] = torch.hann_window(length)
        floor = 4e-3 * length**0.5  # below this is the noise of the room
        ours, theirs = (
            torch.log1p(torch.stft(wave, **args, return_complex=True).abs() / floor)
            for wave in (output, target)
        )
        difference = ours - theirs
        total = total + 0.5 * difference.abs().mean() + 0.5 * difference.square().mean()
    return total / len(WINDOWS)


class Teacher:
    """16 whitened principal components of log band energies, one vector per hop."""

    def __init__(self, audio: np.ndarray, count: int = 256):
        edges = np.geomspace(2, TEACHER_LENGTH // 2 + 1, BANDS + 1).round().astype(int)
        bins = torch.arange(TEACHER_LENGTH // 2 + 1)
        self.bands = torch.stack(
            [((bins >= low) & (bins < max(high, low + 1))).float()
             for low, high in zip([0, *edges[1:-1]], edges[1:], strict=True)]
        )  # (BANDS, bins)
        waves = torch.from_numpy(audio[:count].astype(np.float32)).transpose(1, 2)
        features = self._features(waves[..., :waves.shape[-1] // HOP * HOP])
        rows = features.transpose(1, 2).flatten(0, 1)  # (M,F)
        self.mean = rows.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((rows - self.mean).T))
        size = CONFIG["decoder_input_channels"]
        self.project = (vectors[:, -size:] / values[-size:].sqrt()).T  # (16,F)
        self.explained = float(values[-size:].sum() / values.sum())

    def _features(self, wave: torch.Tensor) -> torch.Tensor:
        """(B,2,N) -> (B, 2 * BANDS * 4, N/512): log energies of each band, channel and 8 ms."""
        pad = (TEACHER_LENGTH - TEACHER_STEP) // 2
        padded = torch.nn.functional.pad(wave.flatten(0, 1), (pad, pad))
        spectrum = torch.stft(
            padded, TEACHER_LENGTH, TEACHER_STEP, window=torch.hann_window(TEACHER_LENGTH),
            center=False, return_complex=True,
        ).abs().square()  # (2B,bins,4L)
        energy = torch.log1p((self.bands @ spectrum) / 0.02)  # (2B,BANDS,4L)
        batch, steps = len(wave), HOP // TEACHER_STEP
        energy = energy.view(batch, 2, BANDS, -1, steps)  # (B,2,BANDS,L,4)
        return energy.permute(0, 1, 2, 4, 3).flatten(1, 3)

    def __call__(self, wave: torch.Tensor) -> torch.Tensor:
        """(B,2,N) -> (B,16,N/512), unit variance per channel over the training sound."""
        return self.project @ (self._features(wave) - self.mean[:, None])


def _batch(audio: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    clips = rng.integers(0, len(audio), BATCH)
    starts = rng.integers(0, audio.shape[1] - CROP + 1, BATCH)
    chosen = [audio[c, s:s + CROP].T for c, s in zip(clips, starts, strict=True)]
    batch = torch.from_numpy(np.stack(chosen).astype(np.float32))  # (B,2,N)
    flip = torch.from_numpy(rng.uniform(size=BATCH) < 0.5)
    return torch.where(flip[:, None, None], batch.flip(1), batch)


def _loss(
    vae: AutoencoderOobleck, wave: torch.Tensor, target: torch.Tensor, taught: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, [spectral, distance to the teacher, mean std]); `taught`: decode the teacher."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, scale = vae.encoder(wave).float().chunk(2, dim=1)
        std = torch.nn.functional.softplus(scale) + 1e-4  # as OobleckDiagonalGaussianDistribution
        latents = target if taught else mean
        output = vae.decoder(latents + std * torch.randn_like(mean))
    output = output.float()[..., :wave.shape[-1]]
    views = [torch.stack([w[:, 0], w[:, 1], w.mean(1)], 1).flatten(0, 1) for w in (output, wave)]
    spectral = spectral_loss(views[0], views[1])
    distance = (mean - target).square().mean()
    width = (std.square() - 2 * std.log()).mean()
    anchor = 1.0 if taught else ANCHOR_WEIGHT
    loss = spectral + anchor * distance + KL_WEIGHT * width
    return loss, torch.stack([spectral, distance, std.mean()])


def window_of(audio: np.ndarray) -> torch.Tensor:
    """The centre window (1,2,32768) of a clip's sound (48000,2)."""
    window = audio[WINDOW_START:WINDOW_START + WINDOW_SAMPLES].astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(window.T))[None]


def save(vae: AutoencoderOobleck) -> None:
    """vae.safetensors, and its arguments under "vae" in TangoFlux's config.json."""
    recipe.save_tensors(vae.state_dict(), recipe.TANGOFLUX, "vae")
    path = recipe.TANGOFLUX / "config.json"
    recipe.save_json(recipe.load_json(path) | {"vae": CONFIG}, path)


def train(cache: Path, minutes: float, seed: int = 0) -> None:
    """Fit for `minutes` on random 0.51 s crops; saves as it goes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    _, audio = open_cache(cache)
    vae = AutoencoderOobleck(**CONFIG).train()
    fuse_snakes(vae)
    with torch.no_grad():
        vae.encoder.conv2.bias.chunk(2)[1].fill_(FIRST_STD)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99))
    teacher = Teacher(audio)
    print(f"audio_vae teacher explains {teacher.explained:.3f} of the variance", flush=True)
    budget = recipe.Budget(minutes)
    average = torch.zeros(3)
    while budget.running():
        recipe.set_learning_rate(budget, PEAK_RATE, optimizer)
        wave = _batch(audio, rng)
        loss, parts = _loss(vae, wave, teacher(wave), budget.progress < TEACHER_SHARE)
        recipe.update(vae, loss, optimizer, clip=0.5)
        average += (parts.detach() - average) * max(0.02, 1 / budget.step)
        if budget.step % 50 == 0:
            spectral, distance, std = average.tolist()
            print(f"audio_vae step {budget.step} {budget.minutes_used:.1f} min "
                  f"spectral {spectral:.3f} teacher {distance:.3f} std {std:.3f}", flush=True)
        if budget.save_due():
            save(vae)
    save(vae)
    recipe.note("audio_vae_training", {"minutes": minutes, "steps": budget.step, "seed": seed})
