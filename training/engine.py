"""The DeepSpeed engine: its JSON checked and completed, the model sharded, filled and wrapped.

`ds_configs/*.json` own ZeRO, precision, micro batch and communication and stay valid for DeepSpeed
unchanged; the experiment's YAML owns batch, optimiser and clipping. DeepSpeed accepts an unknown
top-level key silently (a typo in `zero_optimization` trains at stage 0), so keys are checked here.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from training.config import ConfigError, nearest
from training.distributed import World, on_gpu

# Read from DeepSpeedConfig of 0.19.8; a test fails when an upgrade changes what it reads.
TOP_LEVEL_KEYS = (
    "activation_checkpointing aio autotuning bf16 checkpoint comms_logger "
    "communication_data_type compile csv_monitor data_efficiency data_types "
    "dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state "
    "expert_parallel flops_profiler fp16 gradient_allreduce_op gradient_predivide_factor "
    "hybrid_engine log_level managed_gradient_accumulation memory_breakdown pipeline "
    "prescale_gradients seq_parallel_communication_data_type sequence_parallel_size "
    "steps_per_print tensor_parallel tensorboard timers torch_autocast "
    "train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size "
    "wall_clock_breakdown wandb comet weight_quantization zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer zero_optimization"
).split()

OWNED_BY_YAML = {
    "train_batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size (accumulation is derived)",
    "gradient_clipping": "gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "warmup_steps",
}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The paper gives lr 1e-5 and AdamW; the rest is this project's choice."""

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01  # none on norms, biases and modulation tables
    lr_new: float = 1.0  # multiplier for the weights that neither backbone had

    def __post_init__(self) -> None:
        for key in ("lr", "eps", "lr_new"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"optimizer.{key}={getattr(self, key)} must be above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={self.betas} must be within [0, 1)")


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """The engine's JSON with its keys checked.

    Raises:
        ConfigError: missing file, broken JSON, a key given twice, unknown, or owned by the YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"deepspeed={path}: no such file; the shipped ones are in ds_configs/")
    try:
        values = json.loads(path.read_text(), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    for key in values:
        if key in OWNED_BY_YAML:
            raise ConfigError(
                f"{path}: key '{key}' belongs to the experiment: remove it and set "
                f"{OWNED_BY_YAML[key]} in the YAML"
            )
        if key not in TOP_LEVEL_KEYS:
            raise ConfigError(f"{path}: unknown key '{key}'; {nearest(key, TOP_LEVEL_KEYS)}")
    micro = values.get("train_micro_batch_size_per_gpu")
    if not isinstance(micro, int) or micro < 1:
        raise ConfigError(
            f"{path}: train_micro_batch_size_per_gpu={micro!r} must be a whole number from 1"
        )
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"key '{key}' is given twice in the DeepSpeed JSON; keep one")
    return dict(pairs)


def accumulation_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """global = micro x accumulation x world, or an error that names the nearest that fit."""
    unit = micro_batch * world_size
    if global_batch < 1 or global_batch % unit:
        lower = global_batch // unit * unit
        fits = f"{lower} or {lower + unit}" if lower else str(unit)
        raise ConfigError(
            f"global_batch_size={global_batch} is not divisible by micro batch {micro_batch} x "
            f"world size {world_size} = {unit}; use {fits}, or another micro batch in the JSON"
        )
    return global_batch // unit


def complete_ds_config(
    values: dict[str, Any], global_batch: int, gradient_clipping: float, world_size: int
) -> dict[str, Any]:
    """What DeepSpeed gets: the JSON plus what the YAML owns and what is unsafe by default."""
    micro = values["train_micro_batch_size_per_gpu"]
    quiet = {"steps_per_print": 10**9, "log_level": "warning"}
    return quiet | values | {
        "train_batch_size": global_batch,
        "gradient_accumulation_steps": accumulation_steps(global_batch, micro, world_size),
        "gradient_clipping": gradient_clipping,
        # Ranks that write checkpoints under different tags would corrupt each other.
        "checkpoint": {"tag_validation": "Fail"} | values.get("checkpoint", {}),
    }


def zero_stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


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
        adam = torch.optim.AdamW(groups, fused=on_gpu(), **settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=ds_config)
    return engine, base_rates


def set_learning_rate(
    engine: deepspeed.DeepSpeedEngine, base_rates: list[float], factor: float
) -> None:
    """lr = base x factor in every group: a pure function of the step, so resume needs no state."""
    for group, base in zip(engine.optimizer.param_groups, base_rates, strict=True):
        group["lr"] = base * factor
