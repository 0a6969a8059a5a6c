"""AVFullDiT: joint audio-video denoising from two pretrained towers, in plain PyTorch."""

from model.avfulldit import AVFullDiT
from model.joint_config import AVFullDiTConfig, JointConfig
from model.towers.audio_blocks import AudioDiTConfig
from model.towers.video_dit import VideoDiTConfig

__all__ = ["AVFullDiT", "AVFullDiTConfig", "AudioDiTConfig", "JointConfig", "VideoDiTConfig"]
