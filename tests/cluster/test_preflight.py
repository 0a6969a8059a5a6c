"""cluster.preflight: what two real ranks find, who is blamed for what, a rank that is silent."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cluster import node_report, preflight
from cluster.node_report import judge, look, read_code, unfetched, unreachable
from common import git as git_module
from common.git import short_commit
from common.ranks import World
from tests.support.launch import ROOT, environment

GOOD = {"host": "", "problems": [], "versions": {"torch": "2.11"}, "driver": "580", "code": "abc",
        "device": "NVIDIA H200", "clock": 1000.0, "seconds": 0.010, "node_seconds": 0.002}


def reports(**changes):
    """Three nodes with two ranks each; `changes` go into both reports of n2."""
    found = {}
    for rank in range(6):
        found[rank] = copy.deepcopy(GOOD) | {"host": f"n{rank // 2 + 1}"}
        if rank // 2 == 1:
            found[rank] |= changes
    return found


@pytest.mark.parametrize(("changes", "words"), [
    ({"clock": 1060.0}, "clock is +60 s off"),
    ({"versions": {"torch": "2.10"}}, "versions {'torch': '2.10'} differs from"),
    ({"driver": "550"}, "driver 550 differs from \"580\""),
    ({"code": "abc +1 file changed"}, "code abc +1 file changed differs from \"abc\""),
    ({"device": "NVIDIA H100"}, "device NVIDIA H100 differs"),
    ({"seconds": 0.016}, "rank 2: matrix product took 16.0 ms, median 10.0 ms"),
    ({"node_seconds": 0.009}, "rank 2: all-reduce in the node took 9.0 ms, median 2.0 ms"),
    ({"problems": ["data.root=/x is not reachable"]}, "data.root=/x is not reachable"),
])
def test_the_node_that_differs_is_named(changes, words):
    wrong = judge(reports(**changes))
    assert list(wrong) == ["n2"] and wrong["n2"][0].startswith(words)


def test_equal_nodes_are_good():
    assert judge(reports()) == {}
    assert judge(reports(seconds=0.014)) == {}  # within what clocks and heat do
    alone = {rank: report for rank, report in reports(node_seconds=0.009).items() if rank % 2}
    assert judge(alone) == {}  # a reduction among one rank sends nothing


def test_the_slow_one_of_two_is_named():
    """A mean of both would call 29 ms against 10 within 1.5 times the usual."""
    two = {rank: report | {"seconds": 0.010 + 0.019 * rank} for rank, report in enumerate(
        (reports()[0], reports()[2]))}
    assert list(judge(two)) == ["n2"]


def test_places_of_a_config_are_looked_at(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty").mkdir()
    values = {"run_dir": str(tmp_path), "wan": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
              "tangoflux": f"{tmp_path}/none",
              "data": {"root": f"{tmp_path}/full", "streams": [{"root": f"{tmp_path}/empty"}]}}
    assert unreachable(values) == [
        f"data.root={tmp_path}/empty is not reachable",
        f"tangoflux={tmp_path}/none is not reachable"]
    assert unreachable({"run_dir": f"{tmp_path}/other"}) == [
        f"run_dir={tmp_path}/other is not writable, or not the same on all nodes"]


@pytest.mark.parametrize("data", [None, "shards", {"streams": None}, {"streams": ["shards", 1]}])
def test_a_config_of_another_form_is_for_train_to_refuse(tmp_path, data):
    """Not for the nodes: a report that never came would blame them all."""
    values = {"run_dir": str(tmp_path), "data": data}
    assert unreachable(values) == [] == unfetched(values)


def test_remote_data_that_a_node_cannot_fetch_is_named(tmp_path, monkeypatch):
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    values = {"data": {"streams": [{"root": "shards"}, {"remote": "s3://bucket/far"}]}}
    report = look(values | {"run_dir": str(tmp_path)}, World(0, 1, 0, 1, "alone"))
    problems = [text for text in report["problems"] if text.startswith("data.remote")]
    assert len(problems) == 1
    assert problems[0].startswith("data.remote=s3://bucket/far is not reachable (")
    monkeypatch.setattr(node_report, "FETCH_SECONDS", 0.01)
    assert "s3://bucket/far is not reachable (no answer in" in unfetched(values)[0]


def test_two_edits_of_one_size_are_two_codes(tmp_path, monkeypatch):
    monkeypatch.setattr(git_module, "CHECKOUT", tmp_path)
    short_commit.cache_clear()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "x.py").write_text("a = 1\n")
    for words in (["init", "-q"], ["add", "x.py"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True, cwd=tmp_path)
    found = [read_code()]
    for text in (b"a = 2\n", b"a = 3\n", b"a = '\xff'\n"):
        (tmp_path / "x.py").write_bytes(text)
        found.append(read_code())
    short_commit.cache_clear()
    assert len(set(found)) == 4 and all(code.startswith(found[0]) for code in found), found


def start(rank, tmp_path, port, seconds=60):
    """A real rank of two, on a node of its own."""
    program = ("import sys, cluster.preflight as p; "
               f"p.ANSWER_SECONDS = {seconds}; sys.exit(p.main(sys.argv[1:]))")
    variables = {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURMD_NODENAME": f"n{rank + 1}",
        "NODE_NAMES": "n1 n2 ", "TMPDIR": str(tmp_path)}
    return subprocess.Popen(
        [sys.executable, "-c", program, "configs/playground.yaml", f"run_dir={tmp_path}/run",
         f"data.root={ROOT}/configs"], cwd=ROOT, env=environment() | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_ranks_report_and_reduce(tmp_path):
    port = 30000 + os.getpid() % 2000
    ranks = [start(rank, tmp_path, port) for rank in (0, 1)]
    said = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    lines = said[0][0].splitlines()
    assert lines[0].startswith("preflight: n1  1 x cpu") and lines[1].startswith("preflight: n2")
    assert lines[2].startswith("preflight: 2 ranks")


def test_a_rank_that_never_answers_is_named(tmp_path):
    process = start(0, tmp_path, 32000 + os.getpid() % 2000, seconds=5)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "error: preflight: n2: rank 1 did not answer" in error
    assert "submit again with --exclude=n2" in error


@pytest.mark.parametrize(("lost", "advice"), [
    (["n1", "n2"], "no node has it: make it"), (["n2"], "submit again with --exclude=n2"),
])
def test_what_no_node_has_is_not_the_nodes_fault(capsys, lost, advice):
    meeting = SimpleNamespace(world=World(0, 2, 0, 1, "srun"), store={})
    meeting.store = SimpleNamespace(set=lambda key, value: None)
    wrong = {name: ["data.root=/x is not reachable"] for name in lost}
    assert preflight.Meeting.verdict(meeting, wrong) == 1
    assert advice in capsys.readouterr().err
