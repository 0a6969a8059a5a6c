"""What a run is, written into its checkpoints, and what may change when it is resumed.

Task, global batch size and model must stay: the weights or a step would mean something else. Any
other key that has a part in the numbers, as seed and data have, may be changed, but not unnoticed:
it is named with both values. FREE keys have no such part. A key that nobody thought of is named.
"""

import fnmatch
import importlib.metadata
import json

from common.settings import flatten
from training.checkpoint.retention import Found
from training.checkpoint.run_dir import CheckpointError

# Patterns of keys as they are flattened here; the first that matches decides.
FREE = (
    "config.run_dir", "config.max_steps", "config.*_every", "config.keep_checkpoints",
    "config.check*", "config.self_check", "config.timeout_minutes", "config.recompute",
    "config.validation_samples", "config.validate_only", "config.samples.*", "config.peak_tflops",
    "config.deepspeed",
    "config.wan", "config.tangoflux",  # only read at a fresh start; their shapes are the model's
    # Places and processes; what the data are is `data`, which version of them `fingerprints`.
    "config.data.*root", "config.data.*remote", "config.data.*cache*", "config.data.*workers*",
    "config.data.*timeout*", "config.data.*retries", "config.data.validation_split",
    "deepspeed.train_*", "deepspeed.gradient_accumulation_steps", "deepspeed.gradient_clipping",
    "deepspeed.zero_optimization.*", "deepspeed.activation_checkpointing*", "deepspeed.log_level",
    "deepspeed.steps_per_print", "deepspeed.checkpoint*", "deepspeed.*timers*",
    "deepspeed.wall_clock_breakdown", "deepspeed.flops_profiler*", "deepspeed.comms_logger*",
    "model.*",  # compared by itself
    "config.watchdog.*", "config.world_size",
)
FORBIDDEN = {
    "config.task": "it is another model",
    "config.global_batch_size": "a step would stand for other samples",
}
VERSIONS = ("torch", "deepspeed", "mosaicml-streaming", "numpy")


def describe_run(config: dict, deepspeed: dict, model: dict, fingerprints: dict[str, str]) -> dict:
    """All that a checkpoint says of its run, as JSON reads it back.

    Args:
        config: the resolved RunConfig.
        deepspeed: the completed DeepSpeed JSON.
        model: the model's own config.
        fingerprints: stream of the data -> hash of its index files.
    """
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return json.loads(json.dumps({
        "config": config, "deepspeed": deepspeed, "model": model, "fingerprints": fingerprints,
        "versions": versions,
    }, default=str))


def check_resume(found: Found, now: dict, model_defaults: dict) -> list[str]:
    """What to say of resuming: checkpoints passed over, and every change worth naming.

    Raises:
        CheckpointError: for a change that must not be.
    """
    saved = found.contents.run
    lines = [f"WARNING: checkpoint {tag.name} is damaged ({told}): going back to {found.tag.name}"
             for tag, told in found.damaged.items()]
    lines += [f"WARNING: checkpoint {tag.name} cannot be read ({told}): going back to "
              f"{found.tag.name}; it is kept under another name"
              for tag, told in found.unread.items()]
    if saved:
        changed = changes(saved, now)  # first: another task has another model, and a plain name
        check_same_model(saved["model"], now["model"], model_defaults)
        lines += [f"changed since {found.tag.name}: {line}" for line in changed]
    return lines


def changes(saved: dict, now: dict) -> list[str]:
    """One line per key whose change is worth saying, `key: was X, is Y`.

    Raises:
        CheckpointError: for a key that must not change.
    """
    # An empty section has no value of its own to change.
    old, new = ({key: value for key, value in flatten(values).items() if value != {}}
                for values in ({key: saved.get(key) for key in now}, now))
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after or (key not in old and after is None):
            continue
        if key in FORBIDDEN:
            name = key.split(".", 1)[1]
            raise CheckpointError(
                f"{name}={after}, but the checkpoint was trained with {name}={before}: "
                f"{FORBIDDEN[key]}; set it back or take another run_dir"
            )
        if not any(fnmatch.fnmatch(key, pattern) for pattern in FREE):
            lines.append(f"{key.removeprefix('config.')}: was {before}, is {after}")
    return lines


def check_same_model(saved: dict, model: dict, defaults: dict) -> None:
    """Refuse to resume another model, before anything is built.

    A key younger than the checkpoint had the value that is its default now.
    """
    now = json.loads(json.dumps(model))
    before = json.loads(json.dumps(defaults)) | saved
    for key in sorted(now):
        if before.get(key) != now[key]:
            raise CheckpointError(
                f"the checkpoint was trained with {key}={before.get(key)}, this run has "
                f"{key}={now[key]}: take the same settings or another run_dir"
            )
