"""Plain build == deepspeed.zero.Init build, parameter by parameter.

zero.Init partitions a module as soon as its own __init__ returns; a parent that then writes a
child's weight writes into an empty tensor, without an error. Hence: modules initialise themselves.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("zero_init_worker.py")


def test_zero_init_builds_the_same_parameters():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja
    }
    run = subprocess.run(
        [sys.executable, str(WORKER)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.strip().splitlines()[-1])
    assert result["differing"] == []
    assert result["found"] == result["parameters"] == result["partitioned"] > 100
