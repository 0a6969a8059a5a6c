"""Slices of fp32 tensors in safetensors files: written whole or not at all, hashed on the way.

A file holds some ranks' part of one kind of tensor (the weights, say): for each parameter a flat
slice and where it begins. Which rank or ZeRO stage wrote which slice does not matter to a reader,
so a checkpoint has no world size. safetensors carries no code, unlike a pickle, and lets a reader
take single elements of a 10 GB file. Called by training.checkpoint.
"""

import contextlib
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.files import whole_file
from training.checkpoint.run_dir import CheckpointError


class Slice(NamedTuple):
    """Elements begin ... begin + len(values) of a flattened parameter."""

    name: str
    begin: int
    values: Tensor  # (n,) float32, any device


class WrittenFile(NamedTuple):
    name: str
    bytes: int
    sha256: str


def write_slices(path: Path, slices: list[Slice]) -> WrittenFile:
    """Aside, synced, renamed; one slice at a time is in host memory.

    Raises:
        OSError: disk full, no permission, ...; nothing is left behind.
    """
    head: dict[str, Any] = {"__metadata__": {part.name: str(part.begin) for part in slices}}
    end = 0
    for part in slices:
        begin, end = end, end + 4 * part.values.numel()
        head[part.name] = {
            "dtype": "F32", "shape": [part.values.numel()], "data_offsets": [begin, end],
        }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    digest = hashlib.sha256()
    with whole_file(path, "wb") as file:
        for chunk in itertools.chain(
            [len(text).to_bytes(8, "little"), text], map(_raw_bytes, slices)
        ):
            digest.update(chunk)
            file.write(chunk)
    return WrittenFile(path.name, path.stat().st_size, digest.hexdigest())


def _raw_bytes(part: Slice) -> bytes | memoryview:
    values = part.values.detach()
    assert values.dtype == torch.float32 and values.dim() == 1, part.name
    return values.cpu().contiguous().view(torch.uint8).numpy().data


class SliceReader:
    """Any elements of any parameter from the files of one kind, whoever wrote them.

    Raises:
        CheckpointError: in every method, naming the file, for anything else.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.parts: dict[str, list[tuple[int, int, Path]]] = {}  # name -> (begin, end, file)
        self.files = {}
        for path in paths:
            with _as_checkpoint_error(path):
                file = self.files[path] = safe_open(path, framework="pt")
                for name, begin in (file.metadata() or {}).items():
                    [length] = file.get_slice(name).get_shape()
                    self.parts.setdefault(name, []).append((int(begin), int(begin) + length, path))

    def read(self, name: str, begin: int, into: Tensor) -> None:
        """Fill `into` (n,) with the elements from `begin` on."""
        end, filled = begin + into.numel(), 0
        for first, last, path in self.parts.get(name, []):
            low, high = max(begin, first), min(end, last)
            if low < high:
                with _as_checkpoint_error(path):
                    values = self.files[path].get_slice(name)[low - first : high - first]
                    into[low - begin : high - begin].copy_(values)
                filled += high - low
        if filled != end - begin:
            folder = next(iter(self.files)).parent if self.files else "no file"
            raise CheckpointError(
                f"{folder}: {filled} of the {end - begin} elements of {name} from {begin} on are "
                "there; the checkpoint is damaged, or of another model"
            )


@contextlib.contextmanager
def _as_checkpoint_error(path: Path):
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); it is damaged") from error
