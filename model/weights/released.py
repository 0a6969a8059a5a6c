"""What a user downloaded of the two backbones: where each tensor is, and whether it fits.

Only config.json and safetensors headers are read until a tensor is asked for. Wan comes in the
diffusers layout (`transformer/`) or as released by its authors (config.json and shards in one
folder, names of its own), as a single file or as an index and shards; TangoFlux as its own files.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.errors import ExpectedError
from common.strict_config import strict_config
from model.towers.video_dit import VideoDiTConfig
from model.weights.hub import (
    WAN_HUB_ID,
    open_weights,
    read_json,
    require_file,
    resolve_folder,
    tangoflux_file,
)
from model.weights.names import differences, diffusers_name, first_ten, uses_original_names

# Keys of Wan's config.json whose value the video tower is written for.
WAN_FIXED: dict[str, Any] = {
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
    "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None,
}
# The authors' config.json: its keys under ours, and those that say nothing about shapes.
WAN_ORIGINAL_KEYS = {
    "num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels",
    "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "num_layers": "num_layers", "eps": "eps",
    "text_dim": "text_dim", "patch_size": "patch_size",
}
WAN_ORIGINAL_OTHER = ("model_type", "text_len", "window_size")
# The only files of a hub repository that the video tower needs, in either layout.
WAN_PATTERNS = ["transformer/*", "config.json", "diffusion_pytorch_model*"]
# TangoFlux ships its frozen text encoder in the same file; model.encoders reads it.
TANGOFLUX_OTHER_TENSORS = "text_encoder."


class PretrainedError(ExpectedError, ValueError):
    """Weights or configs that are missing or do not fit; the message says which and why."""


class Released:
    """The tensors of one or both backbones by (tower, name), Wan's under diffusers' names.

    ``tangoflux`` None leaves the audio tower out. ``layouts`` says how each was found.
    """

    def __init__(self, wan: str | Path, tangoflux: str | Path | None) -> None:
        self.sources = {"wan": wan} | ({} if tangoflux is None else {"tangoflux": tangoflux})
        files = {"wan": wan_files(wan)}
        if tangoflux is not None:
            files["tangoflux"] = [tangoflux_file(tangoflux, "tangoflux.safetensors")[0]]
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        self.places: dict[tuple[str, str], tuple[Path, str]] = {}
        self.layouts: dict[str, str] = {}
        for tower, paths in files.items():
            self._read_headers(tower, paths)

    def fit(self, wanted: dict[tuple[str, str], tuple[int, ...]]) -> list[str]:
        """Every tensor that is missing, extra or misshapen, one line each; empty if it fits."""
        return differences(
            {f"{tower}: {name}": shape for (tower, name), shape in wanted.items()},
            {f"{tower}: {name}": shape for (tower, name), shape in self.shapes.items()},
        )

    def require(self, wanted: dict[tuple[str, str], tuple[int, ...]]) -> None:
        """PretrainedError that lists the first ten of `fit`."""
        faults = self.fit(wanted)
        if faults:
            sources = ", ".join(f"{tower}={source}" for tower, source in self.sources.items())
            raise PretrainedError(
                f"{len(faults)} tensors of {sources} do not fit the model; "
                "config and weights must come from the same release: " + first_ten(faults)
            )

    def read(self, tower: str, name: str) -> torch.Tensor:
        """One tensor, as stored."""
        path, stored = self.places[tower, name]
        with open_weights(path) as file:
            return file.get_tensor(stored)

    def __iter__(self) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
        """((tower, name), tensor) one at a time, file by file: no second copy ever exists."""
        for path in dict.fromkeys(path for path, _ in self.places.values()):
            with open_weights(path) as file:
                for key, (owner, stored) in self.places.items():
                    if owner == path:
                        yield key, file.get_tensor(stored)

    def _read_headers(self, tower: str, paths: list[Path]) -> None:
        headers = [(path, name, shape) for path in paths for name, shape in _shapes(path).items()]
        original = tower == "wan" and uses_original_names(name for _, name, _ in headers)
        for path, stored, shape in headers:
            key = tower, diffusers_name(stored) if original else stored
            if key in self.places:
                raise PretrainedError(f"{tower}: {stored} is in {self.places[key][0]} and {path}")
            self.places[key], self.shapes[key] = (path, stored), shape
        names = "names of the authors" if original else "names of diffusers"
        many = f"{len(paths)} shards" if len(paths) > 1 else paths[0].name
        self.layouts[tower] = f"{many} in {paths[0].parent}" + (
            f", {names}" if tower == "wan" else "")


def wan_config(wan: str | Path) -> VideoDiTConfig:
    """Shapes of the video tower from the config.json of either layout."""
    path = require_file(wan_folder(wan) / "config.json", "wan", WAN_HUB_ID)
    where = f"{path}:"
    # Without diffusers' own bookkeeping (_class_name, _diffusers_version).
    values = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    if "dim" in values:
        values = _from_original(values, where)
    for key, expected in WAN_FIXED.items():
        if key in values and values.pop(key) != expected:
            raise PretrainedError(f"{where} {key} must be {expected!r}; use Wan2.2-TI2V-5B's")
    missing = {field.name for field in dataclasses.fields(VideoDiTConfig)} - set(values)
    if missing:
        raise PretrainedError(f"{where} keys {sorted(missing)} are missing; download it again")
    return strict_config(VideoDiTConfig, values, where)


def wan_folder(wan: str | Path) -> Path:
    """Where config.json and the weights are: `transformer/`, the folder itself, or a file's."""
    path = Path(wan)
    if path.suffix == ".safetensors" and path.is_file():
        return path.parent
    folder = resolve_folder(wan, "wan", WAN_HUB_ID, WAN_PATTERNS)
    inner = folder / "transformer"
    if not (inner / "config.json").is_file() and (folder / "config.json").is_file():
        return folder
    return require_file(inner / "config.json", "wan", WAN_HUB_ID).parent


def wan_files(wan: str | Path) -> list[Path]:
    """The named file, the shards an index names, or the single safetensors file."""
    if Path(wan).suffix == ".safetensors" and Path(wan).is_file():
        return [Path(wan)]
    folder = wan_folder(wan)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if indices:
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict):
            raise PretrainedError(f"{indices[0]} has no 'weight_map'; download it again")
        names = set(weight_map.values())
        files = [folder / name for name in sorted(names)]
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            raise PretrainedError(f"wan={wan}: {indices[0]} names {absent[0]}, which is not there")
    elif len(files) != 1:
        raise PretrainedError(
            f"wan={wan}: {folder} holds {len(files)} *.safetensors files and no index; it must "
            "hold one file, or an index and its shards; or name the one file itself"
        )
    return files


def _from_original(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The authors' config.json in our keys; it leaves out what never varies between releases."""
    values = {key: value for key, value in values.items() if key not in WAN_ORIGINAL_OTHER}
    for key in ("qk_norm", "cross_attn_norm"):
        if values.pop(key, True) is not True:
            raise PretrainedError(f"{where} {key} must be true; use Wan2.2-TI2V-5B's")
    dim = values.pop("dim")
    unknown = sorted(values.keys() - WAN_ORIGINAL_KEYS.keys())
    if unknown or not isinstance(values.get("num_heads"), int) or dim % values["num_heads"]:
        what = f"key {unknown[0]}" if unknown else f"dim={dim} over num_heads"
        raise PretrainedError(f"{where} {what} is not understood; use Wan2.2-TI2V-5B's")
    return {
        "patch_size": VideoDiTConfig.patch_size,
        "text_dim": VideoDiTConfig.text_dim,
        "rope_max_seq_len": VideoDiTConfig.rope_max_seq_len,
        "attention_head_dim": dim // values["num_heads"],
        **{WAN_ORIGINAL_KEYS[key]: value for key, value in values.items()},
    }


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with open_weights(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()
                if not name.startswith(TANGOFLUX_OTHER_TENSORS)}
