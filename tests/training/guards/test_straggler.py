"""straggler.py: the slow rank is named, and whether it is its data or its compute."""


import pytest
import torch

from common.ranks import World
from tests.support.faults import events, lines, start_runs, write_world
from training.guards.straggler import Straggler


def test_alone_it_tells_both_parts():
    straggler = Straggler(World(0, 1, 0, 1, "alone"), torch.device("cpu"))
    straggler.waited(0.5)
    straggler.waited(1.5)
    with straggler.forward():
        pass
    values, words = straggler.compare(2)
    assert values["time/data_seconds"] == 1.0 and words.startswith("data 1.00 s  forward 0.0")
    assert straggler.compare(1)[0]["time/data_seconds"] == 0  # a period of its own


@pytest.mark.faults
def test_the_slow_rank_is_named_with_its_node(tmp_path):
    """Rank 1 sleeps in its forward passes; every rank's step takes as long."""
    root = write_world(tmp_path)
    said = start_runs(root, 2, {"run": {
        "overrides": ["max_steps=4", "log_every=2", "save_every=100"],
        "fault": {"kind": "slow", "rank": 1, "steps": [3, 4]},
    }})
    steps = {line["step"]: line for line in lines(root / "runs" / "run" / "metrics.jsonl")
             if "train/loss" in line}
    assert sorted(steps) == [2, 4]
    slow = steps[4]
    assert slow["time/forward_seconds_slowest"] > 0.4
    assert slow["time/forward_seconds_slowest"] - slow["time/forward_seconds"] > 0.15
    assert slow["time/forward_slowest_rank"] == 1
    host = events(root / "runs/run", "start")[0]["hosts"][0]
    last = [line for line in said.splitlines() if line.startswith("step 4/4  loss")][0]
    assert f"(rank 1 {host} 0." in last.split("forward")[1]
