"""config.py and training/ds_config.py: mistakes are named before anything is built."""

import dataclasses
import json
from itertools import product

import pytest
import torch

import train
from common.ranks import World
from common.settings import ConfigError, load_config
from config import RunConfig, build_plan, sources
from tests.support.faults import write_world
from tests.support.launch import ROOT
from training.checkpoint.contents import read_contents, write_contents
from training.checkpoint.save_load import write_weights
from training.ds_config import OFFERED, check_ds_config, complete_ds_config, read_ds_config

MICRO = {"train_micro_batch_size_per_gpu": 1}
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
ENGINES = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # F37: DeepSpeed accepts each of these without a word.
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"gradient_cliping": 1}, "unknown key 'gradient_cliping'"),
        ({"checkpoint": {"load_universl": True}}, "'checkpoint' is not used here"),
        ({"data_types": {"grad_accum_dtyp": "fp32"}}, "did you mean 'grad_accum_dtype'"),
        ({"torch_autocast": {"enabled": "true"}}, 'torch_autocast.enabled="true" must be bool'),
        ({"torch_autocast": {"enable": True}}, "did you mean 'enabled'"),
        ({"flops_profiler": {"profile_stp": 3}}, "did you mean 'profile_step'"),
        ({"aio": {"queue_dpth": 3}}, "did you mean 'queue_depth'"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "means nothing here"),
        ({"timers": {"througput": {}}}, "did you mean 'throughput'"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown=1 must be bool"),
        # Its own models refuse these, over a page; here it is a line with the nearest key.
        ({"zero_optimization": {"stge": 1}}, "'zero_optimization.stge'; did you mean 'stage'"),
        ({"zero_optimization": {"stage": 5}}, "stage=5"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"devce": "cpu"}}},
         "'zero_optimization.offload_optimizer.devce'; did you mean 'device'"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "disk"}}}, "device"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": -1}}, "reduce_bucket_size=-1"),
        ({"zero_optimization": []}, "must be an object"),
        ({"zero_optimization": None}, "zero_optimization=null must be an object"),
        ({"data_types": {"grad_accum_dtype": "fp33"}}, '"fp33" must be fp32 or bf16'),
        ({"data_types": {"grad_accum_dtype": "half"}}, '"half" must be fp32 or bf16'),
        ({"torch_autocast": {"enabled": True, "dtype": "fp16"}}, '"fp16" must be fp32 or bf16'),
        ({"bf16": {"enabld": True}}, "'bf16.enabld'; did you mean 'enabled'"),
        ({"comms_logger": {"verbos": True}}, "did you mean 'verbose'"),
        ({"communication_data_type": "fp23"}, "communication_data_type"),
        ({"compile": {"deepcompil": True}}, "did you mean 'deepcompile'"),
        # What this trainer does not do, and what would be unsafe.
        ({"fp16": {"enabled": True}}, "use bf16 or torch_autocast"),
        ({"sequence_parallel_size": 2}, "no sequence parallelism"),
        ({"tensorboard": {"enabled": True}}, "training.metrics"),
        ({"gradient_allreduce_op": "sum"}, "scale the learning rate"),
        ({"elasticity": {"enabled": True}}, "unknown key 'elasticity'"),
        ({"bf16": {"enabled": True}}, "use stage 1"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False},
          "zero_optimization": {"stage": 2}}, "NaN gradient would reach the weights"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "NaN gradient"),
        ({"optimizer": {"type": "AdamW", "params": {"lrr": 1}}}, "belongs to the experiment"),
        ({"train_micro_batch_size_per_gpu": True}, "must be int"),
        ({"train_micro_batch_size_per_gpu": "1"}, "must be int"),
    ],
)
def test_every_mistake_is_one_line_that_names_it(values, message):
    with pytest.raises(ConfigError) as caught:
        check_ds_config(MICRO | values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_keys_inside_blocks_are_those_deepspeed_reads():
    """An upgrade that reads another key of a block without a model of its own fails here."""
    from deepspeed.runtime.config import DeepSpeedConfig

    from tests.common.test_settings import Spy

    blocks = {key: Spy({}) for key in ("torch_autocast", "data_types", "aio", "flops_profiler")}
    DeepSpeedConfig(Spy(MICRO | blocks))
    not_offered = {"data_types": {"param_dtype", "buffer_dtype", "keep_in_fp32_modules"}}
    for name, spy in blocks.items():
        asked = {key for key in spy.asked if isinstance(key, str)}
        assert asked <= set(OFFERED[name]) | not_offered.get(name, set()), name
    assert "grad_accum_dtype" in blocks["data_types"].asked
    assert "enabled" in blocks["flops_profiler"].asked


def test_bf16_gets_fp32_accumulation_and_reduction_unless_told_otherwise():
    bf16 = MICRO | {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    completed = complete_ds_config(bf16, 4, 1.0, 2)
    assert completed["communication_data_type"] == "fp32"
    assert completed["data_types"] == {"grad_accum_dtype": "fp32"}
    told = complete_ds_config(bf16 | {"communication_data_type": "bf16"}, 4, 1.0, 2)
    assert told["communication_data_type"] == "bf16"
    assert "data_types" not in complete_ds_config(MICRO, 4, 1.0, 2)


@pytest.mark.parametrize(("config", "engine"), product(CONFIGS, ENGINES))
def test_every_pair_in_the_repository_passes(config, engine):
    """At those of 1, 2 and 8 ranks that divide the global batch: at least one of them does."""
    made = load_config(RunConfig, ROOT / "configs" / config, [f"deepspeed=ds_configs/{engine}"])
    values = read_ds_config(ROOT / made.deepspeed)
    micro = values["train_micro_batch_size_per_gpu"]
    fits = [ranks for ranks in (1, 2, 8) if made.global_batch_size % (micro * ranks) == 0]
    assert fits, f"{made.global_batch_size} is no multiple of micro batch {micro}"
    for ranks in fits:
        completed = complete_ds_config(values, made.global_batch_size, 1.0, ranks)
        assert completed["gradient_accumulation_steps"] * micro * ranks == made.global_batch_size


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("check"))


def test_check_prints_every_value_with_its_source_and_builds_nothing(world, capsys):
    (world / "top.yaml").write_text("base: run.yaml\nwarmup_steps: 7\n")
    arguments = [f"{world}/top.yaml", "check=true", "world_size=2", "optimizer.lr=2e-5",
                 f"deepspeed={world}/bf16_zero2.json"]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    found = {line.split(" = ")[0]: line for line in out.splitlines() if " = " in line}
    for key, value, source in [
        ("warmup_steps", "7", f"{world}/top.yaml"), ("max_steps", "8", f"{world}/run.yaml"),
        ("optimizer.lr", "2e-05", "override"), ("seed", "0", "default"),
        ("gradient_accumulation_steps", "1", "derived: global_batch_size / micro batch / ranks"),
        ("zero_optimization.stage", "2", f"{world}/bf16_zero2.json"),
        ("communication_data_type", '"fp32"', "default"),
        ("train_batch_size", "8", "global_batch_size"),
    ]:
        left, right = found[key].split("  # ") if "  # " in found[key] else found[key].split(" # ")
        assert left.split(" = ")[1].strip() == value and right == source, key
    assert "every check passed; nothing was built" in out
    assert not (world / "runs").exists()


def test_check_holds_the_run_against_the_checkpoint_that_a_start_would_resume(
        world, tmp_path, capsys):
    arguments = [f"{world}/run.yaml", "check=true", f"run_dir={tmp_path}/run"]
    assert train.main(arguments) == 0
    assert "a start begins from the pretrained backbones" in capsys.readouterr().out
    config = load_config(RunConfig, arguments[0], arguments[1:])
    plan = build_plan(config, World(0, 1, 0, 1, "alone"))
    tag = write_weights(tmp_path / "run", 4, {"w": torch.zeros(2)})
    written = read_contents(tag)
    write_contents(tag, dataclasses.replace(written, run=plan.about))
    assert train.main([*arguments, "max_steps=99", "samples.count=1"]) == 0
    out = capsys.readouterr().out
    assert f"a start resumes {tag}" in out and "changed since" not in out
    assert train.main([*arguments, "seed=5"]) == 0
    assert "changed since step00000004: seed: was 0, is 5" in capsys.readouterr().out
    for override in ("task=t2v", "global_batch_size=4", "model.num_joint_blocks=1"):
        assert train.main([*arguments, override]) == 78
        key, value = override.removeprefix("model.").split("=")
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert f"{key}={value}" in error and f"trained with {key}=" in error
    (tag / "weight-00000.safetensors").unlink()
    assert train.main(arguments) == 78
    assert "holds checkpoints but none is whole" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["check=true", "world_size=3"], "world size 3 = 12"),
    (["world_size=2"], "world_size=2, but 1 ranks run"),
    (["check=maybe"], "check='maybe'"),
    (["guard.spke=skip"], "unknown key 'guard.spke'; did you mean 'guard.spike'"),
    (["guard.max_skips=0"], "guard.max_skips=0 must be at least 1"),
    (["watchdog.data=0"], "watchdog.data=0 must be above 0"),
])
def test_what_cannot_run_is_78(world, capsys, arguments, message):
    assert train.main([f"{world}/run.yaml", *arguments]) == 78
    assert message in capsys.readouterr().err


def test_arithmetic_off_the_cluster(world):
    config = load_config(RunConfig, world / "run.yaml",
                         ["check=true", "world_size=128", "global_batch_size=512"])
    with pytest.raises(Exception, match="has only 20 samples"):
        build_plan(config, World(0, 1, 0, 1, "alone"))
    values = read_ds_config(world / "fp32_zero2.json")
    assert complete_ds_config(values, 512, 1.0, 128)["gradient_accumulation_steps"] == 1


def test_the_last_source_wins(tmp_path):
    (tmp_path / "base.yaml").write_text("a: 1\nb: {c: 1, d: 1}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nb: {c: 2}\n")
    assert sources(tmp_path / "top.yaml", ["b.d=3"]) == {
        "a": f"{tmp_path}/base.yaml", "b.c": f"{tmp_path}/top.yaml", "b.d": "override"}


def test_the_resolved_config_is_json(world):
    config = load_config(RunConfig, world / "run.yaml", [])
    assert json.loads(json.dumps(dataclasses.asdict(config)))["guard"]["max_skips"] == 10
