"""The DeepSpeed engine: the model sharded, filled and wrapped, with AdamW.

Its JSON is training.ds_config's.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from common.ranks import World
from common.settings import STRICT
from training.distributed import on_gpu
from training.ds_config import zero_stage
from training.zero_state import find_buffers

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW. The paper gives lr 1e-5 and AdamW; the rest is this project's choice."""

    lr: Annotated[float, Field(
        gt=0, allow_inf_nan=False, description="Learning rate after the warm-up.")] = 1e-5
    betas: Annotated[tuple[Beta, Beta], Field(description="Decay of both moments.")] = (0.9, 0.999)
    eps: Annotated[float, Field(
        gt=0, allow_inf_nan=False, description="Added to the root of the second moment.")] = 1e-8
    weight_decay: Annotated[float, Field(
        ge=0, allow_inf_nan=False,
        description="Decoupled; none on norms, biases and modulation tables.")] = 0.01
    lr_new: Annotated[float, Field(
        gt=0, allow_inf_nan=False, description="Multiplier of the learning rate for weights that "
        "neither backbone had: an ablation of the paper's silence.")] = 1.0


def build_sharded(build: Callable[[], nn.Module], ds_config: dict[str, Any]) -> nn.Module:
    """Build a module with its parameters born sharded under ZeRO-3, plainly otherwise."""
    with deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=zero_stage(ds_config) == 3):
        return build()


@contextmanager
def writable(parameter: nn.Parameter) -> Iterator[nn.Parameter]:
    """The whole parameter, to be written by rank 0 and then sharded again."""
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield parameter
    else:
        yield parameter


def write_parameter(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Copy a full tensor into a parameter, sharded or not (same call on every rank)."""
    with writable(parameter), torch.no_grad():
        if parameter.numel() == tensor.numel():  # under ZeRO-3 only rank 0 holds it whole
            parameter.copy_(tensor)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape before sharding."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def describe_batch(ds_config: dict[str, Any], world: World) -> str:
    """How the global batch is made up, in words."""
    return (
        f"{world.world_size} ranks ({world.source}), ZeRO-{zero_stage(ds_config)}, global batch "
        f"{ds_config['train_batch_size']} = micro {ds_config['train_micro_batch_size_per_gpu']} x "
        f"accumulation {ds_config['gradient_accumulation_steps']} x ranks {world.world_size}"
    )


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    return sum(torch.Size(full_shape(parameter)).numel() for parameter in parameters)


def count_by(model: nn.Module, part_of: Callable[[str], str]) -> dict[str, int]:
    """Parameters per part of a model."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + count_parameters([parameter])
    return counts


def describe_size(model: nn.Module, new_names: set[str]) -> str:
    """Parameters of a model in words."""
    added = (parameter for name, parameter in model.named_parameters() if name in new_names)
    return (f"{count_parameters(model.parameters()):,} parameters, "
            f"{count_parameters(added):,} of them new")


def parameter_groups(
    model: nn.Module, new_names: set[str], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """AdamW groups: decayed or not, pretrained or new. Vectors and tables are not decayed."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = len(full_shape(parameter)) >= 2 and "scale_shift_table" not in name
            groups.setdefault((decayed, name in new_names), []).append(parameter)
    return [
        {
            "name": ("new" if new else "pretrained") + ("" if decayed else "_no_decay"),
            "params": parameters,
            "lr": config.lr * (config.lr_new if new else 1.0),
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (decayed, new), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves the weights alone when a gradient is not finite, as ZeRO's wrappers do.

    For stage 0, where DeepSpeed wraps nothing and a NaN would reach the weights. Gradients are
    reduced by then: every rank sees the same. DeepSpeed reads `overflow` and counts the skip.
    """

    overflow = False

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]
                     if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        self.overflow = not bool(norms.isfinite().all())
        if not self.overflow:
            super().step(closure)


def build_engine(
    model: nn.Module, new_names: set[str], optimizer: OptimizerConfig, ds_config: dict[str, Any]
) -> tuple[deepspeed.DeepSpeedEngine, list[float]]:
    """The engine around the model with AdamW, and each parameter group's base learning rate."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    groups = parameter_groups(model, new_names, optimizer)
    base_rates = [group["lr"] for group in groups]
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device")
    settings: dict[str, Any] = {
        "lr": optimizer.lr,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    adam: torch.optim.Optimizer
    if offload in ("cpu", "nvme"):
        adam = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    else:
        kind = torch.optim.AdamW if zero_stage(ds_config) else SkippingAdamW
        adam = kind(groups, fused=on_gpu(), **settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=ds_config)
    find_buffers(engine)  # refuses, before the first step, what no checkpoint could hold
    return engine, base_rates


def set_learning_rate(
    engine: deepspeed.DeepSpeedEngine, base_rates: list[float], factor: float
) -> None:
    """lr = base x factor in every group: a pure function of the step, so resume needs no state."""
    for group, base in zip(engine.optimizer.param_groups, base_rates, strict=True):
        group["lr"] = base * factor
