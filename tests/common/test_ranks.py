"""Ranks from every launcher, and contradictions named."""

import pytest

from common.ranks import World, WorldError, export_world, resolve_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
            "TORCHELASTIC_RUN_ID": "x"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_ID": "123"}


@pytest.mark.parametrize(
    ("environ", "source"),
    [(TORCHRUN, "torchrun"), (DEEPSPEED, "deepspeed launcher"), (SRUN, "srun")],
)
def test_launchers_agree(environ, source):
    assert resolve_world(environ) == World(5, 8, 1, 4, source)


def test_alone_also_inside_a_batch_script():
    assert resolve_world({}) == World(0, 1, 0, 1, "alone")
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}  # no step: not srun
    assert resolve_world(batch).source == "alone"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_RANK": "3"}, "must be local rank"),
        ({"RANK": "8"}, "must be below world size"),
        ({"LOCAL_WORLD_SIZE": "3"}, "must divide world size"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(WorldError, match=message):
        resolve_world(TORCHRUN | changes)


def test_missing_local_world_size_and_uneven_steps():
    bare = {key: value for key, value in DEEPSPEED.items() if key != "LOCAL_SIZE"}
    with pytest.raises(WorldError, match="LOCAL_WORLD_SIZE is not set"):
        resolve_world(bare)
    with pytest.raises(WorldError, match="same number of tasks"):
        resolve_world(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2"})


def test_export_sets_what_streaming_and_deepspeed_read():
    environ = dict(SRUN, MASTER_ADDR="node0")
    export_world(resolve_world(environ), environ)
    assert (environ["RANK"], environ["LOCAL_WORLD_SIZE"], environ["MASTER_PORT"]) == (
        "5", "4", "20123")
    with pytest.raises(WorldError, match="MASTER_ADDR is not set but 2 nodes"):
        export_world(resolve_world(SRUN), dict(SRUN))
    environ = {}
    export_world(resolve_world(environ), environ)
    assert environ["MASTER_ADDR"] == "127.0.0.1" and int(environ["MASTER_PORT"]) > 0
