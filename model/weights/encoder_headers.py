"""Whether the frozen encoders that a user downloaded fit their classes, from headers alone.

The other half of `check=weights` (model.weights.load looks at the towers): Wan's VAE and umT5,
TangoFlux's VAE and the Flan-T5 inside its file. Modules are built without storage. An encoder that
is absent is reported, not refused: training reads shards, only prepare and sample need encoders.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck
from torch import nn
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from model.weights.hub import (
    FLAN_T5_HUB_ID,
    one_line_errors,
    t5_folder,
    tangoflux_file,
    tensor_shapes,
    wan_subfolder,
    weight_files,
)
from model.weights.names import differences
from model.weights.released import TANGOFLUX_OTHER_TENSORS, PretrainedError

TIED = ("shared.weight", "encoder.embed_tokens.weight")  # T5's embedding under either name
# config.json of FLAN_T5_HUB_ID, which the released TangoFlux folder names and does not hold.
FLAN_T5_LARGE: dict[str, Any] = {
    "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16,
    "feed_forward_proj": "gated-gelu", "vocab_size": 32128,
}


class Encoder(NamedTuple):
    """One encoder, built from its config."""

    module: nn.Module
    files: list[Path]
    prefix: str = ""  # of its tensors' names
    lacks: str = ""  # what else it needs and is not there


def check_encoders(task: str, wan: str | Path, tangoflux: str | Path) -> tuple[bool, list[str]]:
    """Whether every encoder that is there fits, and one line each, then one line per fault."""
    sources: list[tuple[str, Callable[[str | Path], Encoder], str | Path]] = [
        ("wan vae", _video_vae, wan), ("wan text_encoder", _video_text, wan)]
    if task == "t2av":
        sources += [("tangoflux vae", _audio_vae, tangoflux),
                    ("tangoflux text_encoder", _audio_text, tangoflux)]
    lines, faults = [], []
    for name, build, source in sources:
        with one_line_errors(PretrainedError, f"{name}: {source}"):
            line, differing = _compare(build, source)
        lines.append(f"{name}: {line}")
        faults += [f"  {name}: {fault}" for fault in differing]
    return not faults, lines + faults


def _compare(build: Callable[[str | Path], Encoder], source: str | Path) -> tuple[str, list[str]]:
    """What one encoder is, in words, and its tensors that do not fit."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Oobleck's weight_norm
            module, files, prefix, lacks = build(source)
    except FileNotFoundError as error:
        return f"not there; train.py does without, prepare and sample need it ({error})", []
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = tensor_shapes(files, prefix)
    if any(key in found for key in TIED):
        wanted, found = _without_tied(wanted), _without_tied(found)
    count = sum(torch.Size(shape).numel() for shape in found.values())
    line = f"{len(found)} tensors, {count:,} parameters in {files[0].parent}{lacks}"
    return line, differences(wanted, found)


def _video_vae(wan: str | Path) -> Encoder:
    folder = wan_subfolder(wan, "vae", "config.json")
    vae: Any = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder))
    return Encoder(vae, weight_files(folder))


def _video_text(wan: str | Path) -> Encoder:
    folder = wan_subfolder(wan, "text_encoder", "config.json")
    return Encoder(UMT5EncoderModel(UMT5Config.from_pretrained(folder)), weight_files(folder))


def _audio_vae(tangoflux: str | Path) -> Encoder:
    path, config = tangoflux_file(tangoflux, "vae.safetensors")
    vae: Any = AutoencoderOobleck(**config.get("vae", {}))
    return Encoder(vae, [path])


def _audio_text(tangoflux: str | Path) -> Encoder:
    path, config = tangoflux_file(tangoflux, "tangoflux.safetensors")
    name, lacks = config.get("text_encoder_name", FLAN_T5_HUB_ID), ""
    try:
        shape = T5Config.from_pretrained(t5_folder(path.parent, name, download=False))
    except FileNotFoundError as error:
        if name != FLAN_T5_HUB_ID:
            raise
        shape = T5Config(**FLAN_T5_LARGE)
        lacks = f"; its tokenizer is not there, prepare and sample need it ({error})"
    return Encoder(T5EncoderModel(shape), [path], TANGOFLUX_OTHER_TENSORS, lacks)


def _without_tied(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes with the one embedding under one name."""
    tied = [shapes[name] for name in TIED if name in shapes]
    return {name: shape for name, shape in shapes.items() if name not in TIED} | {TIED[0]: tied[0]}
