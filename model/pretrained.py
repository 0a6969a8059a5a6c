"""Weights of the two backbones <-> ours, strictly and both ways.

Wan comes as a diffusers folder (`transformer/`: one safetensors file, or an index and shards),
TangoFlux as its own files (`tangoflux.safetensors`, `config.json`). Every released tensor has one
parameter of equal shape here, so nothing is cut or padded; what we add is named `new_*`. Tensors
are read one at a time. Called by train.py, tools and tests.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from model.audio_blocks import AudioDiTConfig
from model.avfulldit import AVFullDiT
from model.config import strict_config
from model.files import read_json, tangoflux_file, wan_subfolder
from model.joint_config import AVFullDiTConfig
from model.names import is_new, released_name
from model.video_dit import VideoDiTConfig

# Keys of Wan's config.json whose value the video tower is written for.
WAN_FIXED: dict[str, Any] = {
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
    "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None,
}
# Keys of TangoFlux's config.json that say nothing about the transformer.
TANGOFLUX_OTHER = ("uncondition", "text_encoder_name", "vae")
# TangoFlux ships its frozen text encoder in the same file; model.encoders reads it.
TANGOFLUX_OTHER_TENSORS = "text_encoder."
SHOWN = 10  # offenders listed in one error


class PretrainedError(ValueError):
    """Weights or configs that are missing or do not fit; the message says which and why."""


def read_tower_configs(
    wan: str | Path, tangoflux: str | Path
) -> tuple[VideoDiTConfig, AudioDiTConfig]:
    """Shapes of both towers from the two folders' (or hub ids') own config.json."""
    with _clear_errors():
        folder = wan_subfolder(wan, "transformer", "config.json")
        values = _public(read_json(folder / "config.json"))
        where = f"{folder}/config.json:"
        for key, expected in WAN_FIXED.items():
            if key in values and values.pop(key) != expected:
                raise PretrainedError(f"{where} {key} must be {expected!r}; use Wan2.2-TI2V-5B's")
        missing = {field.name for field in dataclasses.fields(VideoDiTConfig)} - set(values)
        if missing:
            raise PretrainedError(f"{where} keys {sorted(missing)} are missing; download it again")
        video = strict_config(VideoDiTConfig, values, where)
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
    _write_json(target / "config.json", values | WAN_FIXED)


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
    _write_json(Path(folder) / "config.json", values)


def _iter_checked(
    config: AVFullDiTConfig,
    expected: Mapping[str, tuple[int, ...]],
    wan: str | Path,
    tangoflux: str | Path | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Compare the files' headers with ``expected`` (our name -> shape), then read."""
    ours = {released_name(name, config): name for name in expected if not is_new(name)}
    with _clear_errors():
        files = {"wan": _wan_files(wan)}
        if config.task == "t2av":
            if tangoflux is None:
                raise PretrainedError("task=t2av needs the tangoflux folder or hub id")
            files["tangoflux"] = [tangoflux_file(tangoflux, "tangoflux.safetensors")[0]]
        headers = {(tower, name): shape for tower, paths in files.items()
                   for path in paths for name, shape in _shapes(path).items()}
        wanted = {key: expected[name] for key, name in ours.items() if key is not None}
        _require_equal(wanted, headers, wan, tangoflux)
        for tower, paths in files.items():
            for path in paths:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        if (tower, name) in ours:
                            yield ours[tower, name], file.get_tensor(name)


def _require_equal(
    wanted: Mapping[tuple[str, str], tuple[int, ...]],
    found: Mapping[tuple[str, str], tuple[int, ...]],
    wan: str | Path,
    tangoflux: str | Path | None,
) -> None:
    """One PretrainedError that lists the first missing, extra and misshapen tensors."""
    faults = [
        f"{tower}: {name}: model {wanted.get((tower, name), 'has none')}, "
        f"file {found.get((tower, name), 'has none')}"
        for tower, name in sorted(wanted.keys() | found.keys())
        if wanted.get((tower, name)) != found.get((tower, name))
    ]
    if faults:
        more = f"\n  ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise PretrainedError(
            f"{len(faults)} tensors of wan={wan}, tangoflux={tangoflux} do not fit the model; "
            "config and weights must come from the same release:\n  "
            + "\n  ".join(faults[:SHOWN]) + more
        )


def _wan_files(wan: str | Path) -> list[Path]:
    """The shards an index names, or the single safetensors file."""
    folder = wan_subfolder(wan, "transformer", "config.json")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if indices:
        names = set(read_json(indices[0])["weight_map"].values())
        files = [folder / name for name in sorted(names)]
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            raise PretrainedError(f"wan={wan}: {indices[0]} names {absent[0]}, which is not there")
    elif len(files) != 1:
        raise PretrainedError(
            f"wan={wan}: {folder} holds {len(files)} *.safetensors files and no index; it must "
            "hold one file, or an index and its shards"
        )
    return files


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()
                    if not name.startswith(TANGOFLUX_OTHER_TENSORS)}
    except SafetensorError as error:
        raise PretrainedError(f"{path} is not a readable safetensors file: {error}") from error


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


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Whatever is wrong with a folder is one kind of error for the caller."""
    try:
        yield
    except PretrainedError:
        raise
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise PretrainedError(str(error)) from error
