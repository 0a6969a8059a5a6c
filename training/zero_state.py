"""This rank's fp32 training state, whatever keeps it: which elements of which parameter lie where.

DeepSpeed keeps the fp32 weights, Adam's moments and the gradients in flat buffers whose layout
depends on the ZeRO stage, the precision and the world size. `find_buffers` and `own_gradients` give
all of them in one form, which the checkpoint, the EMA and the norms work on. These are not public
names of DeepSpeed, and no other file uses them: the version is pinned,
tests/training/checkpoint/test_checkpoint.py resumes every kind from every other, and
tests/training/metrics/test_norms.py holds the gradients of every kind against autograd's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from common.ranks import World
from common.settings import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """Elements begin ... begin + length of a flattened parameter, at flat[start:start + length]."""

    name: str
    begin: int
    start: int
    length: int


@dataclass
class FlatBuffer:
    """A flat fp32 buffer of weights, and what is in it (besides padding)."""

    parameter: Tensor  # what the optimiser updates and keeps its state of
    pieces: list[Piece]
    replicated: bool = False  # every rank has all of it

    @property
    def flat(self) -> Tensor:
        return self.parameter.data.view(-1)

    def owned(self, world: World) -> Iterator[Piece]:
        """The pieces that this rank saves; of what every rank has, its even share."""
        for piece in self.pieces:
            if not self.replicated:
                yield piece
                continue
            share = -(-piece.length // world.world_size)
            begin = min(world.rank * share, piece.length)
            end = min(begin + share, piece.length)
            if begin < end:
                yield Piece(piece.name, piece.begin + begin, piece.start + begin, end - begin)


def find_buffers(engine: deepspeed.DeepSpeedEngine) -> list[FlatBuffer]:
    """This rank's flat buffers themselves, not copies.

    Raises:
        ConfigError: when the engine keeps its state where we cannot read it.
    """
    names = {id(p): name for name, p in engine.module.named_parameters()}
    kept = engine.optimizer
    if isinstance(kept, DeepSpeedZeroOptimizer_Stage3):
        buffers = _stage3(kept, names)
    elif isinstance(kept, DeepSpeedZeroOptimizer):
        buffers = _fragments(kept.bit16_groups, kept.single_partition_of_fp32_groups, names)
    elif isinstance(kept, BF16_Optimizer):
        buffers = _fragments(kept.bf16_groups, kept.fp32_groups_flat_partition, names)
    elif isinstance(kept, torch.optim.Optimizer):  # stage 0: the parameters themselves
        buffers = [
            FlatBuffer(p, [Piece(names[id(p)], 0, 0, p.numel())], replicated=True)
            for group in kept.param_groups for p in group["params"]
        ]
    else:
        # Stage 0 in 16 bits begins with an optimiser step of its own, which decays the weights.
        raise ConfigError(f"deepspeed: {type(kept).__name__} (16 bits without ZeRO) cannot be "
                          "resumed exactly: set zero_optimization.stage to 1, 2 or 3")
    for buffer in buffers:
        size = sum(piece.length for piece in buffer.pieces)
        if buffer.flat.dtype != torch.float32 or buffer.flat.numel() < size:
            raise ConfigError(
                f"deepspeed: optimiser state of type {buffer.flat.dtype}, {buffer.flat.numel()} of "
                f"{size} elements in memory, cannot be checkpointed: keep it in fp32, and "
                "offload_optimizer to cpu, not nvme"
            )
    return buffers


def _stage3(kept: DeepSpeedZeroOptimizer_Stage3, names: dict[int, str]) -> list[FlatBuffer]:
    """Every rank has an equal part of every parameter, the last ones padded."""
    buffers = []
    for flat, group in zip(kept.fp32_partitioned_groups_flat, kept.fp16_groups, strict=True):
        pieces, start = [], 0
        for p in group:
            size = p.partition_numel()
            begin = kept._get_param_partition_rank(p) * size
            length = min(size, p.ds_numel - begin)
            if length > 0:
                pieces.append(Piece(names[id(p)], begin, start, length))
            start += size
        buffers.append(FlatBuffer(flat, pieces))
    return buffers


def _fragments(
    groups: list[list[Any]], flats: list[Tensor], names: dict[int, str]
) -> list[FlatBuffer]:
    """Every rank has an equal part of every group's parameters, laid end to end."""
    buffers = []
    for flat, group in zip(flats, groups, strict=True):
        pieces = []
        for p in group:
            if p._hp_mapping is not None:  # some of it is this rank's
                inside, place = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                pieces.append(Piece(names[id(p)], inside.start, place.start, place.numel))
        buffers.append(FlatBuffer(flat, pieces))
    return buffers


def own_gradients(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, this rank's piece of its gradient, (n,) without padding, n may be 0).

    Complete between the last micro-batch's backward pass and `engine.step`; before clipping.
    """
    names = {id(p): name for name, p in engine.module.named_parameters()}
    kept = engine.optimizer
    if isinstance(kept, DeepSpeedZeroOptimizer_Stage3):
        yield from _stage3_gradients(kept, names)
    elif isinstance(kept, BF16_Optimizer):
        for flat, group in zip(kept.fp32_groups_gradient_flat_partition, kept.bf16_groups,
                               strict=True):
            for p in group:
                if p._hp_mapping is not None:  # some of it is this rank's
                    place = p._hp_mapping.hp_fragment_address
                    yield names[id(p)], flat.narrow(0, place.start, place.numel)
    elif isinstance(kept, DeepSpeedZeroOptimizer):
        for group in kept.bit16_groups:
            for p in group:
                if p._hp_mapping is not None:
                    fragment = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)
                    yield names[id(p)], fragment.view(-1)
    else:
        yield from ((names[id(p)], p.grad.view(-1)) for group in kept.param_groups
                    for p in group["params"] if p.grad is not None)


def _stage3_gradients(
    kept: DeepSpeedZeroOptimizer_Stage3, names: dict[int, str]
) -> Iterator[tuple[str, Tensor]]:
    for index, group in enumerate(kept.fp16_groups):
        if kept.offload_optimizer:  # they went to the host, next to the weights' own place
            flat, sizes = kept.fp32_partitioned_groups_flat[index].grad, []
            for p in group:
                sizes.append(p.partition_numel())
            pieces = flat.narrow(0, 0, sum(sizes)).split(sizes)
        else:
            pieces = kept.averaged_gradients[index]
        for p, piece in zip(group, pieces, strict=True):
            size = p.partition_numel()
            begin = kept._get_param_partition_rank(p) * size
            real = max(0, min(size, p.ds_numel - begin))
            yield names[id(p)], piece.view(-1)[:real]


def gradients_are_replicated(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether every rank holds whole gradients: stage 0."""
    sharded = DeepSpeedZeroOptimizer_Stage3, DeepSpeedZeroOptimizer, BF16_Optimizer
    return not isinstance(engine.optimizer, sharded)


def parameter_shapes(engine: deepspeed.DeepSpeedEngine) -> dict[str, list[int]]:
    """Name -> shape before sharding, of all parameters.

    Raises:
        ConfigError: for one that is not trained, which no buffer has.
    """
    shapes = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            raise ConfigError(f"parameter {name} is frozen: a checkpoint would not hold it")
        shapes[name] = list(getattr(p, "ds_shape", p.shape))
    return shapes


def base_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """AdamW itself, without DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def read_moments(engine: deepspeed.DeepSpeedEngine, buffer: FlatBuffer) -> dict[str, Tensor]:
    """Adam's moments of a buffer, flat; empty before the first update."""
    state = base_optimizer(engine).state.get(buffer.parameter, {})
    assert state.keys() <= {"step", *MOMENTS}, f"a checkpoint would not hold {sorted(state)}"
    return {key: state[key].view(-1) for key in MOMENTS if key in state}


def updates_done(engine: deepspeed.DeepSpeedEngine, buffers: list[FlatBuffer]) -> int:
    """Adam's own count of updates, which skipped steps do not advance."""
    states = base_optimizer(engine).state
    counts = {int(states[buffer.parameter]["step"]) if buffer.parameter in states
              and "step" in states[buffer.parameter] else 0 for buffer in buffers}
    assert len(counts) == 1, f"buffers with different numbers of updates: {counts}"
    return counts.pop()


def create_moments(
    engine: deepspeed.DeepSpeedEngine, buffer: FlatBuffer, updates: int
) -> dict[str, Tensor]:
    """As after `updates` updates, the moments zero, to be filled."""
    adam, device = base_optimizer(engine), buffer.parameter.device
    step: Any = updates
    if not isinstance(adam, DeepSpeedCPUAdam):  # where torch.optim.AdamW keeps it
        fused = adam.defaults.get("fused")
        step = torch.tensor(float(updates), device=device if fused else "cpu")
    adam.state[buffer.parameter] = {
        "step": step, **{key: torch.zeros_like(buffer.parameter.data) for key in MOMENTS},
    }
    return read_moments(engine, buffer)


@torch.no_grad()
def publish_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make the model compute with what the fp32 weights are now (a collective)."""
    kept = engine.optimizer
    if isinstance(kept, DeepSpeedZeroOptimizer_Stage3):
        kept.checkpoint_event_prologue()
        for index in range(len(kept.fp16_groups)):
            kept._reassign_or_swap_out_partitioned_parameters(index)
        kept.checkpoint_event_epilogue()  # parameters that every rank holds whole
    elif isinstance(kept, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        kept.update_lp_params()
