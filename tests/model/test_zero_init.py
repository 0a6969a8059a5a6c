"""What DeepSpeed makes of the model: equal parameters, the dtype table, memory of loading.

zero.Init partitions a module as soon as its own __init__ returns; a parent that then writes a
child's weight writes into an empty tensor, without an error. Hence: modules initialise themselves.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[2] / "tests/support/workers/zero_init_worker.py"


@pytest.fixture(scope="module")
def result():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja
        # Freed tensors leave the process at once: else the allocator may keep up to 64 MiB of
        # them, by chance, and they would be measured as held.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    run = subprocess.run(
        [sys.executable, str(WORKER)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


def test_zero_init_builds_the_same_parameters(result):
    for build in (result, *result["variants"]):
        assert build["differing"] == []
        assert build["found"] == build["parameters"] == build["partitioned"] > 100


def test_loading_under_zero_init_holds_no_second_copy(result):
    """One tensor at a time: what is held beside the shards is a few tensors, not the model."""
    loading = result["loading"]
    assert loading["model_mib"] > 100 and loading["largest_mib"] < 0.05 * loading["model_mib"]
    assert loading["held"] <= 1
    assert loading["growth_mib"] < 0.25 * loading["model_mib"], loading


# In every build.
FLOAT32 = {"wan modulation", "wan norm input", "rope tables", "duration angles", "velocities"}
ERRORS = {"rope error", "long rope error", "rotation error", "sinusoid error"}  # against float64


def test_dtype_table(result):
    """Weights follow the engine; what the originals compute in float32 stays float32."""
    for build, weights in (("plain", "float32"), ("bf16 engine", "bfloat16"),
                           ("zero.Init", "bfloat16")):
        table = result["dtypes"][build]
        assert table.pop("buffers") == "none", build  # zero.Init would cast them
        for name in ERRORS:
            assert table.pop(name) < 1e-6, (build, name)
        for name in FLOAT32:
            assert set(table.pop(name).split(", ")) == {"float32"}, (build, name)
        assert set(table.values()) == {weights}, (build, table)
