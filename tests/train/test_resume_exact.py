"""A run that was cut and resumed is the run that was not: train.py itself, on real ranks.

Two streams of different shapes (buckets), epochs of five steps, accumulation, EMA, validation
between the cuts. On the same ranks everything is equal bit for bit: the checkpoints' hashes say
so of weights, moments and EMA. On other ranks, sums are rounded in another order.
"""

import itertools
import json
from pathlib import Path

import pytest

from tests.support.inputs.prepared import write_shards
from tests.support.launch import records, run_ranks
from tests.support.models.tiny import write_tangoflux, write_wan
from training.checkpoint.contents import read_contents
from training.checkpoint.save_load import read_weights

STEPS, GLOBAL_BATCH = 7, 4
TAGS = ("train/loss_video", "train/loss_audio", "train/grad_norm")
ENGINES = {
    "fp32_zero3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "fp32_zero2": {"zero_optimization": {"stage": 2}},
    "fp32_zero0": {},
    **{f"bf16_zero{stage}": {
        "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage}} for stage in (1, 2, 3)},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    write_wan(root / "wan")
    write_tangoflux(root / "tangoflux")
    write_shards(root / "wide", train=13, validation=2)
    write_shards(root / "small", train=9, validation=1, seed=1, silent=3, height=32, width=32,
                 video_latent_shape=[48, 3, 2, 2])
    for name, values in ENGINES.items():
        (root / f"{name}.json").write_text(
            json.dumps({"train_micro_batch_size_per_gpu": 1} | values))
    (root / "run.yaml").write_text(f"""
run_dir: {root}/runs/default
wan: {root}/wan
tangoflux: {root}/tangoflux
model: {{num_joint_blocks: 1}}
data:
  streams: [{{root: {root}/wide}}, {{root: {root}/small}}]
  num_workers: 0
optimizer: {{lr: 1.0e-3, lr_new: 2.0}}
ema_decay: 0.75
warmup_steps: 3
global_batch_size: {GLOBAL_BATCH}
max_steps: {STEPS}
validate_every: 5
validation_samples: 2
save_every: 1000
self_check: false
deepspeed: {root}/fp32_zero3.json
""")
    return root


def run(world: Path, ranks: int, *runs: tuple[str, ...]) -> None:
    """(run directory, override, ...) of each run, one after the other in the same processes."""
    spec = [{"config": f"{world}/run.yaml", "overrides": [f"run_dir={world}/runs/{name}", *more]}
            for name, *more in runs]
    path = world / "spec.json"
    path.write_text(json.dumps(spec))
    run_ranks(ranks, "tests/support/workers/train_worker.py", str(path))


def drawn(run_dir: Path) -> list[str]:
    """Epoch, sample, t and digests of what was drawn, of every sample of every step, once."""
    lines = sorted(line for path in run_dir.glob("drawn_rank*.jsonl")
                   for line in path.read_text().splitlines())
    assert len(lines) == len(set(lines)) == STEPS * GLOBAL_BATCH
    return lines


def assert_equal_bits(left: Path, right: Path, validations: int) -> None:
    for tag in TAGS:
        assert records(left, tag) == records(right, tag)
    for tag in ("validation/loss_video", "validation/loss_video_ema"):
        expected, got = records(left, tag), records(right, tag)  # one more at a cut
        assert len(expected) == validations and {step: got[step] for step in expected} == expected
    assert drawn(left) == drawn(right)
    ends = [read_contents(path / f"checkpoints/step{STEPS:08d}") for path in (left, right)]
    assert ends[0].files == ends[1].files and ends[0].groups == ends[1].groups
    assert {name.split("-")[0] for name in ends[0].files} == {
        "weight", "exp_avg", "exp_avg_sq", "ema"}


@pytest.mark.faults(seconds=60)
def test_cut_and_resumed_is_the_same_run(world):
    """Cut within an epoch and at its end, with other loader workers; and moved to one rank and to
    another ZeRO stage."""
    runs = world / "runs"
    run(world, 2, ("straight",), ("cut", "max_steps=3"),
        ("cut", "max_steps=5", "data.num_workers=1"), ("cut",),
        ("moved", "max_steps=4", "validate_every=null"))
    run(world, 1, ("moved", "validate_every=null", f"deepspeed={world}/fp32_zero2.json"))
    assert_equal_bits(runs / "straight", runs / "cut", 3)  # at 0, 5 and 7
    assert len({json.loads(line)["epoch"] for line in drawn(runs / "straight")}) == 2
    assert drawn(runs / "straight") == drawn(runs / "moved")
    for tag in TAGS:
        expected = records(runs / "straight", tag)
        assert len(set(expected.values())) == STEPS
        assert records(runs / "moved", tag) == pytest.approx(expected, rel=1e-4)
    for ema in (False, True):
        _, weights = read_weights(runs / "straight", ema=ema)
        _, moved = read_weights(runs / "moved", ema=ema)
        for name in weights:
            assert (weights[name] - moved[name]).abs().max() < 1e-4, name


@pytest.mark.faults(seconds=120)
def test_every_engine_resumes_bit_for_bit(world):
    """The cut run measures validation losses once more, at the cut."""
    uses = {name: (f"deepspeed={world}/{name}.json", f"validate_every={STEPS}")
            for name in ENGINES if name != "fp32_zero3"}
    run(world, 2, *[(f"straight_{name}", *use) for name, use in uses.items()],
        *[(f"cut_{name}", *use, "max_steps=4") for name, use in uses.items()])
    run(world, 2, *[(f"cut_{name}", *use, "data.num_workers=2") for name, use in uses.items()])
    for name in uses:
        assert_equal_bits(world / "runs" / f"straight_{name}", world / "runs" / f"cut_{name}", 2)


@pytest.mark.faults(seconds=110)
def test_1_2_4_ranks_and_back(world):
    def go(ranks: int, *runs: tuple[str, ...]) -> None:  # no validation loss is asked for below
        run(world, ranks, *((*one, "validate_every=null") for one in runs))

    go(1, ("alone",), *[(f"from1to{to}", "max_steps=3") for to in (2, 4)])
    go(2, ("from1to2",), *[(f"from2to{to}", "max_steps=3") for to in (1, 4)])
    go(4, ("from1to4",), ("from2to4",), *[(f"from4to{to}", "max_steps=3") for to in (1, 2)])
    go(2, ("from4to2",))
    go(1, ("from2to1",), ("from4to1",))
    runs = world / "runs"
    for start, end in itertools.permutations((1, 2, 4), 2):
        name = f"from{start}to{end}"
        assert drawn(runs / name) == drawn(runs / "alone")
        for tag in TAGS:
            expected = records(runs / "alone", tag)
            assert records(runs / name, tag) == pytest.approx(expected, rel=1e-4), name
