"""Stitch self-check: does the joint model still contain both backbones, exactly?

With cross-modal attention masked and the new output columns muted, a tiny input must come out of
the stitched model as it comes out of the two towers alone. The towers are built here from the
released files one block at a time, by the released block numbers, so that a weight in the wrong
place, a lost shard or a wrong cast shows up before any training. Called once by train.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.avfulldit import AVFullDiT
from model.towers.attention import Attention
from model.towers.audio_blocks import AudioContext, AudioDoubleBlock, AudioSingleBlock
from model.towers.audio_dit import AudioDiT
from model.towers.layers import ExpandedOutput
from model.towers.rope import joint_audio_rope
from model.towers.video_dit import VideoBlock, VideoDiT
from model.variants import AVFullDiTConfig
from model.weights.load import open_released
from model.weights.names import released_name
from model.weights.released import PretrainedError, Released

# Largest relative deviation: the same products in another order, through all layers.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class StitchError(PretrainedError):
    """The stitched model does not reproduce its backbones."""


@torch.no_grad()
def check_stitch(
    model: AVFullDiT,
    forward: Callable[..., Any],
    wan: str | Path,
    tangoflux: str | Path,
    device: torch.device,
) -> dict[str, float]:
    """Relative deviation per modality; StitchError names them if one is too large.

    ``forward`` is the model or the engine that shards it; every rank calls this alike.
    """
    config, dtype = model.config, next(model.parameters()).dtype
    inputs = tiny_inputs(config, device)
    with _muted(model):
        video, audio = forward(**inputs, cross_modal=False)
    towers = Towers(config, open_released(config, wan, tangoflux), model.attend, device, dtype)
    deviations = {"video": _deviation(video, towers.video(inputs))}
    if audio is not None:
        deviations["audio"] = _deviation(audio, towers.audio(inputs))
    if not all(value <= TOLERANCE[dtype] for value in deviations.values()):  # nan fails too
        raise StitchError(
            f"stitch self-check failed: with cross-modal attention masked the model deviates from "
            f"its backbones by {describe(deviations)}; at most {TOLERANCE[dtype]:.0e} is rounding "
            f"in {dtype}. Check wan={wan} and tangoflux={tangoflux}, or set self_check=false"
        )
    return deviations


def describe(deviations: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in deviations.items())


def tiny_inputs(config: AVFullDiTConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Two latent frames of 2 x 2 tokens, five audio latents, a few text rows; always the same."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator).to(device)

    sizes = (2 * patch for patch in config.video.patch_size)
    inputs = {
        "noisy_video": normal(config.video.in_channels, *sizes),
        "t": torch.tensor([0.5], device=device),
        "video_text": normal(4, config.video.text_dim),
    }
    if config.task == "t2v":
        return inputs
    assert config.audio is not None
    return inputs | {
        "noisy_audio": normal(5, config.audio.in_channels),
        "audio_text": normal(3, config.audio.joint_attention_dim),
        "audio_text_mask": torch.ones(1, 3, dtype=torch.bool, device=device),
        "duration": torch.tensor([2.0], device=device),
    }


class Towers:
    """Both backbones by themselves, one block in memory at a time."""

    def __init__(
        self,
        config: AVFullDiTConfig,
        released: Released,
        attend: Attention,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.released, self.attend = config, released, attend
        self.device, self.dtype = device, dtype

    def video(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        shape = self.config.video
        tower = self._load(partial(VideoDiT, shape, 0, self.attend), "video.")
        tokens, context = tower.embed(
            inputs["noisy_video"], inputs["t"], inputs["video_text"],
            time_scale=self.config.video_time_scale,
        )
        for index in range(shape.num_layers):
            block = self._load(partial(VideoBlock, shape, self.attend), f"video.blocks.{index}.")
            tokens = block(tokens, context)
        return tower.velocity(tokens, context)

    def audio(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """TangoFlux with AVSyncRoPE, which changes it by design."""
        config, shape = self.config, self.config.audio
        assert shape is not None
        tower = self._load(partial(AudioDiT, shape, 0, 0, self.attend), "audio.")
        stream, context = tower.embed(
            inputs["noisy_audio"], inputs["t"], inputs["audio_text"], inputs["audio_text_mask"],
            inputs["duration"], config.audio_time_divisor,
        )
        names = [f"transformer_blocks.{index}." for index in range(shape.num_layers)]
        names += [f"single_transformer_blocks.{i}." for i in range(shape.num_single_layers)]
        for index, name in enumerate(names):
            build = AudioDoubleBlock if index < shape.num_layers else AudioSingleBlock
            block = self._load(partial(build, shape, self.attend), f"audio.{name}")
            joint = index >= len(names) - config.num_joint_blocks
            stream = block(stream, self._joint(context) if joint else context)
        return tower.velocity(stream[:, : context.num_audio], context)

    def _joint(self, context: AudioContext) -> AudioContext:
        """Under rope_layout=wan the pretrained heads of a joint block rotate by Wan's table."""
        config, shape = self.config, self.config.audio
        assert shape is not None
        if config.fusion == "cross":
            return context
        return context._replace(rope=joint_audio_rope(
            context.num_audio, context.num_text, shape.axes_dims_rope, config.audio_time_divisor,
            self.device, config.rope_layout, shape.num_attention_heads, 0,
        ))

    def _load(self, build: Callable[[], nn.Module], prefix: str) -> Any:
        """A module with the released weights of ``prefix``, its place in a tower of its own."""
        with torch.device("meta"):
            module = build()
        state = {}
        for name, _ in module.named_parameters():
            key = released_name(prefix + name, self.config)
            assert key is not None
            state[name] = self.released.read(*key).to(self.device, self.dtype)
        module.load_state_dict(state, assign=True)
        return module


def _deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@contextmanager
def _muted(model: nn.Module) -> Iterator[None]:
    """New output columns left out; only init=normal starts them at anything but zero."""
    outputs = [module for module in model.modules() if isinstance(module, ExpandedOutput)]
    try:
        for output in outputs:
            output.mute_new = True
        yield
    finally:
        for output in outputs:
            output.mute_new = False
