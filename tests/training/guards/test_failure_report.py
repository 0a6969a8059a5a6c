"""failure_report.py: one folder says why a start failed, and the last line says where it is."""

import json
import time

import pytest
import torch

from common.errors import ExpectedError
from common.ranks import World
from model.objective import Batch
from tests.support.faults import Ranks, events, lines, status, write_world
from training.guards.failure_report import Failure, Last, is_out_of_memory

ALONE = World(0, 1, 0, 1, "alone")


def batch() -> Batch:
    one = torch.zeros(2, 3)
    return Batch(*[one] * 9, sample_ids=["x", "y"])


def test_a_crash_is_written_down_with_the_batch_in_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not for a log")
    with pytest.raises(ZeroDivisionError) as caught, \
            Failure(tmp_path, {"seed": 5}, ALONE) as failure:
        failure.last = Last(7, 1, batch(), torch.tensor([0.25, 0.5]))
        raise ZeroDivisionError("a bug")
    folder = failure.folder
    told = json.loads((folder / "rank00000.json").read_text())
    assert told["reason"] == "ZeroDivisionError: a bug"
    assert told["last"] == {"step": 7, "epoch": 1, "sample_ids": ["x", "y"], "t": [0.25, 0.5],
                            "shapes": dict.fromkeys(Batch._fields[:9], [2, 3])}
    assert told["environment"]["SLURM_JOB_ID"] == "4711"
    assert told["memory"]["peak_resident_bytes"] > 2**20
    assert "not for a log" not in "".join(path.read_text() for path in folder.iterdir())
    assert "ZeroDivisionError" in (folder / "rank00000.stacks.txt").read_text()
    assert json.loads((folder / "config.json").read_text()) == {"seed": 5}
    assert failure.read_alarm() == (1, failure.alarm.read_text()[2:])
    assert str(folder) in caught.value.__notes__[-1]  # Python prints it last


def test_what_explains_itself_leaves_no_folder(tmp_path):
    with pytest.raises(ExpectedError), Failure(tmp_path, {}, ALONE):
        raise ExpectedError("one line says it")
    with Failure(tmp_path, {}, ALONE):
        pass
    assert not (tmp_path / "failures").exists()


def test_the_first_rank_to_fail_gives_the_alarm(tmp_path):
    first = Failure(tmp_path, {}, ALONE)
    second = Failure(tmp_path, {}, ALONE)
    second.folder, second.world = first.folder, World(1, 2, 1, 2, "other")
    first.write("the cause", 1)
    second.write("a consequence", 76)
    code, words = second.read_alarm()
    assert code == 1 and "the cause" in words
    [alarm] = events(tmp_path, "alarm")
    assert (alarm["exit"], alarm["words"]) == (code, words)
    assert alarm["folder"] == str(first.folder)
    assert len(list(first.folder.glob("rank*.json"))) == 2


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
])
def test_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("shape"))


def test_a_real_allocation_that_fails_is_one():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.faults
def test_what_fails_on_one_rank_between_steps_ends_no_training(tmp_path):
    """Validation losses, gauges and decoders of rank 1 fail; both ranks hear it, and train on."""
    root = write_world(tmp_path)
    arguments = [f"{root}/run.yaml", f"run_dir={root}/run", "validate_every=4", "health_every=4",
                 "sample_every=8", "samples.num_steps=2"]
    codes, outputs = Ranks(2, arguments, {"kind": "blind", "rank": 1, "steps": [0]}).finish()
    assert codes == [0, 0], outputs
    told = "failed and training goes on: rank 1: RuntimeError: no memory to look with"
    for what in ("validation at step 0", "validation at step 8", "looking inside at step 4"):
        assert f"warning: {what} {told}" in outputs[0], what
    assert ("warning: sampling at step 8 failed and training goes on: rank 1: DataError: wan=gone: "
            "no such folder") in outputs[0]
    records = lines(root / "run" / "metrics.jsonl")
    assert not any("validation/loss_video" in record for record in records)
    assert [record["step"] for record in records if "train/loss" in record] == list(range(1, 9))
    assert any("health/update_ratio_video_tower" in record for record in records)
    assert not list((root / "run").glob("failures/*"))
    # A start that was to validate and could not has failed.
    codes, outputs = Ranks(1, [*arguments, "validate_only=true"],
                           {"kind": "blind", "rank": 0, "steps": [0]}).finish()
    assert codes == [1] and "no memory to look with" in outputs[0]
    assert "validated" not in outputs[0]


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "reason"), [("crash", "a bug of ours"), ("memory", "memory")])
def test_a_crash_on_one_rank_ends_all_with_one_folder(tmp_path, kind, reason):
    root = write_world(tmp_path)
    ranks = Ranks(2, [f"{root}/run.yaml", f"run_dir={root}/run", "data.num_workers=1"],
                  {"kind": kind, "rank": 1, "steps": [5]})
    codes, outputs = ranks.finish()
    assert codes == [1, 1], outputs
    (folder,) = (root / "run" / "failures").iterdir()
    assert time.time() - folder.stat().st_mtime < 30, "the loader's workers kept a rank"
    assert {path.name for path in folder.glob("*.stacks.txt")} == {
        "rank00000.stacks.txt", "rank00001.stacks.txt"}
    assert reason in json.loads((folder / "rank00001.json").read_text())["reason"]
    assert "follows rank 1" in json.loads((folder / "rank00000.json").read_text())["reason"]
    last = outputs[1].strip().splitlines()[-1].removeprefix("[rank1]: ")  # torch's prefix
    assert last.startswith("error: rank 1:") and last.endswith(str(folder))
    assert ("train_micro_batch_size_per_gpu" in last) == (kind == "memory")
    # The run goes on from its last checkpoint.
    codes, outputs = Ranks(
        2, [f"{root}/run.yaml", f"run_dir={root}/run", "data.num_workers=1"]).finish()
    assert codes == [0, 0] and "resuming at step 3" in outputs[0]
    assert "to share" in outputs[0].strip().splitlines()[-1]  # no complaints after the summary
    assert status(root / "run")["state"] == "done"
