"""One folder for a whole model: config.json and safetensors, sharded when large.

Needs torch and safetensors alone, so that a trained model can be used without the trainer. Tensors
keep their dtype; what is read is bit for bit what was written. Behind AVFullDiT.save_pretrained and
from_pretrained; the released layouts of the two backbones are model.weights.load's business.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.files import write_json
from model.variants import AVFullDiTConfig
from model.weights.names import differences, first_ten

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-?????-of-?????.safetensors"
MODEL_TYPE = "avfulldit"


class SavedModelError(ValueError):
    """A folder that holds no whole model of ours; the message says what is wrong."""


def write_folder(
    folder: str | Path,
    config: AVFullDiTConfig,
    state: Mapping[str, torch.Tensor],
    max_shard_bytes: int,
) -> None:
    """config.json, and model.safetensors or numbered shards with an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The config goes first and comes last: a folder with one is a whole model. Leftovers of an
    # earlier save would contradict the index; other files of the user's stay.
    for pattern in (CONFIG, INDEX, SINGLE, SHARDS):
        for stale in folder.glob(pattern):
            stale.unlink()
    shards = _shards(state, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: state[name].detach().cpu().contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(_bytes(tensor) for tensor in state.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(folder / CONFIG, {"model_type": MODEL_TYPE, **config.to_dict()})


def read_config(folder: str | Path) -> AVFullDiTConfig:
    values = _read_json(Path(folder) / CONFIG)
    if values.pop("model_type", None) != MODEL_TYPE:
        raise SavedModelError(
            f"{folder}/{CONFIG} is not of model_type {MODEL_TYPE!r}; backbones are read by "
            "model.weights.load.load_pretrained"
        )
    return AVFullDiTConfig.from_dict(values, f"{folder}/{CONFIG}:")


def read_state(
    folder: str | Path, shapes: Mapping[str, tuple[int, ...]], device: torch.device | str
) -> dict[str, torch.Tensor]:
    """All tensors of the folder; SavedModelError unless names and shapes are ``shapes``."""
    files = _files(Path(folder))
    found: dict[str, tuple[int, ...]] = {}
    state = {}
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        faults = differences(shapes, found)
        if faults:
            raise SavedModelError(
                f"{len(faults)} tensors of {folder} do not fit its config.json: "
                + first_ten(faults)
            )
        for path in files:
            with safe_open(path, framework="pt", device=str(device)) as file:
                state.update({name: file.get_tensor(name) for name in file.keys()})
    except SafetensorError as error:
        raise SavedModelError(f"{folder} holds an unreadable safetensors file: {error}") from error
    return state


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise SavedModelError(f"{folder / INDEX} has no 'weight_map'; copy it again")
        names = sorted(set(weight_map.values()))
    else:
        names = [SINGLE]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise SavedModelError(f"{folder} has no {absent[0]}; copy or save the whole folder again")
    return [folder / name for name in names]


def _shards(state: Mapping[str, torch.Tensor], most: int) -> list[list[str]]:
    """Names in order, cut so that no shard exceeds ``most`` bytes unless one tensor does."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + _bytes(tensor) > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(tensor)
    return shards


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SavedModelError(f"{path} is not there; give a folder of save_pretrained") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SavedModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise SavedModelError(f"{path} holds a JSON {type(values).__name__}, not an object")
    return values
