"""training/metrics/start_record.py: every start says what made the weights."""

import subprocess

from common import git as git_module
from common.ranks import World
from training.guards.run_state import read_state
from training.metrics import start_record

WORLD = World(0, 4, 0, 2, "srun")


def test_every_start_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    for first in (0, 500):
        start_record.write_start(tmp_path, WORLD, ["a", "a", "b", "b"], first, seed=7,
                         data={"x": "hash"}, weights={"wan": "w"}, resumed_from=None)
    starts = read_state(tmp_path).cards
    assert [start["first_step"] for start in starts] == [0, 500]
    assert starts[1]["world_size"] == 4 and starts[1]["hosts"] == ["a", "b"]
    assert starts[1]["job"]["SLURM_JOB_ID"] == "4711" and starts[1]["seed"] == 7
    assert {"torch", "deepspeed", "numpy"} <= starts[1]["packages"].keys()
    assert starts[1]["hardware"]["memory_gib"] > 1


def test_a_start_behind_a_torn_line_is_a_line(tmp_path):
    start_record.write_start(tmp_path, WORLD, ["a"], 0)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "start", "first_step": 2, "hos')  # a power cut
    start_record.write_start(tmp_path, WORLD, ["a"], 4)
    assert [start["first_step"] for start in read_state(tmp_path).cards] == [0, 4]


def test_the_code_is_its_commit_and_the_patch_that_is_not_in_it(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
                       cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(git_module, "CHECKOUT", tmp_path)
    assert start_record.describe_code(tmp_path) == {"commit": None}
    git("init")
    (tmp_path / "file.py").write_text("a = 1\n")
    git("add", "file.py")
    git("commit", "-m", "first")
    clean = start_record.describe_code(tmp_path)
    assert len(clean["commit"]) == 40 and not clean["dirty"]
    (tmp_path / "file.py").write_text("a = 2\n")
    (tmp_path / "a new file.py").write_text("b = 1\n")
    dirty = start_record.describe_code(tmp_path)
    assert dirty["dirty"] and dirty["untracked"] == ["a new file.py"]
    assert "+a = 2" in (tmp_path / dirty["patch"]).read_text()
