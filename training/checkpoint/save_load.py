"""Checkpoints that are either whole or absent, found again by the same command on any world size.

    RUN/checkpoints/step00001000/{weight,exp_avg,exp_avg_sq,ema}-RANK.safetensors, manifest.json
    RUN/checkpoints/latest      name of the newest, for people; a resume does not trust it

DeepSpeed's own checkpoints are not used. They name `latest` before all ranks have finished, load
a flipped bit silently, belong to one world size and ZeRO stage, and their universal form gives
every parameter group the first one's settings and has no room for an EMA: each is shown in
tests/training/checkpoint/test_library_checkpoint.py. Here every rank writes the fp32 slices that it
holds, all ranks agree that it worked, and manifest.json, with every file's sha256, is written last:
without it, a tag does not count. Learning rate, weight decay and betas are the configuration's,
never the file's. `retention.find_checkpoint` finds the one to go on from, `resume.check_resume`
refuses or names what has changed, and `load_checkpoint` fills the engine.
"""

import os
from pathlib import Path
from typing import Any

import deepspeed
import torch

from common.files import write_text
from common.ranks import World, broadcast_object, gather_objects
from training.checkpoint.contents import Contents, read_contents, write_contents
from training.checkpoint.retention import (
    Found,
    Retention,
    complete_tags,
    prune,
    remove,
    set_aside,
    tag_of,
    wrong_hash,
)
from training.checkpoint.run_dir import CheckpointError, SaveError, step_of
from training.checkpoint.slices import Slice, SliceReader, write_slices
from training.ema import EMA
from training.zero_state import (
    MOMENTS,
    FlatBuffer,
    Piece,
    create_moments,
    find_buffers,
    parameter_shapes,
    publish_weights,
    read_moments,
    updates_done,
)


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine, run_dir: Path, step: int, run: dict, retention: Retention,
    world: World, ema: EMA | None = None,
) -> Path:
    """Write one checkpoint on all ranks, after an optimiser step; drop those not retained.

    Args:
        run: what `training.checkpoint.resume.describe_run` says, the state of guard and
            accumulator, and, for people, where the loader is: it starts from the step alone.
    Raises:
        SaveError: on every rank when any rank failed; the broken tag is removed.
    """
    assert engine.micro_steps % engine.gradient_accumulation_steps() == 0, "half a step is lost"
    tag, buffers = run_dir / "checkpoints" / tag_of(step), find_buffers(engine)
    kinds = _kinds(engine, buffers, ema)
    sizes = gather_objects(4 * len(kinds) * sum(
        piece.length for buffer in buffers for piece in buffer.owned(world)), world)
    problem = _prepare(tag, sum(sizes), len(kinds) * world.world_size) if world.is_main else None
    _settle(problem, tag, world)
    files, problem = [], None
    try:
        for kind, flats in kinds.items():
            slices = [
                Slice(piece.name, piece.begin, flat.narrow(0, piece.start, piece.length))
                for buffer, flat in zip(buffers, flats, strict=True)
                for piece in buffer.owned(world)
            ]
            files.append(write_slices(tag / f"{kind}-{world.rank:05d}.safetensors", slices))
    except OSError as error:
        problem = f"rank {world.rank}: {error}"
    results = gather_objects((files, problem), world)
    problem = next((told for _, told in results if told), None)
    if world.is_main and not problem:
        contents = Contents(
            step=step, world_size=world.world_size, updates=updates_done(engine, buffers),
            skipped_steps=engine.skipped_steps, parameters=parameter_shapes(engine),
            kinds=list(kinds), groups=_settings(engine),
            files={file.name: (file.bytes, file.sha256) for part, _ in results for file in part},
            run=run,
        )
        problem = _commit(tag, contents)
    _settle(problem, tag, world)
    if world.is_main:
        prune(run_dir, retention)
    return tag


def _kinds(
    engine: deepspeed.DeepSpeedEngine, buffers: list[FlatBuffer], ema: EMA | None
) -> dict[str, list[torch.Tensor]]:
    """Kind -> its flat tensors, one per buffer: all that is saved."""
    kinds = {"weight": [buffer.flat for buffer in buffers]}
    moments = [read_moments(engine, buffer) for buffer in buffers]
    if all(moments):  # none before the first update
        kinds |= {key: [held[key] for held in moments] for key in MOMENTS}
    return kinds | ({"ema": ema.flats} if ema else {})


def _settings(engine: deepspeed.DeepSpeedEngine) -> list[dict[str, Any]]:
    """The parameter groups' hyper-parameters, for the record."""
    keys = ("name", "lr", "weight_decay", "betas", "eps")
    return [{key: group.get(key) for key in keys} for group in engine.optimizer.param_groups]


def _prepare(tag: Path, size: int, count: int) -> str | None:
    """An empty folder with room for it, or what is wrong."""
    try:
        if tag.exists():  # left by a killed save, or a step done again
            remove(tag)
        tag.mkdir(parents=True)
        disk = os.statvfs(tag)
    except OSError as error:
        return str(error)
    free, files_free = disk.f_bavail * disk.f_frsize, disk.f_favail
    if free < 1.02 * size + 2**20 or (disk.f_files and files_free < count + 2):
        return (f"it needs {size / 1e9:.3f} GB and {count} files in {tag.parent}, where "
                f"{free / 1e9:.3f} GB and {files_free} files are free; delete something, or "
                "lower keep_checkpoints")
    return None


def _commit(tag: Path, contents: Contents) -> str | None:
    """Manifest last, then `latest`; or what is wrong."""
    for name, (size, _) in contents.files.items():
        path = tag / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is not seen by rank 0: run_dir must be on a disk all nodes share"
    try:
        write_contents(tag, contents)
        write_text(tag.parent / "latest", tag.name + "\n")
    except OSError as error:
        return str(error)
    return None


def _settle(problem: str | None, tag: Path, world: World) -> None:
    """What rank 0 knows to be wrong, raised on every rank after the tag is gone."""
    if world.is_main and problem:
        remove(tag)
    problem = broadcast_object(problem, world)
    if problem:
        raise SaveError(f"checkpoint {tag.name} was not written and has been removed ({problem}); "
                        "the ones before it are as they were")


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, found: Found, world: World, ema: EMA | None = None
) -> None:
    """Fill the engine, on any world size and ZeRO stage; `ema` too, from the weights if it is new.

    Once that has worked, the checkpoints that were passed over stop counting.

    Raises:
        CheckpointError: on every rank, when it holds another model or cannot be read.
    """
    contents, problem = found.contents, None
    try:
        _check_shapes(contents, parameter_shapes(engine))
        readers = {kind: SliceReader(_files(found.tag, contents, kind)) for kind in contents.kinds}
        for index, buffer in enumerate(find_buffers(engine)):
            _fill(readers["weight"], buffer.pieces, buffer.flat)
            if contents.updates:  # before the first one there are no moments
                for key, flat in create_moments(engine, buffer, contents.updates).items():
                    _fill(readers[key], buffer.pieces, flat)
            if ema:
                _fill(readers["ema" if "ema" in readers else "weight"], buffer.pieces,
                      ema.flats[index])
    except CheckpointError as error:
        problem = str(error)
    for told in gather_objects(problem, world):
        if told:
            raise CheckpointError(told)
    publish_weights(engine)
    engine.global_steps, engine.skipped_steps = contents.step, contents.skipped_steps
    engine.global_samples = contents.step * engine.train_batch_size()
    engine.micro_steps = contents.step * engine.gradient_accumulation_steps()
    if world.is_main:
        set_aside(found)


def _fill(reader: SliceReader, pieces: list[Piece], flat: torch.Tensor) -> None:
    for piece in pieces:
        reader.read(piece.name, piece.begin, flat.narrow(0, piece.start, piece.length))


def _files(tag: Path, contents: Contents, kind: str) -> list[Path]:
    return [tag / name for name in contents.files if name.startswith(f"{kind}-")]


def _check_shapes(contents: Contents, shapes: dict[str, list[int]]) -> None:
    for name in sorted(shapes.keys() | contents.parameters.keys()):
        if shapes.get(name) != contents.parameters.get(name):
            raise CheckpointError(
                f"the checkpoint's parameter {name} has shape {contents.parameters.get(name)}, "
                f"this model's {shapes.get(name)}: it is of another model"
            )


def read_weights(
    run_dir: str | Path, step: int | None = None, ema: bool = False
) -> tuple[int, dict[str, torch.Tensor]]:
    """(step, fp32 weights by name) of the newest complete or the named checkpoint, no engine.

    Raises:
        CheckpointError: when there is none, naming those that exist, or it is damaged.
    """
    tags = {step_of(tag): tag for tag in complete_tags(Path(run_dir))}
    if not tags:
        raise CheckpointError(f"{run_dir}/checkpoints: no complete checkpoint; train first")
    step = max(tags) if step is None else step
    if step not in tags:
        raise CheckpointError(f"step={step} has no checkpoint; there are {sorted(tags)}")
    tag, kind = tags[step], "ema" if ema else "weight"
    contents = read_contents(tag)
    if kind not in contents.kinds:
        raise CheckpointError(f"{tag} holds no EMA: the run's ema_decay was not set")
    paths = _files(tag, contents, kind)
    try:
        problem = wrong_hash(tag, [path.name for path in paths], contents)
    except OSError as error:
        problem = str(error)
    if problem:
        others = sorted(tags.keys() - {step})
        raise CheckpointError(f"{problem}: restore it from a copy; other steps are {others}")
    reader, weights = SliceReader(paths), {}
    for name, shape in contents.parameters.items():
        flat = torch.empty(torch.Size(shape).numel())
        reader.read(name, 0, flat)
        weights[name] = flat.view(shape)
    return step, weights


def write_weights(run_dir: Path, step: int, weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of weights alone, by one process without an engine."""
    tag = run_dir / "checkpoints" / tag_of(step)
    tag.mkdir(parents=True, exist_ok=True)
    slices = [Slice(name, 0, value.float().flatten()) for name, value in weights.items()]
    file = write_slices(tag / "weight-00000.safetensors", slices)
    write_contents(tag, Contents(
        step=step, world_size=1, updates=0, skipped_steps=0, kinds=["weight"], groups=[], run={},
        parameters={name: list(value.shape) for name, value in weights.items()},
        files={file.name: (file.bytes, file.sha256)},
    ))
    return tag
