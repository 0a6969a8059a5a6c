"""resume.py: what may change between a run and its resumption, and what is said."""

import copy
import dataclasses
import fnmatch
from pathlib import Path

import pytest

from config import RunConfig, SamplesConfig
from data.loading.sources import DataConfig
from training.checkpoint.contents import Contents
from training.checkpoint.resume import FREE, changes, check_resume, check_same_model, describe_run
from training.checkpoint.retention import Found
from training.checkpoint.run_dir import CheckpointError
from training.guards.watchdog import WatchdogConfig

CONFIG = {
    "run_dir": "runs/a", "task": "t2av", "seed": 0, "global_batch_size": 8, "max_steps": 100,
    "optimizer": {"lr": 1e-5, "betas": (0.9, 0.999)}, "save_every": 10, "ema_decay": None,
    "gradient_clipping": 1.0, "keep_checkpoints": 2,
    "data": {"root": "shards/a", "num_workers": 2, "shuffle": True},
}
DEEPSPEED = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True},
             "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}
MODEL = {"num_joint_blocks": 2, "video": {"patch_size": (1, 2, 2)}}


def described(**values) -> dict:
    """A run with `a__b=c` replaced in its parts."""
    parts = copy.deepcopy({"config": CONFIG, "deepspeed": DEEPSPEED, "model": MODEL,
                           "fingerprints": {"data": "1234"}})
    for key, value in values.items():
        *path, last = key.split("__")
        inner = parts
        for name in path:
            inner = inner[name]
        inner[last] = value
    return describe_run(**parts)


def test_nothing_changed_is_nothing_said():
    assert changes(described(), described()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config__run_dir", "runs/moved"), ("config__max_steps", 200), ("config__save_every", 5),
        ("config__keep_checkpoints", 4), ("config__data__root", "/elsewhere/a"),
        ("config__data__num_workers", 0), ("deepspeed__zero_optimization__stage", 2),
        ("deepspeed__train_micro_batch_size_per_gpu", 4),
        ("deepspeed__gradient_accumulation_steps", 1),
    ],
)
def test_free_to_change(key, value):
    assert changes(described(), described(**{key: value})) == []


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("config__seed", 1, "seed: was 0, is 1"),
        ("config__optimizer__lr", 2e-5, "optimizer.lr: was 1e-05, is 2e-05"),
        ("config__optimizer__betas", (0.9, 0.95), "optimizer.betas: was [0.9, 0.999], is"),
        ("config__gradient_clipping", 2.0, "gradient_clipping: was 1.0, is 2.0"),
        ("config__ema_decay", 0.999, "ema_decay: was None, is 0.999"),
        ("config__data__shuffle", False, "data.shuffle: was True, is False"),
        ("config__never_heard_of", 3, "never_heard_of: was None, is 3"),
        ("deepspeed__bf16__enabled", False, "deepspeed.bf16.enabled: was True, is False"),
        ("fingerprints__data", "5678", "fingerprints.data: was 1234, is 5678"),
    ],
)
def test_named_with_both_values(key, value, line):
    [said] = changes(described(), described(**{key: value}))
    assert said.startswith(line)


def test_an_empty_section_that_is_filled_is_one_change():
    saved, now = described(), described()
    saved["deepspeed"]["monitor"], now["deepspeed"]["monitor"] = {}, {"enabled": True}
    assert changes(saved, now) == ["deepspeed.monitor.enabled: was None, is True"]
    assert not changes(saved, described())


def test_another_version_of_a_package_is_named():
    saved = described()
    saved["versions"]["torch"] = "1.0"
    [said] = changes(saved, described())
    assert said.startswith("versions.torch: was 1.0, is ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("config__global_batch_size", 16,
         "global_batch_size=16, but the checkpoint was trained with global_batch_size=8"),
        ("config__task", "t2v", "task=t2v, but the checkpoint was trained with task=t2av"),
    ],
)
def test_refused(key, value, message):
    with pytest.raises(CheckpointError, match=message):
        changes(described(), described(**{key: value}))


def test_every_free_key_is_one_of_the_configuration():
    """A renamed key must not leave a pattern behind that frees nothing."""
    keys = {f"config.{field.name}" for field in dataclasses.fields(RunConfig)}
    parts = {"data": DataConfig, "watchdog": WatchdogConfig, "samples": SamplesConfig}
    for part, cls in parts.items():
        keys |= {f"config.{part}.{field.name}" for field in dataclasses.fields(cls)}
    for pattern in FREE:
        if pattern.startswith("config."):
            assert fnmatch.filter(keys, pattern), pattern


def found(run: dict, damaged: dict | None = None) -> Found:
    contents = Contents(4, 1, 4, 0, {}, ["weight", "exp_avg", "exp_avg_sq"], [], {}, run)
    return Found(Path("runs/a/checkpoints/step00000004"), contents, damaged or {}, {})


def test_what_is_said_of_a_resume():
    damaged = {Path("runs/a/checkpoints/step00000006"): "weight-00000 differs"}
    lines = check_resume(found(described(), damaged), described(config__seed=1), MODEL)
    assert lines == [
        "WARNING: checkpoint step00000006 is damaged (weight-00000 differs): going back to "
        "step00000004",
        "changed since step00000004: seed: was 0, is 1",
    ]
    with pytest.raises(CheckpointError, match="num_joint_blocks=2, this run has"):
        check_resume(found(described()), described(model__num_joint_blocks=3), MODEL)


def test_a_run_older_than_a_key_resumes_with_its_default_alone():
    saved = {"num_joint_blocks": 2, "video": {"patch_size": [1, 2, 2]}}
    model = {"num_joint_blocks": 2, "video": {"patch_size": (1, 2, 2)}, "fusion": "full"}
    check_same_model(saved, model, {"num_joint_blocks": 18, "fusion": "full"})
    for other in ({"fusion": "cross"}, {"num_joint_blocks": 18}):
        with pytest.raises(CheckpointError, match="was trained with"):
            check_same_model(saved, model | other, {"num_joint_blocks": 18, "fusion": "full"})
