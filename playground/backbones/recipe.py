"""What every backbone's training loop shares: a time budget, a schedule, and saving in fp16."""

import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.files import write_json

WEIGHTS = Path("weights/playground")
WAN, TANGOFLUX = WEIGHTS / "wan", WEIGHTS / "tangoflux"
MAX_FILE_BYTES = 3_900_000  # every committed file stays below 4 MiB


class Budget:
    """A run of so many minutes, saved every few; `progress` goes from 0 to 1 with the clock.

    The machine that trains these is small and shared: a budget in minutes ends on time whatever
    else it does, and the learning rate reaches its end when the time does.
    """

    def __init__(self, minutes: float, save_minutes: float = 5.0):
        self.start = time.monotonic()
        self.seconds = 60 * minutes
        self.save_seconds = 60 * save_minutes
        self.last_save = self.start
        self.step = 0

    @property
    def progress(self) -> float:
        return min((time.monotonic() - self.start) / self.seconds, 1.0)

    @property
    def minutes_used(self) -> float:
        return (time.monotonic() - self.start) / 60

    def running(self) -> bool:
        self.step += 1
        return self.progress < 1.0

    def save_due(self) -> bool:
        if time.monotonic() - self.last_save < self.save_seconds:
            return False
        self.last_save = time.monotonic()
        return True


def set_learning_rate(
    budget: Budget, peak: float, *optimizers: torch.optim.Optimizer, warmup: int = 100
) -> None:
    """Linear warm-up by steps, then a cosine down to 2 % of `peak` by the clock."""
    rate = peak * min(budget.step / warmup, 1.0)
    rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * budget.progress))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def update(
    model: torch.nn.Module, loss: torch.Tensor, *optimizers: torch.optim.Optimizer,
    clip: float = 1.0,
) -> None:
    """Backward, clip the gradient norm, step. A loss that is not finite stops the run."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss is {loss.item()}; lower the learning rate")
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()


def _shards(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if used and used + tensor.nbytes > MAX_FILE_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    return shards


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path, stem: str) -> None:
    """Save as fp16 safetensors: one file, or shards with an index in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{stem}*.safetensors*"):
        old.unlink()
    half = {
        name: t.detach().half().contiguous() if t.is_floating_point() else t.detach().contiguous()
        for name, t in tensors.items()
    }
    shards = _shards(half)
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    index: dict = {"metadata": {"total_size": sum(t.nbytes for t in half.values())}}
    index["weight_map"] = {}
    for number, shard in enumerate(shards):
        name = f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index["weight_map"] |= {key: name for key in shard}
    save_json(index, folder / f"{stem}.safetensors.index.json")


def save_json(value: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def load_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def note(key: str, value: dict) -> None:
    """Merge one entry into weights/playground/quality.json (training facts, measured numbers)."""
    path = WEIGHTS / "quality.json"
    save_json(load_json(path) | {key: value}, path)
