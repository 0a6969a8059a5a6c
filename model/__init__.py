"""AVFullDiT: joint audio-video denoising from two pretrained towers, in plain PyTorch."""

from model.audio_dit import AudioDiTConfig
from model.avfulldit import AVFullDiT, AVFullDiTConfig
from model.video_dit import VideoDiTConfig

__all__ = ["AVFullDiT", "AVFullDiTConfig", "AudioDiTConfig", "VideoDiTConfig"]
