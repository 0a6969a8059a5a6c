"""Training on two shapes with clips without sound: equal losses on any ranks and engine."""

import json

import pytest

from tests.data.loading.test_sources import LONG
from tests.support.inputs.prepared import write_shards
from tests.support.launch import records, run_ranks
from tests.support.models.tiny import write_tangoflux, write_wan

STEPS = 6


@pytest.mark.slow
def test_mixed_streams_train_alike_on_any_ranks(tmp_path):
    write_wan(tmp_path / "wan")
    write_tangoflux(tmp_path / "tangoflux")
    write_shards(tmp_path / "short", 18, 2, silent=2, seed=1, prefix="short-")
    write_shards(tmp_path / "long", 10, 2, silent=3, seed=2, prefix="long-", **LONG)
    (tmp_path / "run.yaml").write_text(f"""
run_dir: {tmp_path}/default
wan: {tmp_path}/wan
tangoflux: {tmp_path}/tangoflux
model: {{num_joint_blocks: 2}}
data: {{streams: [{{root: {tmp_path}/short}}, {{root: {tmp_path}/long}}], num_workers: 0}}
optimizer: {{lr: 1.0e-3}}
warmup_steps: 0
global_batch_size: 4
max_steps: {STEPS}
validate_every: {STEPS}
save_every: 1000
""")
    for ranks, runs in ((1, [("alone", 0, 1)]), (2, [("two", 0, 2), ("three", 3, 1)])):
        spec = []
        for name, stage, micro in runs:
            engine = tmp_path / f"{name}.json"
            zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
            engine.write_text(json.dumps(
                {"train_micro_batch_size_per_gpu": micro, "zero_optimization": zero}))
            spec.append({"config": str(tmp_path / "run.yaml"),
                         "overrides": [f"run_dir={tmp_path}/{name}", f"deepspeed={engine}"]})
        (tmp_path / f"spec{ranks}.json").write_text(json.dumps(spec))
        run_ranks(ranks, "tests/support/workers/train_worker.py",
                  str(tmp_path / f"spec{ranks}.json"))
    for tag in ("train/loss_video", "train/loss_audio", "train/grad_norm",
                "validation/loss_video", "validation/loss_audio"):
        expected = records(tmp_path / "alone", tag)
        assert expected, tag
        for name in ("two", "three"):
            assert records(tmp_path / name, tag) == pytest.approx(expected, rel=5e-5)
    losses = records(tmp_path / "alone", "train/loss_audio")
    assert sorted(losses) == list(range(1, STEPS + 1)) and min(losses.values()) > 0
