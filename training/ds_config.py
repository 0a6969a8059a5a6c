"""The engine's JSON: every key checked before anything is built, completed by what the YAML owns.

`ds_configs/*.json` own ZeRO, precision, micro batch and communication and stay valid for DeepSpeed
unchanged; the experiment's YAML owns batch, optimiser and clipping. DeepSpeed accepts an unknown
top-level key silently (a typo in `zero_optimization` trains at stage 0), inside most blocks too,
and "auto" as if it were not there; here each is an error that names the nearest key.
"""

import json
import typing
from pathlib import Path
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel

from common.settings import ConfigError
from common.strict_config import nearest

# Key -> type of a value, keys of a block (read from 0.19.8's constants), or DeepSpeed's own model
# of a block. Tests fail when an upgrade reads another key, at the top or inside.
OFFERED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": int,
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "torch_autocast": {"enabled": bool, "dtype": str, "lower_precision_safe_modules": list},
    "data_types": {"grad_accum_dtype": str},
    "communication_data_type": str,
    "prescale_gradients": bool,
    "gradient_predivide_factor": (int, float),
    "disable_allgather": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "disable_python_gc": bool,
    "aio": {"block_size": int, "queue_depth": int, "intra_op_parallelism": int,
            "single_submit": bool, "overlap_events": bool, "use_gds": bool},
    "compile": CompileConfig,
    "comms_logger": CommsLoggerConfig,
    "flops_profiler": {"enabled": bool, "recompute_fwd_factor": (int, float), "profile_step": int,
                       "module_depth": int, "top_modules": int, "detailed": bool,
                       "output_file": str},
    "timers": {"throughput": DeepSpeedThroughputTimerConfig},
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "steps_per_print": int,
    "log_level": str,
}

OWNED_BY_YAML = {
    "train_batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size (accumulation is derived)",
    "gradient_clipping": "gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "warmup_steps",
}

_NO_LM = "it belongs to models or data that this trainer does not have"
_OWN_LOGS = "numbers are written by training.metrics, to TensorBoard too"
REFUSED = {
    "activation_checkpointing": "set recompute in the YAML",
    "autotuning": _NO_LM, "data_efficiency": _NO_LM, "expert_parallel": _NO_LM,
    "hybrid_engine": _NO_LM, "pipeline": _NO_LM, "tensor_parallel": _NO_LM,
    "use_data_before_expert_parallelism": _NO_LM, "vocabulary_size": _NO_LM,
    "weight_quantization": _NO_LM,
    "checkpoint": "checkpoints are training.checkpoint's, not DeepSpeed's",
    "datastates_ckpt": "checkpoints are training.checkpoint's, not DeepSpeed's",
    "comet": _OWN_LOGS, "csv_monitor": _OWN_LOGS, "tensorboard": _OWN_LOGS, "wandb": _OWN_LOGS,
    "dataloader_drop_last": "the loader is data.loading.loader's",
    "fp16": "its loss scale has no place in a resume; use bf16 or torch_autocast",
    "gradient_allreduce_op": "a sum would scale the learning rate with the number of ranks",
    "managed_gradient_accumulation": "accumulation is derived from global_batch_size",
    "seq_parallel_communication_data_type": "there is no sequence parallelism here",
    "sequence_parallel_size": "there is no sequence parallelism here",
}

# Values that would be unsafe: path, the value, why and what instead.
UNSAFE = (
    (("bf16", "check_grad_overflow"), False, "a NaN gradient would reach the weights; remove it"),
    (("bf16", "bf16_master_weights_and_grads"), True, "master weights are fp32 here; remove it"),
    (("bf16", "bf16_optimizer_states"), True, "AdamW's moments are fp32 here; remove it"),
    (("zero_optimization", "compute_grad_norm"), False,
     "a NaN gradient would reach the weights, and nothing would be clipped; remove it"),
)
# DeepSpeed has several names for each, and looks at the first one only when the engine is built.
DTYPES = (("data_types", "grad_accum_dtype"), ("torch_autocast", "dtype"))

# Unless the file says otherwise. bf16 alone would add up and reduce gradients in bf16, where the
# smaller half of 8 additions is lost.
FP32_GRADIENTS = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
QUIET = {"steps_per_print": 10**9, "log_level": "warning"}


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """The engine's JSON with its keys and values checked, ours and DeepSpeed's own rules.

    Raises:
        ConfigError: in one line that names the file, the key and the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"deepspeed={path}: no such file; the shipped ones are in ds_configs/")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    try:
        check_ds_config(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


def check_ds_config(values: Any) -> None:
    """ConfigError at the first key or value that this trainer or DeepSpeed cannot use."""
    if not isinstance(values, dict):
        raise ConfigError(f"a JSON {type(values).__name__}, not an object")
    for key in values:
        if key in OWNED_BY_YAML:
            raise ConfigError(f"key '{key}' belongs to the experiment: remove it and set "
                              f"{OWNED_BY_YAML[key]} in the YAML")
        if key in REFUSED:
            raise ConfigError(f"key '{key}' is not used here: {REFUSED[key]}; remove it")
    _check_block(OFFERED, values, "")
    micro = values.get("train_micro_batch_size_per_gpu")
    if not isinstance(micro, int) or micro < 1:
        raise ConfigError(
            f"train_micro_batch_size_per_gpu={micro!r} must be a whole number from 1"
        )
    for (block, key), value, why in UNSAFE:
        if values.get(block, {}).get(key) == value:
            raise ConfigError(f"{block}.{key}={json.dumps(value)}: {why}")
    for block, key in DTYPES:
        given = values.get(block, {}).get(key)
        if given is not None and not _is_fp32_or_bf16(given):
            raise ConfigError(f"{block}.{key}={json.dumps(given)} must be fp32 or bf16 (fp16 would "
                              "need a loss scale, which has no place here)")
    if values.get("bf16", {}).get("enabled") and zero_stage(values) == 0:
        raise ConfigError("zero_optimization.stage=0 with bf16 keeps no fp32 weights and no fp32 "
                          "gradients; use stage 1, or torch_autocast in place of bf16")
    _ask_deepspeed(values)


def _is_fp32_or_bf16(name: str) -> bool:
    try:
        return DtypeEnum(name) in (DtypeEnum.fp32, DtypeEnum.bf16)
    except ValueError:
        return False


def _check_block(known: Any, values: Any, prefix: str) -> None:
    """Keys and types of one block against its dict of keys or DeepSpeed's model of it."""
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix[:-1]}={json.dumps(values)} must be an object {{...}}")
    fields = known if isinstance(known, dict) else _model_fields(known)
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"unknown key '{prefix}{key}'; {nearest(key, list(fields))}")
        if value == "auto":  # DeepSpeed would take its default without a word
            raise ConfigError(f"{prefix}{key}=\"auto\" means nothing here; give a value")
        inside = fields[key]
        if isinstance(inside, dict) or _is_model(inside):
            if value is not None or not prefix or isinstance(inside, dict):
                _check_block(inside, value, f"{prefix}{key}.")
        elif inside is not None and (not isinstance(value, inside)
                                     or (isinstance(value, bool) and inside is not bool)):
            kinds = inside if isinstance(inside, tuple) else (inside,)
            raise ConfigError(f"{prefix}{key}={json.dumps(value)} must be "
                              f"{' or '.join(kind.__name__ for kind in kinds)}")


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _model_fields(model: type[BaseModel]) -> dict[str, Any]:
    """JSON key -> bool where only that will do, model of a block, or None: pydantic's to judge.

    Deprecated keys are left out: DeepSpeed rewrites them with a warning that nobody reads.
    """
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            continue
        options = typing.get_args(field.annotation) or (field.annotation,)
        block = next((option for option in options if _is_model(option)), None)
        only_bool = set(options) - {type(None)} == {bool}
        fields[field.alias or name] = block or (bool if only_bool else None)
    return fields


def _ask_deepspeed(values: dict[str, Any]) -> None:
    """DeepSpeed's own checks, as one line. Batch keys are ours: outside a job its world is 1."""
    try:
        DeepSpeedConfig(dict(values))
    except (ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:
        errors = getattr(error, "errors", None)  # pydantic's; its text is a page
        text = str(error)
        if errors is not None:
            first = errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            text = f"{key}={first['input']!r}: {first['msg']}"
        raise ConfigError(f"refused by DeepSpeed: {' '.join(text.split())}") from error


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
    wrapped = values.get("bf16", {}).get("enabled") and zero_stage(values)
    safe = FP32_GRADIENTS if wrapped else {}
    return QUIET | safe | values | {
        "train_batch_size": global_batch,
        "gradient_accumulation_steps": accumulation_steps(global_batch, micro, world_size),
        "gradient_clipping": gradient_clipping,
    }


def zero_stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))
