"""The training objective on one micro-batch: captions dropped, t and noise drawn, losses taken.

Everything random is a pure function of (seed, epoch, sample id) through `flow.keyed_*`: the same
sample has the same t and noise on 1 device or 64, in t2av and in t2v, resumed or not. Called by
train.py and, for the validation loss, by evaluation. Eq. 2, 3 and 10 of arXiv 2512.02457.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.flow import (
    FlowConfig,
    add_noise,
    flow_loss,
    keyed_normal,
    keyed_uniform,
    sample_audio_t,
    sample_t,
    shifted_audio_t,
    velocity_target,
)

# Validation loss is taken at these t, never at random ones, so that two runs compare exactly.
VALIDATION_T = tuple((index + 0.5) / 8 for index in range(8))
VALIDATION_EPOCH = -1  # its noise is drawn from a stream of its own, the same at every step
VALIDATION_SEED = 0  # and in every run: runs of different seeds are compared sample by sample


class Batch(NamedTuple):
    """Samples of one shape."""

    video_latents: Tensor  # (B, C, F, h, w) float32, normalised
    audio_mean: Tensor  # (B, L, C) float32
    audio_std: Tensor  # (B, L, C) float32
    has_audio: Tensor  # (B,) bool; without sound mean and std are zero and nothing hears them
    # (B,) float32 of the audio loss: 0 without sound; `data.loading.loader` scales
    audio_weight: Tensor
    video_text: Tensor  # (B, rows, D) bfloat16: the longest caption, then a row of zeros or more
    audio_text: Tensor  # (B, 64, D) bfloat16
    audio_text_mask: Tensor  # (B, 64) bool, True = token
    duration: Tensor  # (B,) float32, seconds
    sample_ids: list[str]
    video_text_length: int | None = None  # Nt: rows of zeros up to it were left out; None: none

    def part(self, samples: slice) -> "Batch":
        """Some of the samples, e.g. one micro-batch."""
        return Batch._make(value[samples] if isinstance(value, (Tensor, list)) else value
                           for value in self)

    @property
    def padded_video_text(self) -> Tensor:
        """(B, Nt, D)."""
        if self.video_text_length is None:
            return self.video_text
        missing = self.video_text_length - self.video_text.shape[1]
        return functional.pad(self.video_text, (0, 0, 0, missing))


class Noised(NamedTuple):
    """One micro-batch as the model sees it."""

    inputs: dict[str, Any]  # keyword arguments of AVFullDiT.forward
    video_target: Tensor  # (B, C, T, H, W)
    audio_target: Tensor | None  # (B, L, C); None in t2v
    has_audio: Tensor  # (B,) bool; False: no audio loss


@dataclass(frozen=True)
class Objective:
    """The objective of one run.

    Args:
        task: "t2av", or "t2v", which never touches the audio.
        seed: the run's seed.
        flow: density of t, shift, caption dropout and loss weights.
    """

    task: str
    seed: int
    flow: FlowConfig

    def draw_t(self, sample_ids: Sequence[str], epoch: int) -> Tensor:
        """(B,) float32 in [0, 1]; 1 is noise."""
        return sample_t(self.flow, keyed_uniform("t", self.seed, epoch, sample_ids)).float()

    def audio_t(self, t: Tensor, sample_ids: Sequence[str], epoch: int) -> Tensor:
        """The audio's t (B,) for the video's ``t`` (B,); the same one by default.

        The validation grid gives both modalities one t also where training draws them apart.
        """
        if self.flow.audio_t == "shifted":
            return shifted_audio_t(self.flow, t)
        if self.flow.audio_t == "independent" and epoch != VALIDATION_EPOCH:
            draws = keyed_uniform("audio_t", self.seed, epoch, sample_ids)
            return sample_audio_t(self.flow, draws).to(t)
        return t

    def drop_captions(self, batch: Batch, epoch: int, empty: Mapping[str, Tensor]) -> Batch:
        """Both captions of some samples replaced by the encoded "", so guidance stays valid.

        Args:
            empty: `video_empty (n, D)`, `audio_empty (64, D)`, `audio_empty_mask (64,)`.
        """
        draws = keyed_uniform("caption_drop", self.seed, epoch, batch.sample_ids)
        dropped = (draws < self.flow.caption_dropout).nonzero().flatten().tolist()
        if not dropped:
            return batch
        video_text, audio_text = batch.video_text.clone(), batch.audio_text.clone()
        audio_mask = batch.audio_text_mask.clone()
        for index in dropped:
            video_text[index] = 0.0
            video_text[index, : len(empty["video_empty"])] = empty["video_empty"]
            audio_text[index] = empty["audio_empty"]
            audio_mask[index] = empty["audio_empty_mask"]
        return batch._replace(
            video_text=video_text, audio_text=audio_text, audio_text_mask=audio_mask
        )

    def noise(self, batch: Batch, t: Tensor, epoch: int, device: torch.device) -> Noised:
        """Eq. 2-3: x_t = (1 - t) x0 + t eps, independent eps.

        Args:
            t: (B,) in [0, 1]; the audio's follows from it (`audio_t`).
        """
        seed = VALIDATION_SEED if epoch == VALIDATION_EPOCH else self.seed
        key = (seed, epoch, batch.sample_ids)
        t = t.to(device=device, dtype=torch.float32)
        video = batch.video_latents.to(device)  # (B, C, T, H, W)
        video_noise = keyed_normal("video_noise", *key, video.shape[1:], device)
        inputs: dict[str, Any] = {
            "noisy_video": add_noise(video, video_noise, t),
            "t": t,
            "video_text": batch.video_text.to(device),
            "video_text_length": batch.video_text_length,
        }
        has_audio = batch.has_audio.to(device)
        if self.task == "t2v":
            return Noised(inputs, velocity_target(video, video_noise), None, has_audio)
        mean, std = batch.audio_mean.to(device), batch.audio_std.to(device)
        audio = mean + std * keyed_normal("audio_vae", *key, mean.shape[1:], device)  # (B, L, C)
        audio_noise = keyed_normal("audio_noise", *key, mean.shape[1:], device)
        audio_t = self.audio_t(t, batch.sample_ids, epoch)
        inputs |= {
            "audio_t": audio_t,
            "noisy_audio": add_noise(audio, audio_noise, audio_t),
            "audio_text": batch.audio_text.to(device),
            "audio_text_mask": batch.audio_text_mask.to(device),
            "duration": batch.duration.to(device),
        }
        if not batch.has_audio.all():  # else the attention of every kernel, without a mask
            inputs["audio_present"] = has_audio
        return Noised(
            inputs, velocity_target(video, video_noise), velocity_target(audio, audio_noise),
            has_audio,
        )

    def losses(
        self, model: Callable[..., Any], noised: Noised, cross_modal_bias: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Eq. 3, (B,) per modality, mean over elements; audio is zero in t2v and without sound."""
        video_velocity, audio_velocity = model(
            **noised.inputs, cross_modal_bias=cross_modal_bias
        )
        video = flow_loss(video_velocity, noised.video_target)
        if noised.audio_target is None:
            return video, torch.zeros_like(video)
        return video, flow_loss(audio_velocity, noised.audio_target) * noised.has_audio

    def total(self, video: Any, audio: Any) -> Any:
        """Eq. 10: the weighted sum, of tensors or of numbers."""
        return self.flow.video_loss_weight * video + self.flow.audio_loss_weight * audio
