"""Latents -> clips on disk: what tools.sample and the samples of a running training share."""

import wave
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.clips.contact_sheet import draw_contact_sheet, write_contact_sheet
from data.clips.mux import write_clip
from data.schema import DataError
from model.encoders import AudioVAE, VideoVAE
from model.weights.hub import one_line_errors

GIF_FPS = 12.0


class Decoders:
    """The frozen decoders of one run, on the device as long as this object lives.

    Args:
        tangoflux: None in a t2v run, which has no sound.

    Raises:
        DataError: naming the folder that cannot be read.
    """

    def __init__(self, wan: str, tangoflux: str | None, device: torch.device) -> None:
        with one_line_errors(DataError, f"wan={wan}"):
            self.video = VideoVAE.from_folder(wan, device)
        self.audio = None
        if tangoflux:
            with one_line_errors(DataError, f"tangoflux={tangoflux}"):
                self.audio = AudioVAE.from_folder(tangoflux, device)

    @torch.no_grad()
    def clip(
        self, video: torch.Tensor, audio: torch.Tensor | None, seconds: float, sample_rate: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Latents of one clip (1, ...) -> frames (T, H, W, 3) uint8 and sound (N, 2) or None."""
        picture = self.video.decode(video)[0]  # (3, T, H, W) in [-1, 1]
        frames = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0)
        if audio is None or self.audio is None:
            return frames.cpu().numpy(), None
        sound = self.audio.decode(audio)[0].float().clamp(-1, 1)  # (2, N)
        samples = round(seconds * sample_rate)  # sound ends with the picture
        return frames.cpu().numpy(), sound.T[:samples].cpu().numpy()


def write_files(
    path: Path, frames: np.ndarray, fps: float, sound: np.ndarray | None, sample_rate: int,
    title: str,
) -> None:
    """`path`, an mp4 with its sound, and next to it the contact sheet as PNG."""
    write_clip(path, frames, fps, sound, sample_rate)
    sheet = draw_contact_sheet(frames, fps, sound, sample_rate, title)
    write_contact_sheet(path.with_suffix(".png"), sheet)


def write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    """A moving picture that TensorBoard plays; GIF knows hundredths of a second only."""
    every = max(1, round(fps / GIF_FPS))
    images = [Image.fromarray(frame) for frame in frames[::every]]
    images[0].save(path, save_all=True, append_images=images[1:], loop=0,
                   duration=round(100 * every / fps) * 10)


def write_wav(path: Path, sound: np.ndarray, sample_rate: int) -> None:
    """sound (N, 2) float in [-1, 1] as 16-bit stereo."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
