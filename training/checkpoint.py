"""Checkpoints that are either whole or absent, found again by the same command.

DeepSpeed writes shards in place and names `latest` before the other ranks have finished; a disk
that fills on one rank leaves `latest` on a broken tag. Here every file is written aside, synced,
hashed and renamed; all ranks agree that it worked; a manifest is written last, and only a tag with
a manifest whose files have the right sizes counts.

    RUN/checkpoints/step00001000/{*_model_states.pt, *_optim_states.pt, manifest.json}
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from training.distributed import World, barrier, broadcast_object
from training.run_dir import CheckpointError, write_json

MANIFEST = "manifest.json"
# All that DeepSpeed's files need beyond tensors; fragment_address in stages 1 and 2 only.
SAFE_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]
CLIENT_KEY = "avfulldit"  # DeepSpeed sets engine attributes from bare client_state keys


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class AtomicStorage(CheckpointEngine):
    """DeepSpeed's storage engine: write aside, sync, hash, rename; remember an error, not raise.

    Raising on one rank would leave the others waiting in a barrier, so the error is collected by
    `save_checkpoint` after DeepSpeed is through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "atomic"
        self.files: dict[str, tuple[int, str]] = {}
        self.error: str | None = None

    def create(self, info: Any) -> None:
        self.files, self.error = {}, None

    def save(self, state_dict: Any, path: str) -> None:  # DeepSpeed passes these by keyword
        if self.error:
            return
        aside = path + ".tmp"
        try:
            with open(aside, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
            digest = _sha256(aside)
            os.replace(aside, path)
            self.files[os.path.basename(path)] = (os.path.getsize(path), digest)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.error = f"{path}: {error}"
            with contextlib.suppress(OSError):
                os.remove(aside)

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: Any) -> bool:
        return self.error is None


def tag_of(step: int) -> str:
    return f"step{step:08d}"


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine, run_dir: Path, step: int, state: dict, keep: int,
    world: World,
) -> Path:
    """Write one checkpoint on all ranks and drop the oldest beyond `keep`.

    Raises:
        CheckpointError: on every rank when any rank failed; the broken tag is removed.
    """
    root, tag = run_dir / "checkpoints", tag_of(step)
    if world.is_main and (root / tag).exists():  # left by a killed save, or a step done again
        _remove(root / tag)
    barrier(world)
    storage = engine.checkpoint_engine = AtomicStorage()
    engine.save_checkpoint(
        str(root), tag=tag, client_state={CLIENT_KEY: state}, save_latest=False
    )
    results: list[Any] = [None] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(results, (storage.files, storage.error))
    else:
        results = [(storage.files, storage.error)]
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error]
    if world.is_main:
        if errors:
            _remove(root / tag)
        else:
            files = {name: entry for part, _ in results for name, entry in part.items()}
            write_json(root / tag / MANIFEST, {
                "step": step,
                "world_size": world.world_size,
                "files": {name: {"bytes": size, "sha256": sha}
                          for name, (size, sha) in sorted(files.items())},
                **state,
            })
            for old in complete_tags(run_dir)[:-keep]:
                _remove(old)
    barrier(world)
    if errors:
        raise CheckpointError(
            f"checkpoint {tag} was not written and has been removed ({'; '.join(errors)}); "
            "the one before it is intact"
        )
    return root / tag


def _remove(tag: Path) -> None:
    """Manifest first: a half-deleted tag must not count as a checkpoint."""
    (tag / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(tag)


def complete_tags(run_dir: Path) -> list[Path]:
    """Tags with a manifest and all files in their right sizes, oldest first."""
    found = []
    for manifest in sorted((run_dir / "checkpoints").glob(f"step*/{MANIFEST}")):
        files = json.loads(manifest.read_text())["files"]
        sizes = {name: manifest.parent / name for name in files}
        if all(path.is_file() and path.stat().st_size == files[name]["bytes"]
               for name, path in sizes.items()):
            found.append(manifest.parent)
    return found


def find_checkpoint(run_dir: Path, world: World) -> Path | None:
    """The newest complete tag, the same on every rank; None for a fresh start.

    Raises:
        CheckpointError: finished tags exist but none is whole, or another world size wrote it.
    """
    tags = complete_tags(run_dir) if world.is_main else []
    broken = world.is_main and not tags and any(run_dir.glob(f"checkpoints/step*/{MANIFEST}"))
    tag, broken = broadcast_object((tags[-1] if tags else None, broken), world)
    if broken:
        raise CheckpointError(
            f"{run_dir}/checkpoints holds checkpoints but none is complete: move them away to "
            "start afresh"
        )
    if tag is None:  # a tag without a manifest was never finished: a kill in the first save
        return None
    wrote = read_manifest(tag)["world_size"]
    if wrote != world.world_size:
        raise CheckpointError(
            f"checkpoint {tag} was written by {wrote} ranks and {world.world_size} run now: "
            "resume with the same number of ranks"
        )
    return tag


def check_same_model(tag: Path, model: dict, defaults: dict) -> None:
    """Refuse to resume another model, before anything is built.

    A key younger than the checkpoint had the value that is its default now.
    """
    now = json.loads(json.dumps(model))
    saved = json.loads(json.dumps(defaults)) | read_manifest(tag)["model"]
    for key in sorted(now):
        if saved.get(key) != now[key]:
            raise CheckpointError(
                f"{tag} was trained with {key}={saved.get(key)}, this run has {key}={now[key]}: "
                "take the same settings or another run_dir"
            )


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, tag: Path, world: World) -> dict:
    """Verify every file's hash, load on all ranks, return the saved state."""
    _verify(tag, read_manifest(tag), world)
    engine.checkpoint_engine = AtomicStorage()
    path, client = engine.load_checkpoint(str(tag.parent), tag=tag.name)
    if path is None:
        raise CheckpointError(f"DeepSpeed loaded nothing from {tag}")
    return client[CLIENT_KEY]


def _verify(tag: Path, manifest: dict, world: World) -> None:
    """torch does not check its files: a flipped bit would load silently. Ranks share the work."""
    bad = [name for index, (name, entry) in enumerate(manifest["files"].items())
           if index % world.world_size == world.rank
           and _sha256(str(tag / name)) != entry["sha256"]]
    gathered: list[Any] = [bad]
    if world.world_size > 1:
        gathered = [None] * world.world_size
        dist.all_gather_object(gathered, bad)
    broken = [name for part in gathered for name in part]
    if broken:
        raise CheckpointError(
            f"{tag / broken[0]} differs from its sha256 in {MANIFEST}: delete {tag} to resume "
            "from the checkpoint before it"
        )


def read_manifest(tag: Path) -> dict:
    return json.loads((tag / MANIFEST).read_text())


def read_weights(run_dir: str | Path, step: int | None = None) -> tuple[int, dict]:
    """(step, fp32 weights by name) of the newest complete or the named checkpoint, no engine.

    Raises:
        CheckpointError: when there is none; names those that exist.
    """
    tags = {read_manifest(tag)["step"]: tag for tag in complete_tags(Path(run_dir))}
    if not tags:
        raise CheckpointError(f"{run_dir}: no complete checkpoint under checkpoints/; train first")
    step = max(tags) if step is None else step
    if step not in tags:
        raise CheckpointError(f"step={step} has no checkpoint; there are {sorted(tags)}")
    tag = tags[step]
    names = [str(tag / name) for name in read_manifest(tag)["files"]]
    storage = AtomicStorage()
    optimizer_files = sorted(name for name in names if "optim_states" in name)
    if optimizer_files:
        if "zero_stage" not in storage.load(optimizer_files[0], "cpu")["optimizer_state_dict"]:
            return step, _read_bf16_optimizer(tag, optimizer_files, storage)
        return step, get_fp32_state_dict_from_zero_checkpoint(str(tag.parent), tag=tag.name)
    states = storage.load(str(tag / "mp_rank_00_model_states.pt"), "cpu")
    return step, {name: value.float() for name, value in states["module"].items()}


def _read_bf16_optimizer(tag: Path, names: list[str], storage: AtomicStorage) -> dict:
    """fp32 weights of stage 1 with fp32 accumulation, whose format DeepSpeed's reader refuses.

    Each rank holds a flat slice of each parameter group and says which part is whose.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for name in sorted(names, key=lambda path: int(path.split("pp_rank_")[1].split("_")[0])):
        state = storage.load(name, "cpu")["optimizer_state_dict"]
        for flat, owners in zip(
            state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True
        ):
            for parameter, place in owners.items():
                piece = flat.narrow(0, place.start, place.numel)
                parts.setdefault(parameter, []).append(piece.detach())
    shapes = storage.load(str(tag / "mp_rank_00_model_states.pt"), "cpu")["param_shapes"]
    return {
        name: torch.cat(parts[name]).view(shape)
        for group in shapes for name, shape in group.items()
    }
