"""What one experiment is: every key of its YAML, and all that can be known before it is built.

Called by train.py at every start, and by `check=true`, which stops here and prints every resolved
value and where it comes from, before a job is queued.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from common.ranks import World
from common.settings import ConfigError, flatten, parse_overrides, read_yaml_file
from data.loading.sources import DataConfig, Opened, check_data
from data.provenance import check_provenance
from model import AVFullDiTConfig, JointConfig
from model.flow import FlowConfig
from model.variants import renamed
from model.weights.load import check_weights, config_from_files
from training.checkpoint.contents import MANIFEST, read_contents
from training.checkpoint.resume import check_resume, describe_run
from training.checkpoint.retention import Found, complete_tags, find_checkpoint
from training.checkpoint.run_dir import CheckpointError
from training.ds_config import FP32_GRADIENTS, QUIET, complete_ds_config, read_ds_config
from training.engine import OptimizerConfig
from training.guards.bad_numbers import GuardConfig
from training.guards.watchdog import WatchdogConfig

DERIVED = {
    "gradient_accumulation_steps": "derived: global_batch_size / micro batch / ranks",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "gradient_clipping",
}


# A checkpoint that is older than a key of the model was trained with its default.
MODEL_DEFAULTS = dataclasses.asdict(AVFullDiTConfig())


@dataclass(frozen=True)
class SamplesConfig:
    """Samples while training: how many validation captions, and how they are drawn."""

    count: int = 4
    num_steps: int = 50
    guidance_video: float = 5.0
    guidance_audio: float = 4.5
    negative_prompts: bool = True  # Wan's and TangoFlux's; false: guided away from empty captions

    def __post_init__(self) -> None:
        for key in ("count", "num_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"samples.{key}={getattr(self, key)} must be at least 1")


@dataclass(frozen=True)
class RunConfig:
    """One experiment; every key of the YAML. The engine's knobs are in the `deepspeed` JSON."""

    run_dir: str
    wan: str  # diffusers-layout folder or hub id
    tangoflux: str  # TangoFlux's own files, folder or hub id
    data: DataConfig
    task: Literal["t2av", "t2v"] = "t2av"
    seed: int = 0
    model: JointConfig = field(default_factory=JointConfig)  # the ablations
    flow: FlowConfig = field(default_factory=FlowConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    warmup_steps: int = 100  # linear, then constant
    decay_steps: int = 0  # at the end, linear towards 0
    gradient_clipping: float = 1.0
    ema_decay: float | None = None  # of an average of the weights beside them; None: no average
    global_batch_size: int = 8
    max_steps: int = 7500
    deepspeed: str = "ds_configs/zero2.json"
    recompute: Literal["none", "full"] = "none"
    attention: str = "auto"
    self_check: bool = True  # at the first start: the stitched model contains both backbones
    check: Literal[False, True, "weights"] = False  # report on this, or the downloads, and stop
    world_size: int | None = None  # ranks that will run; for check=true away from the cluster
    log_every: int = 1
    health_every: int = 100  # norms of updates, attention between the modalities, loss by t
    sample_every: int | None = None  # None: never; needs the decoders in `wan` and `tangoflux`
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    peak_tflops: float | None = None  # of one device, for MFU; None: by its name
    validate_every: int | None = 500  # and at the start and the end; None: never
    validate_only: bool = False  # validation loss of the newest checkpoint, then stop
    validation_samples: int | None = None  # None: the whole validation split
    save_every: int = 500
    keep_checkpoints: int = 2  # the newest ones
    keep_every: int | None = None  # and those at multiples of this step, for ever
    timeout_minutes: float = 30.0  # of a collective
    guard: GuardConfig = field(default_factory=GuardConfig)  # bad numbers
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)  # hangs

    def __post_init__(self) -> None:
        for key in ("global_batch_size", "max_steps", "log_every", "validate_every", "save_every",
                    "validation_samples", "keep_every", "world_size", "health_every",
                    "sample_every"):
            if (getattr(self, key) or 1) < 1 or getattr(self, key) == 0:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("warmup_steps", "decay_steps", "gradient_clipping", "timeout_minutes"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key}={getattr(self, key)} must not be negative")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be between 0 and 1, or null")
        if self.keep_checkpoints < 2:  # the newest may be the one that is being written
            raise ValueError(f"keep_checkpoints={self.keep_checkpoints} must be at least 2")


class Plan(NamedTuple):
    """All that is known before a process group or a model exists."""

    streams: list[Opened]  # what the model is built from is the same in all of them
    model: AVFullDiTConfig
    deepspeed: dict[str, Any]
    about: dict[str, Any]  # what a checkpoint says of its run, and what a resume is held against
    notes: list[str]


def build_plan(config: RunConfig, world: World) -> Plan:
    """Read and check every file the run names except the weights, in seconds, on any machine."""
    if not config.check and config.world_size not in (None, world.world_size):
        raise ConfigError(f"world_size={config.world_size}, but {world.world_size} ranks run: "
                          "remove the key, or start that many")
    streams = check_data(config.data, config.global_batch_size)
    notes = check_provenance({stream.place: stream.metadata for stream in streams}, config.wan,
                             config.tangoflux if config.task == "t2av" else None)
    ds_config = complete_ds_config(
        read_ds_config(config.deepspeed), config.global_batch_size, config.gradient_clipping,
        config.world_size or world.world_size,
    )
    try:
        model = config_from_files(
            config.task, config.model, config.attention, config.wan, config.tangoflux,
            streams[0].metadata, streams[0].place,
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    about = describe_run(dataclasses.asdict(config), ds_config, dataclasses.asdict(model),
                         {stream.label: stream.version for stream in streams})
    return Plan(streams, model, ds_config, about, notes)


def find_resume(config: RunConfig, plan: Plan, world: World) -> tuple[Found | None, list[str]]:
    """The checkpoint that a start goes on from, and what there is to say of it; a collective.

    Raises:
        CheckpointError: the run has changed in what must stay, or no checkpoint is whole.
    """
    found = find_checkpoint(Path(config.run_dir), world)
    if found is None:
        return None, []
    return found, check_resume(_in_todays_words(found), plan.about, MODEL_DEFAULTS)


def _in_todays_words(found: Found) -> Found:
    """A checkpoint of an earlier commit, as this one would have described its run."""
    run = found.contents.run
    if not run:
        return found
    settings = run["config"] | {"model": renamed(run["config"]["model"])}
    run = run | {"config": settings, "model": renamed(run["model"])}
    return found._replace(contents=dataclasses.replace(found.contents, run=run))


def resume_lines(config: RunConfig, plan: Plan) -> list[str]:
    """What a start would go on from and what has changed since; sizes are checked, not hashes.

    Raises:
        CheckpointError: where the start would be refused.
    """
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise CheckpointError(f"run_dir={run_dir} is no folder: choose another")
    tags = complete_tags(run_dir)
    if not tags:
        if any(run_dir.glob(f"checkpoints/step*/{MANIFEST}")):
            raise CheckpointError(f"{run_dir}/checkpoints holds checkpoints but none is whole: "
                                  "move them away to start afresh")
        return [f"{run_dir}: no checkpoint; a start begins from the pretrained backbones"]
    found = Found(tags[-1], read_contents(tags[-1]), {}, {})
    changed = check_resume(_in_todays_words(found), plan.about, MODEL_DEFAULTS)
    return [f"a start resumes {found.tag}", *changed]


def check(config: RunConfig, world: World, arguments: list[str]) -> int:
    """check=true and check=weights: a report and the exit status; starts nothing.

    Raises:
        ExpectedError: what a start would be refused for.
    """
    if config.check == "weights":
        return report_weights(config)
    report(config, build_plan(config, world), arguments)
    return 0


def report(config: RunConfig, plan: Plan, arguments: list[str]) -> None:
    """check=true: every value with its source, and what a start would resume."""
    lines = report_lines(dataclasses.asdict(config), arguments, config.deepspeed, plan.deepspeed)
    notes = [f"note: {note}" for note in [*plan.notes, *resume_lines(config, plan)]]
    print("\n".join([*lines, *notes, "every check passed; nothing was built"]))


def report_weights(config: RunConfig) -> int:
    """check=weights: what the downloads hold; 78 when they do not fit."""
    from model.weights.encoder_headers import check_encoders  # slow, and no run needs it

    fits, text = check_weights(config.task, config.model, config.wan, config.tangoflux)
    fit, lines = check_encoders(config.task, config.wan, config.tangoflux)
    print("\n".join([text, *lines]))
    return 0 if fits and fit else 78


def sources(path: str | Path, arguments: list[str]) -> dict[str, str]:
    """Dotted key -> "override", or the name of the file that gives it; the last one wins."""
    chain: list[tuple[str, dict]] = []
    current: Path | None = Path(path)
    while current is not None:
        values, base = read_yaml_file(current)
        chain.append((str(current), values))
        current = None if base is None else current.parent / base
    found: dict[str, str] = {}
    for name, values in [*reversed(chain), ("override", parse_overrides(arguments))]:
        found |= dict.fromkeys(flatten(values), name)
    return found


def report_lines(
    config: dict[str, Any], arguments: list[str], ds_path: str, completed: dict[str, Any]
) -> list[str]:
    """`key = value  # source` for every key of the experiment and of what DeepSpeed gets.

    Args:
        config: resolved. arguments: train.py's. completed: the engine's config at `ds_path`.
    """
    given = sources(arguments[0], arguments[1:])
    rows = [(key, value, given.get(key, "default")) for key, value in flatten(config).items()]
    in_file, ours = flatten(read_ds_config(ds_path)), flatten(QUIET | FP32_GRADIENTS)
    engine = []
    for key, value in flatten(completed).items():
        source = ds_path if key in in_file else DERIVED.get(key)
        engine.append((key, value, source or ("default" if key in ours else "DeepSpeed")))
    return [*_aligned(rows), "", "DeepSpeed:", *_aligned(engine)]


def _aligned(rows: list[tuple[str, Any, str]]) -> list[str]:
    texts = [(f"{key} = {json.dumps(value, default=str)}", source) for key, value, source in rows]
    width = min(max((len(text) for text, _ in texts), default=0), 60)
    return [f"{text:<{width}}  # {source}" for text, source in texts]
