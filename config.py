"""What one experiment is: every key of its YAML, and all that can be known before it is built.

Called by train.py at every start, and by `check=true`, which stops here and prints every resolved
value and where it comes from, before a job is queued.
"""

import dataclasses
import json
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from common.ranks import World
from common.settings import (
    STRICT,
    ConfigError,
    flatten,
    parse_overrides,
    read_yaml_file,
)
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


@dataclass(frozen=True, config=STRICT)
class SamplesConfig:
    """Samples while training, of the first validation captions."""

    count: Annotated[int, Field(ge=1, description="Captions to sample.")] = 4
    num_steps: Annotated[int, Field(ge=1, description="Euler steps.")] = 50
    guidance_video: Annotated[float, Field(
        ge=0, allow_inf_nan=False, description="Guidance of the video; 1: none.")] = 5.0
    guidance_audio: Annotated[float, Field(
        ge=0, allow_inf_nan=False, description="Guidance of the audio; 1: none.")] = 4.5
    negative_prompts: Annotated[bool, Field(
        description="Guide away from Wan's and TangoFlux's negative prompts, as their own samplers "
        "do; false: from empty captions, for encoders that never read that language.")] = True


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """One experiment; every key of the YAML. The engine's knobs are in the `deepspeed` JSON."""

    run_dir: Annotated[str, Field(description="Where the run keeps everything; one run each.")]
    wan: Annotated[str, Field(
        description="Wan2.2-TI2V-5B: a folder in diffusers' layout, or a hub id.")]
    tangoflux: Annotated[str, Field(
        description="TangoFlux's own files: a folder, or a hub id.")]
    data: DataConfig
    task: Annotated[Literal["t2av", "t2v"], Field(
        description="The joint model, or its video-only twin.")] = "t2av"
    seed: Annotated[int, Field(
        description="Of new weights, sample order, t, noise and caption dropout.")] = 0
    model: JointConfig = field(default_factory=JointConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    warmup_steps: Annotated[int, Field(
        ge=0, description="Updates over which the learning rate rises linearly.")] = 100
    decay_steps: Annotated[int, Field(
        ge=0, description="Updates at the end over which it falls linearly towards 0.")] = 0
    gradient_clipping: Annotated[float, Field(
        ge=0, description="Largest L2 norm of the whole gradient; 0: no clipping.")] = 1.0
    ema_decay: Annotated[float | None, Field(
        gt=0, lt=1, description="Of an exponential average of the weights; null: no average. The "
        "paper has none; common practice in diffusion.")] = None
    global_batch_size: Annotated[int, Field(
        ge=1, description="Samples of one update: micro batch x accumulation x ranks.")] = 8
    max_steps: Annotated[int, Field(ge=1, description="Updates in all.")] = 7500
    deepspeed: Annotated[str, Field(
        description="The engine: a DeepSpeed JSON.")] = "ds_configs/zero2.json"
    recompute: Annotated[Literal["none", "full"], Field(
        description="Recompute each block in the backward pass, which saves its activations' "
        "memory.")] = "none"
    attention: Annotated[str, Field(
        description="Attention kernel; auto: the fastest present for this GPU.")] = "auto"
    self_check: Annotated[bool, Field(
        description="At the first start, check that the stitched model contains both backbones; "
        "false saves the minutes that this takes on a slow disk.")] = True
    check: Annotated[Literal[False, True, "weights"], Field(
        description="Report on this configuration (true) or on the downloaded weights, and "
        "exit.")] = False
    world_size: Annotated[int | None, Field(
        ge=1, description="Number of ranks that will run, for check=true away from the "
        "cluster.")] = None
    log_every: Annotated[int, Field(
        ge=1, description="Steps of a record; it holds their mean.")] = 1
    health_every: Annotated[int, Field(
        ge=1, description="Steps between records of update ratios, attention between the "
        "modalities and losses by t; lower it to debug, raise it where a step is short.")] = 100
    sample_every: Annotated[int | None, Field(
        ge=1, description="Steps between samples; null: never. Needs the decoders in `wan` and "
        "`tangoflux`.")] = None
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    peak_tflops: Annotated[float | None, Field(
        gt=0, allow_inf_nan=False, description="bf16 peak of one device for MFU, where its name "
        "is not known; null: by name.")] = None
    validate_every: Annotated[int | None, Field(
        ge=1, description="Steps between validations, which also run at the start and the end; "
        "null: never.")] = 500
    validate_only: Annotated[bool, Field(
        description="Validate the newest checkpoint and exit.")] = False
    validation_samples: Annotated[int | None, Field(
        ge=1, description="Samples of a validation; null: the whole split.")] = None
    save_every: Annotated[int, Field(ge=1, description="Steps between checkpoints.")] = 500
    keep_checkpoints: Annotated[int, Field(
        ge=2, description="Newest checkpoints to keep; one of them may be half written.")] = 2
    keep_every: Annotated[int | None, Field(
        ge=1, description="Also keep every checkpoint at a multiple of this step, for curves over "
        "training; null: none.")] = None
    timeout_minutes: Annotated[float, Field(
        gt=0, description="Of a collective; raise it where loading takes long on a shared "
        "disk.")] = 30.0
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)


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
        raise CheckpointError(f"run_dir={run_dir} is not a folder: choose another")
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
