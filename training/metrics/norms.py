"""How each part of the model moves: its gradient norm, and its update against its weights.

DeepSpeed gives one norm for all parameters. Here gradients are read where training.zero_state finds
them, between the last backward pass and the optimiser's step, and summed by part over the ranks'
own pieces: nothing is gathered, no gradient is touched. The update is computed from AdamW's own
state after the step, so that no copy of the weights is needed. Called by train.py.
"""

from collections.abc import Callable

import deepspeed
import torch
from torch import Tensor, nn

from common.ranks import World, sum_over_ranks
from training.engine import OptimizerConfig, parameter_groups
from training.zero_state import (
    base_optimizer,
    find_buffers,
    gradients_are_replicated,
    own_gradients,
    read_moments,
    updates_done,
)


def group_places(
    model: nn.Module, new_names: set[str], optimizer: OptimizerConfig
) -> dict[str, int]:
    """Parameter name -> its place among the parameter groups that the engine was built with."""
    places = {id(p): place for place, group in enumerate(
        parameter_groups(model, new_names, optimizer)) for p in group["params"]}
    return {name: places[id(p)] for name, p in model.named_parameters() if id(p) in places}


class PartNorms:
    """Norms per part of one engine.

    Args:
        part_of: parameter name -> part.
        groups: `group_places` of the model.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, part_of: Callable[[str], str],
        groups: dict[str, int], world: World,
    ) -> None:
        self.engine, self.groups, self.world = engine, groups, world
        names = [name for name, _ in engine.module.named_parameters()]
        self.parts = sorted(set(map(part_of, names)))
        self.place = {name: self.parts.index(part_of(name)) for name in names}

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        """Part -> L2 norm of its gradient before clipping; a collective.

        To be called when the last micro-batch's backward is through and before `engine.step`.
        """
        names, pieces = [], []
        for name, piece in own_gradients(self.engine):
            if piece.numel():
                names.append(name)
                pieces.append(piece)
        totals = torch.zeros(len(self.parts), dtype=torch.float64, device=self.engine.device)
        if pieces:
            norms = torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float32))
            index = torch.tensor([self.place[name] for name in names], device=norms.device)
            squares = norms.double().square()
            totals.index_add_(0, index.to(totals.device), squares.to(totals.device))
        if gradients_are_replicated(self.engine):
            totals /= self.world.world_size
        norms_of_all = sum_over_ranks(totals).sqrt().tolist()
        return dict(zip(self.parts, norms_of_all, strict=True))

    @torch.no_grad()
    def update_ratios(self) -> dict[str, float]:
        """Part -> |last update| / |weights before it|; a collective, after `engine.step`.

        AdamW: w' = (1 - lr wd) w - lr a, a = m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps).
        """
        buffers = find_buffers(self.engine)
        count = updates_done(self.engine, buffers)
        groups = self.engine.optimizer.param_groups
        defaults = base_optimizer(self.engine).defaults
        first, second = (1 - beta**count for beta in defaults["betas"])
        totals = torch.zeros(len(self.parts), 2, dtype=torch.float64, device=self.engine.device)
        for buffer in buffers if count else []:
            moments, flat = read_moments(self.engine, buffer), buffer.flat
            for piece in buffer.owned(self.world):
                part = slice(piece.start, piece.start + piece.length)
                group = groups[self.groups[piece.name]]
                lr, decay = group["lr"], group["weight_decay"]
                deviation = (moments["exp_avg_sq"][part] / second).sqrt_().add_(defaults["eps"])
                step = (moments["exp_avg"][part] / first).div_(deviation).mul_(lr)
                before = (flat[part] + step).div_(1 - lr * decay)
                update = step.add_(before, alpha=lr * decay)
                row = totals[self.place[piece.name]]
                row += torch.stack([_square_sum(update), _square_sum(before)]).to(row.device)
        updates, weights = sum_over_ranks(totals).sqrt().T.tolist()
        return {part: update / weight if weight else 0.0
                for part, update, weight in zip(self.parts, updates, weights, strict=True)}


def _square_sum(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values).double().square()
