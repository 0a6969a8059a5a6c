"""The model's config and weights from what exists: the backbones' released files, stored latents.

Shapes come from the released configs, rates from the data, the rest from the experiment. Where the
files are and how they name things is model.weights.released's business. Every released tensor has
one parameter of equal shape here, so nothing is cut or padded; what we add is named `new_*`.
Tensors are read one at a time, strictly, and written back the same way. Called by train.py, tools
and tests.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import nn

from common.files import write_json
from common.strict_config import strict_config
from model.avfulldit import AVFullDiT
from model.towers.attention import Attention
from model.towers.audio_blocks import AudioDiTConfig
from model.towers.video_dit import VideoDiTConfig
from model.variants import AVFullDiTConfig, JointConfig
from model.weights.hub import fingerprint, tangoflux_file
from model.weights.names import is_new, released_name
from model.weights.released import (
    TANGOFLUX_OTHER_TENSORS,
    WAN_FIXED,
    PretrainedError,
    Released,
    wan_config,
    wan_files,
)

# Keys of TangoFlux's config.json that say nothing about the transformer.
TANGOFLUX_OTHER = ("uncondition", "text_encoder_name", "vae")


def read_tower_configs(
    wan: str | Path, tangoflux: str | Path | None
) -> tuple[VideoDiTConfig, AudioDiTConfig | None]:
    """Shapes of both towers from the two folders' (or hub ids') own config.json.

    ``tangoflux`` None, as for task t2v: no audio tower.
    """
    with _clear_errors():
        video = wan_config(wan)
        if tangoflux is None:
            return video, None
        path, values = tangoflux_file(tangoflux, "tangoflux.safetensors")
        values = {k: v for k, v in _public(values).items() if k not in TANGOFLUX_OTHER}
        # Absent keys have the released values: TangoFlux's own loader reads them the same way.
        audio = strict_config(AudioDiTConfig, values, f"{path.parent}/config.json:")
    return video, audio


def new_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters no backbone has: W_an of Eq. 6 and 9, and their biases."""
    return {name for name, _ in model.named_parameters() if is_new(name)}


def iter_pretrained(
    config: AVFullDiTConfig, wan: str | Path, tangoflux: str | Path | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(our name, tensor) of every released tensor of the model, read lazily; strict.

    ``tangoflux`` may be None for task t2v. Raises PretrainedError before the first tensor unless
    names and shapes match exactly.
    """
    expected = {name: tuple(p.shape) for name, p in _meta_model(config).named_parameters()}
    yield from _iter_checked(config, expected, wan, tangoflux)


def open_released(
    config: AVFullDiTConfig, wan: str | Path, tangoflux: str | Path | None
) -> Released:
    """The files that the task needs; their headers are read, nothing is checked."""
    if config.task == "t2av" and tangoflux is None:
        raise PretrainedError("task=t2av needs the tangoflux folder or hub id")
    return Released(wan, tangoflux if config.task == "t2av" else None)


def check_weights(
    task: str, joint: JointConfig, wan: str | Path, tangoflux: str | Path
) -> tuple[bool, str]:
    """Whether the headers fit the model, and a report to read or to paste into an issue.

    Reads no tensor: seconds, no GPU. Raises PretrainedError when a file cannot be read at all.
    """
    video, audio = read_tower_configs(wan, tangoflux if task == "t2av" else None)
    with _clear_errors():
        config = AVFullDiTConfig(task=task, video=video, audio=audio, **dataclasses.asdict(joint))
    expected = {name: tuple(p.shape) for name, p in _meta_model(config).named_parameters()}
    with _clear_errors():
        released = open_released(config, wan, tangoflux)
    lines = []
    for tower, layout in released.layouts.items():
        shapes = [shape for (owner, _), shape in released.shapes.items() if owner == tower]
        count = sum(torch.Size(shape).numel() for shape in shapes)
        lines.append(f"{tower}: {layout}: {len(shapes)} tensors, {count:,} parameters")
    faults = released.fit(_wanted(expected, config))
    if not faults:
        return True, "\n".join([*lines, "every name and shape fits the model"])
    title = f"{len(faults)} tensors do not fit the model:"
    return False, "\n".join([*lines, title, *(f"  {fault}" for fault in faults)])


@torch.no_grad()
def load_pretrained(
    model: AVFullDiT,
    wan: str | Path,
    tangoflux: str | Path | None,
    write: Callable[[nn.Parameter, torch.Tensor], Any] = torch.Tensor.copy_,
) -> None:
    """Fill every pretrained parameter of ``model``; new parameters keep their own init.

    ``write(parameter, tensor)`` stores one tensor, casting dtype and device; under ZeRO-3 it must
    gather the parameter first. All ranks read alike. Raises PretrainedError before writing.
    """
    parameters = dict(model.named_parameters())
    # ZeRO-3 keeps the whole shape as ds_shape while a parameter is partitioned.
    expected = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in parameters.items()}
    for name, tensor in _iter_checked(model.config, expected, wan, tangoflux):
        write(parameters[name], tensor)


def export_wan(
    state: Mapping[str, torch.Tensor], config: AVFullDiTConfig, folder: str | Path
) -> None:
    """Write the video tower of ``state`` (our names) as `folder/transformer/`, diffusers layout."""
    target = Path(folder) / "transformer"
    target.mkdir(parents=True, exist_ok=True)
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(_released_state(state, config, "wan"), target, filename_pattern=pattern)
    values = {"_class_name": "WanTransformer3DModel", **dataclasses.asdict(config.video)}
    write_json(target / "config.json", values | WAN_FIXED)


def export_tangoflux(
    state: Mapping[str, torch.Tensor],
    config: AVFullDiTConfig,
    folder: str | Path,
    text_encoder: Mapping[str, torch.Tensor],
    other_config: Mapping[str, Any],
) -> None:
    """Write the audio tower as `folder/tangoflux.safetensors` and `config.json`.

    ``text_encoder`` holds the `text_encoder.*` tensors that share the released file, and
    ``other_config`` the keys of TANGOFLUX_OTHER. New parameters have no place in this layout.
    """
    if config.audio is None:
        raise PretrainedError("export_tangoflux needs an audio tower, but this model is t2v")
    strange = [name for name in text_encoder if not name.startswith(TANGOFLUX_OTHER_TENSORS)]
    if strange:
        raise PretrainedError(f"text_encoder tensor {strange[0]} must be named text_encoder.*")
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = _released_state(state, config, "tangoflux") | dict(text_encoder)
    save_file(tensors, Path(folder) / "tangoflux.safetensors", metadata={"format": "pt"})
    values = dataclasses.asdict(config.audio) | dict(other_config)
    write_json(Path(folder) / "config.json", values)


def _iter_checked(
    config: AVFullDiTConfig,
    expected: Mapping[str, tuple[int, ...]],
    wan: str | Path,
    tangoflux: str | Path | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Compare the files' headers with ``expected`` (our name -> shape), then read."""
    ours = {released_name(name, config): name for name in expected if not is_new(name)}
    with _clear_errors():
        released = open_released(config, wan, tangoflux)
        released.require(_wanted(expected, config))
        for key, tensor in released:
            yield ours[key], tensor


def _wanted(
    expected: Mapping[str, tuple[int, ...]], config: AVFullDiTConfig
) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shapes by (tower, released name), without the new parameters."""
    names = {name: released_name(name, config) for name in expected}
    return {key: expected[name] for name, key in names.items() if key is not None}


def _released_state(
    state: Mapping[str, torch.Tensor], config: AVFullDiTConfig, tower: str
) -> dict[str, torch.Tensor]:
    own = {}
    for name, _ in _meta_model(config).named_parameters():
        released = released_name(name, config)
        if released is not None and released[0] == tower:
            own[name] = released[1]
    missing = sorted(own.keys() - state.keys())
    if missing:
        raise PretrainedError(f"{tower} cannot be exported without {len(missing)} tensors, such "
                              f"as {missing[0]}; pass a whole state dict of this config")
    return {own[name]: state[name].detach().cpu().contiguous() for name in own}


def _meta_model(config: AVFullDiTConfig) -> AVFullDiT:
    with torch.device("meta"):
        return AVFullDiT(config)


def _public(values: dict[str, Any]) -> dict[str, Any]:
    """Without diffusers' own bookkeeping (_class_name, _diffusers_version)."""
    return {key: value for key, value in values.items() if not key.startswith("_")}


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Whatever is wrong with a folder is one kind of error for the caller."""
    try:
        yield
    except PretrainedError:
        raise
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise PretrainedError(str(error)) from error


class Stored(Protocol):
    """What is asked of a data set; `data.schema.Metadata` is one."""

    @property
    def fps(self) -> float: ...
    @property
    def video_temporal_stride(self) -> int: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def audio_hop(self) -> int: ...
    @property
    def video_latent_shape(self) -> Sequence[int]: ...  # (C, F, h, w)
    @property
    def audio_latent_shape(self) -> Sequence[int]: ...  # (L, C)
    @property
    def video_text_width(self) -> int: ...
    @property
    def audio_text_width(self) -> int: ...


def config_from_files(
    task: str, joint: JointConfig, attention: str, wan: str | Path, tangoflux: str | Path,
    stored: Stored, place: str,
) -> AVFullDiTConfig:
    """Raises ValueError, in one line, when data, backbones and experiment do not fit together.

    Args:
        joint, attention: the experiment's. place: where `stored` lies, for the message.
    """
    video, audio = read_tower_configs(wan, tangoflux if task == "t2av" else None)
    widths = [("video latents", stored.video_latent_shape[0], video.in_channels),
              ("video text states", stored.video_text_width, video.text_dim)]
    if audio:
        widths += [("audio latents", stored.audio_latent_shape[1], audio.in_channels),
                   ("audio text states", stored.audio_text_width, audio.joint_attention_dim)]
    for what, width, taken in widths:
        if width != taken:
            raise ValueError(
                f"data.root={place} holds {what} of width {width}, but the backbones "
                f"(wan={wan}, tangoflux={tangoflux}) take {taken}: prepare the data "
                "with the encoders of the same folders"
            )
    Attention(attention)
    return AVFullDiTConfig(
        task=task,
        video=video,
        audio=audio,
        **dataclasses.asdict(joint),
        fps=stored.fps,
        video_temporal_stride=stored.video_temporal_stride,
        sample_rate=stored.sample_rate,
        audio_hop=stored.audio_hop,
    )


def weight_fingerprints(
    task: str, wan: str | Path, tangoflux: str | Path
) -> dict[str, str]:
    """Tower -> sha256 over names, shapes and sampled bytes of its released tensors; seconds."""
    found = {"wan": fingerprint(wan_files(wan), {})}
    if task == "t2av":
        path, _ = tangoflux_file(tangoflux, "tangoflux.safetensors")
        found["tangoflux"] = fingerprint([path], {}, prefix="transformer.")
    return found
