"""The frozen encoders: Wan's video VAE and umT5, TangoFlux's audio VAE and Flan-T5.

Each class loads from the released layouts (local folder or hub id) and fixes one convention so
that no caller has to know it: latent normalisation, text cleaning and trimming
(1.5), hop and stereo rules (2.3), the 64-row rule of the audio text (2.2, 7). No gradients.
`data.prepare` encodes with them, `tools.sample` decodes with them.
"""

import html
import re
import warnings
from pathlib import Path
from typing import Any

import ftfy
import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck
from torch import Tensor
from transformers import AutoTokenizer, T5Config, T5EncoderModel, UMT5EncoderModel

from model.weights.hub import (
    FLAN_T5_HUB_ID,
    check_loaded,
    iter_tensors,
    load_strictly,
    t5_folder,
    tangoflux_file,
    tensor_shapes,
    wan_subfolder,
    weight_files,
)
from model.weights.names import differences

VIDEO_TEXT_LENGTH = 512  # umT5 rows that the released Wan attends to
AUDIO_TEXT_LENGTH = 64  # hard-coded in TangoFlux


class VideoVAE:
    """AutoencoderKLWan: frames in [-1, 1] <-> latents; causal, so frame counts are 4k+1."""

    def __init__(self, vae: Any) -> None:
        config = vae.config
        self.vae = vae.eval().requires_grad_(False)
        self.temporal_stride: int = config.scale_factor_temporal
        self.spatial_stride: int = config.scale_factor_spatial
        self.latent_channels: int = config.z_dim
        self.device, self.dtype = vae.device, vae.dtype
        # The pipelines call 1/std "latents_std"; here std is std.
        self.latents_mean = torch.tensor(config.latents_mean, device=self.device)  # (C,)
        self.latents_std = torch.tensor(config.latents_std, device=self.device)  # (C,)
        _check_video_strides(config)

    @classmethod
    def from_folder(
        cls, wan: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "VideoVAE":
        """Load `<wan>/vae`. Wan's own code runs this VAE in float32."""
        folder = wan_subfolder(wan, "vae", "config.json")
        vae: Any = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder))
        load_strictly(vae, dict(iter_tensors(weight_files(folder))), folder)
        return cls(_place(vae, device, dtype))

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (B, 3, T, H, W) in [-1, 1] -> raw latents (B, C, F, h, w), the posterior mode.

        F = 1 + (T-1)/4. ValueError if T is not 4k+1 (diffusers would drop the tail silently) or
        if H or W is not a multiple of the spatial stride.
        """
        _, _, num_frames, height, width = frames.shape
        if num_frames % self.temporal_stride != 1:
            raise ValueError(
                f"{num_frames} frames: the video VAE takes {self.temporal_stride}k+1 frames; "
                f"use {nearest_frame_count(num_frames, self.temporal_stride)}"
            )
        if height % self.spatial_stride or width % self.spatial_stride:
            raise ValueError(
                f"frames of {height}x{width} (height x width): both must be multiples of "
                f"{self.spatial_stride}; resize or crop them"
            )
        frames = frames.to(self.device, self.dtype)
        return self.vae.encode(frames).latent_dist.mode().float()  # (B, C, F, h, w)

    def normalize(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, F, h, w) -> (z - mean) / std per channel, what the DiT sees."""
        mean, std = self.latents_mean.to(latents.device), self.latents_std.to(latents.device)
        return (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = self.latents_mean.to(latents.device), self.latents_std.to(latents.device)
        return latents * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, F, h, w) -> frames (B, 3, 1+4(F-1), H, W) in [-1, 1]."""
        raw = self.denormalize(latents.to(self.device).float()).to(self.dtype)
        return self.vae.decode(raw).sample.float().clamp(-1, 1)


class AudioVAE:
    """AutoencoderOobleck: stereo waveform <-> latents, one per hop; no normalisation."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.sample_rate: int = vae.config.sampling_rate
        self.hop: int = vae.hop_length
        self.latent_channels: int = vae.config.decoder_input_channels
        self.device, self.dtype = vae.device, vae.dtype

    @classmethod
    def from_folder(
        cls,
        tangoflux: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "AudioVAE":
        """Load `<tangoflux>/vae.safetensors` (weight_norm names weight_g, weight_v), strictly."""
        path, config = tangoflux_file(tangoflux, "vae.safetensors")
        with warnings.catch_warnings():
            # The class uses the deprecated weight_norm, whose names the released file has.
            warnings.simplefilter("ignore", FutureWarning)
            vae: Any = AutoencoderOobleck(**config.get("vae", {}))
        load_strictly(vae, dict(iter_tensors([path])), path)
        return cls(_place(vae, device, dtype))

    @torch.no_grad()
    def encode(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """Waveform (B, 2, N) in [-1, 1] -> posterior mean and std, each (B, floor(N/hop), C).

        A mono waveform (B, 1, N) is duplicated, as TangoFlux does; other counts: ValueError.
        """
        if wave.shape[1] == 1:
            wave = wave.expand(-1, 2, -1)
        if wave.shape[1] != 2 or wave.shape[2] < self.hop:
            raise ValueError(
                f"waveform of shape {tuple(wave.shape)}: the audio VAE takes (batch, 1 or 2 "
                f"channels, at least {self.hop} samples); downmix or lengthen it"
            )
        posterior = self.vae.encode(wave.to(self.device, self.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()  # (B, C, L)
        return mean.transpose(1, 2), std.transpose(1, 2)  # (B, L, C)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, L, C) -> waveform (B, 2, N), N = L * hop."""
        latents = latents.to(self.device, self.dtype).transpose(1, 2)  # (B, C, L)
        return self.vae.decode(latents).sample.float()


class VideoTextEncoder:
    """umT5 as Wan uses it: cleaned, padded to `max_length`, cut back to the true length."""

    def __init__(self, encoder: Any, tokenizer: Any, max_length: int) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.width: int = encoder.config.d_model

    @classmethod
    def from_folder(
        cls,
        wan: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        max_length: int = VIDEO_TEXT_LENGTH,
    ) -> "VideoTextEncoder":
        """Load `<wan>/text_encoder` and `<wan>/tokenizer`; bf16 on a GPU, fp32 on a CPU."""
        folder = wan_subfolder(wan, "text_encoder", "config.json")
        tokenizer_folder = wan_subfolder(wan, "tokenizer", "tokenizer_config.json")
        files = weight_files(folder)
        encoder, info = UMT5EncoderModel.from_pretrained(
            folder, dtype=dtype or _text_dtype(device), output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed in info, and refused below
        )
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        faulty = {name for kind in kinds for name in info[kind]}
        wanted = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
        found = tensor_shapes(files)
        check_loaded(folder, differences(
            {name: wanted[name] for name in faulty & wanted.keys()},
            {name: found[name] for name in faulty & found.keys()},
        ))
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        return cls(encoder.to(device), tokenizer, max_length)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> list[Tensor]:
        """Texts -> one (n_i, D) each, EOS included; the reader zero-pads to `max_length`.

        The DiT attends the padding too (as zeros): it is part of the pretrained function.
        """
        tokens = _tokenize(self.tokenizer, [clean_text(t) for t in texts], self.max_length)
        ids, mask = (tokens[k].to(self.encoder.device) for k in ("input_ids", "attention_mask"))
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, N, D)
        return [row[:n] for row, n in zip(states, mask.sum(1).tolist(), strict=True)]


class AudioTextEncoder:
    """Flan-T5 as TangoFlux uses it; always 64 rows, because its pad rows are attended too."""

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.width: int = encoder.config.d_model

    @classmethod
    def from_folder(
        cls,
        tangoflux: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "AudioTextEncoder":
        """Load `text_encoder.*` of tangoflux.safetensors; config and tokenizer come from the
        folder or hub id that config.json calls `text_encoder_name` (google/flan-t5-large)."""
        path, config = tangoflux_file(tangoflux, "tangoflux.safetensors")
        source = t5_folder(path.parent, config.get("text_encoder_name", FLAN_T5_HUB_ID))
        encoder: Any = T5EncoderModel(T5Config.from_pretrained(source))
        tensors = dict(iter_tensors([path], "text_encoder."))
        if "shared.weight" in tensors:  # tied; the released file holds one name of the two
            tensors.setdefault("encoder.embed_tokens.weight", tensors["shared.weight"])
        load_strictly(encoder, tensors, path)
        tokenizer = AutoTokenizer.from_pretrained(source)
        return cls(encoder.to(device, dtype or _text_dtype(device)), tokenizer)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts -> states (B, 64, D) with all pad rows kept, mask (B, 64) bool, True = token."""
        tokens = _tokenize(self.tokenizer, texts, AUDIO_TEXT_LENGTH)
        ids, mask = (tokens[k].to(self.encoder.device) for k in ("input_ids", "attention_mask"))
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states, mask.bool()  # (B, 64, D), (B, 64)


def clean_text(text: str) -> str:
    """Wan's caption cleaning: mend mojibake, unescape HTML twice, collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


def nearest_frame_count(num_frames: int, temporal_stride: int) -> int:
    """The largest count of the form stride*k+1 that is not above `num_frames` (at least 1)."""
    return max(0, num_frames - 1) // temporal_stride * temporal_stride + 1


def _tokenize(tokenizer: Any, texts: list[str], length: int) -> Any:
    """Ids and mask (B, length), EOS added, cut and padded to `length`."""
    return tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )


def _place(vae: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
    """To device and dtype; a cast to the same dtype would make diffusers warn."""
    return vae.to(device) if vae.dtype == dtype else vae.to(device, dtype)


def _text_dtype(device: str | torch.device) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def _check_video_strides(config: Any) -> None:
    """The strides that config.json states must be those its layers have."""
    spatial = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
    temporal = 2 ** sum(config.temperal_downsample)
    stated = (config.scale_factor_temporal, config.scale_factor_spatial)
    if (temporal, spatial) != stated:
        raise ValueError(
            f"video VAE config: scale_factor_temporal, scale_factor_spatial = {stated}, but "
            f"temperal_downsample, dim_mult and patch_size give {(temporal, spatial)}; correct it"
        )
