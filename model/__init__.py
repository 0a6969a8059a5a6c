"""AVFullDiT: joint audio-video denoising from two pretrained towers, in plain PyTorch."""

from model.avfulldit import AVFullDiT
from model.towers.audio_blocks import AudioDiTConfig
from model.towers.video_dit import VideoDiTConfig
from model.variants import AVFullDiTConfig, JointConfig

__all__ = ["AVFullDiT", "AVFullDiTConfig", "AudioDiTConfig", "JointConfig", "VideoDiTConfig"]
