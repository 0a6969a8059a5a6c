"""Forty slips of the hand, through `train.py CONFIG check=true`: each ends with 78 and one line
that names the key and what was meant, before anything is built."""

import json

import pytest

import train
from tests.support.faults import write_world

# (on the command line, what the one line must say)
OVERRIDES = [
    ("max_step=9", "unknown key 'max_step'; did you mean 'max_steps'?"),
    ("maxsteps=9", "did you mean 'max_steps'?"),
    ("Max_steps=9", "did you mean 'max_steps'?"),
    ("global_batch=8", "did you mean 'global_batch_size'?"),
    ("batch_size=8", "did you mean 'global_batch_size'?"),
    ("lr=1e-5", "unknown key 'lr'; did you mean 'optimizer.lr'?"),
    ("learning_rate=1e-5", "unknown key 'learning_rate'; did you mean 'optimizer.lr'?"),
    ("optimiser.lr=1e-5", "unknown key 'optimiser'; did you mean 'optimizer'?"),
    ("optimizer.learning_rate=1e-5", "did you mean 'optimizer.lr'?"),
    ("optimizer.weight_decy=0", "did you mean 'optimizer.weight_decay'?"),
    ("optimizer.beta=[0.9,0.99]", "did you mean 'optimizer.betas'?"),
    ("optimizer.lr=-1e-5", "optimizer.lr=-1e-05 must be above 0"),
    ("optimizer.lr=1e-5e", "optimizer.lr='1e-5e'"),
    ("warmup=10", "did you mean 'warmup_steps'?"),
    ("save_evry=10", "did you mean 'save_every'?"),
    ("save_every=0", "save_every=0 must be at least 1"),
    ("keep_checkpoints=1", "keep_checkpoints=1 must be at least 2"),
    ("gradient_cliping=1", "did you mean 'gradient_clipping'?"),
    ("task=t2va", "task='t2va'"),
    ("task=T2AV", "task='T2AV'"),
    ("model.num_joint_block=2", "did you mean 'model.num_joint_blocks'?"),
    ("model.fusion=ful", "model.fusion='ful' is unknown; use one of full, cross"),
    ("flow.caption_dropot=0.1", "did you mean 'flow.caption_dropout'?"),
    ("flow.density=unifrom", "flow.density='unifrom' is unknown; use ('uniform', "),
    ("data.rot=/x", "did you mean 'data.root'?"),
    ("data.root=/nowhere", "/nowhere"),
    ("guard.max_skip=3", "did you mean 'guard.max_skips'?"),
    ("recompute=ful", "recompute='ful'"),
    ("seed=one", "seed='one'"),
    ("deepspeed=ds_configs/zero4.json", "ds_configs/zero4.json: no such file"),
    ("max_steps:9", "override 'max_steps:9' must be key=value"),
]
# (JSON with it, what the one line must say); the rest of the file is in order
ENGINE = [
    ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'?"),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "did you mean 'overlap_comm'?"),
    ({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 1}},
     "did you mean 'stage3_prefetch_bucket_size'?"),
    ({"zero_optimization": {"stage": 3, "sub_group_siz": 1}}, "did you mean 'sub_group_size'?"),
    ({"bf16": {"enable": True}}, "did you mean 'enabled'?"),
    ({"train_micro_batch_size": 1}, "did you mean 'train_micro_batch_size_per_gpu'?"),
    ({"gradient_clipping": 1.0}, "remove it and set gradient_clipping in the YAML"),
    ({"zero_optimization": {"stage": "three"}}, "stage='three': Input should be 0, 1, 2"),
    ({"communication_data_typ": "fp32"}, "did you mean 'communication_data_type'?"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("typos"))


def refuse(world, capsys, *arguments: str) -> str:
    assert train.main([f"{world}/run.yaml", "check=true", *arguments]) == 78
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and error.count("\n") <= 1, error
    assert not (world / "runs").exists()
    return lines[0]


def test_there_are_forty():
    assert len(OVERRIDES) + len(ENGINE) == 40


@pytest.mark.parametrize(("typo", "message"), OVERRIDES, ids=[typo for typo, _ in OVERRIDES])
def test_a_slip_on_the_command_line_is_caught(world, capsys, typo, message):
    assert message in refuse(world, capsys, typo)


@pytest.mark.parametrize(("change", "message"), ENGINE, ids=[json.dumps(c) for c, _ in ENGINE])
def test_a_slip_in_the_engines_file_is_caught(world, capsys, change, message):
    engine = json.loads((world / "fp32_zero2.json").read_text()) | change
    (world / "slip.json").write_text(json.dumps(engine))
    assert message in refuse(world, capsys, f"deepspeed={world}/slip.json")
