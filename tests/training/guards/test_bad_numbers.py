"""bad_numbers.py: no bad number reaches the weights, on any engine; each is told and counted."""

import json
import math

import pytest
import torch

from cluster.requeue import decide
from common.ranks import World
from tests.support.faults import ENGINES, Ranks, events, lines, start_runs, status, write_world
from training.guards.bad_numbers import BadNumbersError, Drawn, Guard, GuardConfig

ALONE = World(0, 1, 0, 1, "alone")
FAST = ("fp32_zero0", "bf16_zero2")
BAD = {2: "nan_loss", 4: "nan_gradient", 5: "inf_loss"}  # step -> what is bad, on rank 1 only


def drawn(step: int) -> Drawn:
    return Drawn(step, 0, ["a", "b"], torch.tensor([0.1, 0.2]), torch.tensor([[1.0, 2.0]] * 2))


def go(guard: Guard, step: int, loss: float) -> tuple[bool, str | None]:
    """One step of a model of one number: (was it applied?, what was said)."""
    weight = torch.ones((), requires_grad=True)
    guard.screen(weight * loss, last=True).backward()
    applied = bool(weight.grad.isfinite())
    return applied, guard.judge(loss, applied, drawn(step), None)


def noisy(step: int) -> float:
    return 1.0 + 0.01 * math.sin(step)


def test_a_loss_that_is_not_finite_has_no_finite_gradient(tmp_path):
    guard = Guard(GuardConfig(), tmp_path, ALONE)
    assert go(guard, 1, 1.0) == (True, None)
    for step, loss in enumerate((math.nan, math.inf, -math.inf), 2):
        applied, said = go(guard, step, loss)
        assert not applied and "loss not finite" in said and "SKIPPED" in said
    told = events(tmp_path, "skip")
    assert [line["step"] for line in told] == [2, 3, 4]
    assert told[0]["samples"][0] == {"rank": 0, "id": "a", "t": pytest.approx(0.1),
                                     "losses": [1.0, 2.0]}


def test_it_stops_after_that_many_in_a_row_and_names_the_checkpoint(tmp_path):
    guard = Guard(GuardConfig(max_skips=3), tmp_path, ALONE)
    for step in (1, 2):
        go(guard, step, math.nan)
    go(guard, 3, 1.0)  # the row is broken
    for step in (4, 5):
        go(guard, step, math.nan)
    guard.screen(torch.tensor(math.nan, requires_grad=True), last=True)
    with pytest.raises(BadNumbersError, match=r"max_skips=3 .*last good checkpoint: /run/step6"):
        guard.judge(math.nan, False, drawn(6), "/run/step6")


@pytest.mark.parametrize("action", ["log", "skip", "stop"])
def test_an_infinite_loss_is_no_spike(tmp_path, action):
    """One is skipped and counted like a NaN, whatever is to be done about spikes."""
    guard = Guard(GuardConfig(spike=action, max_skips=2), tmp_path, ALONE)
    for step in range(1, 101):
        go(guard, step, noisy(step))
    applied, said = go(guard, 101, math.inf)
    assert not applied and "loss not finite" in said and "spike" not in said
    with pytest.raises(BadNumbersError, match="max_skips=2 updates in a row were skipped"):
        go(guard, 102, math.nan)


@pytest.mark.parametrize("action", ["log", "skip", "stop"])
def test_a_spike_is_told_kept_out_or_stops(tmp_path, action):
    guard = Guard(GuardConfig(spike=action), tmp_path, ALONE)
    for step in range(1, 101):
        assert go(guard, step, noisy(step)) == (True, None)
    if action == "stop":
        with pytest.raises(BadNumbersError, match="spike"):
            go(guard, 101, 2.0)
        return
    applied, said = go(guard, 101, 2.0)
    assert applied == (action == "log") and "spike" in said
    assert go(guard, 102, noisy(102)) == (True, None)


def test_nothing_is_called_a_spike_before_there_is_a_history(tmp_path):
    guard = Guard(GuardConfig(spike="skip"), tmp_path, ALONE)
    assert all(go(guard, step, loss)[0] for step, loss in enumerate((1.0, 1.0, 50.0, 1.0)))


def test_a_resumed_guard_judges_as_the_undisturbed_one(tmp_path):
    whole = Guard(GuardConfig(spike="skip"), tmp_path / "whole", ALONE)
    (tmp_path / "whole").mkdir()
    for step in range(1, 100):
        go(whole, step, noisy(step))
    (tmp_path / "resumed").mkdir()
    state = json.loads(json.dumps(whole.state()))
    resumed = Guard(GuardConfig(spike="skip"), tmp_path / "resumed", ALONE, state)
    assert go(resumed, 100, 1.08)[0] is go(whole, 100, 1.08)[0] is False
    assert resumed.state() == whole.state()


def test_a_disk_that_takes_no_record_ends_no_run(tmp_path, capsys):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    guard = Guard(GuardConfig(), tmp_path, ALONE)
    applied, said = go(guard, 1, math.nan)
    assert not applied and "SKIPPED" in said
    assert "events.jsonl cannot be written ([Errno 28] No space" in capsys.readouterr().err


@pytest.mark.parametrize("values", [{"max_skips": 0}, {"spike_window": 2}, {"spike_sigmas": 0.5},
                                    {"spike_sigmas": math.nan}])
def test_bad_settings_are_named(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        GuardConfig(**values)


def bad_numbers(root, engines):
    """Engine -> a run of 6 steps in which three have a bad number of each kind on rank 1."""
    return {name: {
        "overrides": [f"deepspeed={root}/{name}.json", "max_steps=6", "save_every=100"],
        "fault": {"kind": BAD, "rank": 1, "steps": list(BAD)},
    } for name in engines}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = write_world(tmp_path_factory.mktemp("guard"))
    start_runs(root, 2, bad_numbers(root, FAST) | {
        "ends": {"overrides": ["guard.max_skips=3"],
                 "fault": {"kind": "nan_loss", "rank": 1, "steps": list(range(5, 9))}},
        "spiked": {"overrides": ["guard.spike=skip", "guard.spike_window=8"],
                   "fault": {"kind": "spike", "rank": 1, "steps": [6]}}})
    return root / "runs"


def check_skips(run_dir):
    """Skipped on both ranks at those steps and at no other, told, and left out of the numbers."""
    for rank in (0, 1):
        digests = [line["digest"] for line in lines(run_dir / f"weights_rank{rank}.jsonl")]
        still = [index + 1 for index in range(1, 6) if digests[index] == digests[index - 1]]
        assert still == list(BAD), f"{run_dir.name} rank {rank}"
    told = events(run_dir, "skip")
    assert [line["step"] for line in told] == list(BAD)
    for line in told:
        assert (line["applied"], len(line["samples"])) == (False, 8)
        finite = BAD[line["step"]] == "nan_gradient"  # the loss is
        assert line["kind"] == ("gradient" if finite else "loss") + " not finite"
        broken = [s for s in line["samples"] if any(isinstance(x, str) for x in s["losses"])]
        assert {s["rank"] for s in broken} == (set() if finite else {1})
    trained = [line["step"] for line in lines(run_dir / "metrics.jsonl") if "train/loss" in line]
    assert trained == [s for s in range(1, 7) if s not in BAD]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_bad_numbers_on_one_rank_are_skipped_on_all(runs, name):
    check_skips(runs / name)


@pytest.mark.slow
def test_the_run_ends_on_every_rank_with_the_last_good_checkpoint(runs):
    for rank in (0, 1):
        text = (runs / "ends" / f"error_rank{rank}.txt").read_text()
        assert "guard.max_skips=3 updates in a row were skipped, the last at step 7" in text
        assert f"last good checkpoint: {runs}/ends/checkpoints/step00000006" in text
        assert f"tools.replay {runs}/ends 7" in text
    assert status(runs / "ends")["state"] == "failed"


@pytest.mark.slow
def test_a_spike_on_one_rank_is_kept_out_on_all(runs):
    (told,) = events(runs / "spiked", "skip")
    assert (told["step"], told["kind"], told["applied"]) == (6, "spike", False)
    for rank in (0, 1):
        digests = [line["digest"] for line in lines(runs / f"spiked/weights_rank{rank}.jsonl")]
        assert [n + 1 for n in range(1, 8) if digests[n] == digests[n - 1]] == [6]


@pytest.mark.faults
def test_every_other_engine_skips_too(tmp_path):
    others = [name for name in ENGINES if name not in FAST]
    root = write_world(tmp_path)
    start_runs(root, 2, bad_numbers(root, others))
    for name in others:
        check_skips(root / "runs" / name)


@pytest.mark.faults
def test_the_process_exits_with_77_on_every_rank(tmp_path):
    root = write_world(tmp_path)
    ranks = Ranks(2, [f"{root}/run.yaml", f"run_dir={root}/run", "guard.max_skips=2"],
                  {"kind": "nan_gradient", "rank": 1, "steps": [4, 5]})
    codes, outputs = ranks.finish()
    assert codes == [77, 77], outputs
    assert "error: rank 0: guard.max_skips=2 updates in a row were skipped" in outputs[0]
    assert "checkpoints/step00000003" in outputs[0]
    assert decide(root / "run", 77) == (False, "bad numbers")
    # Started again all the same: the last good one is what it resumed, though it saved nothing.
    again = Ranks(2, [f"{root}/run.yaml", f"run_dir={root}/run", "guard.max_skips=2"],
                  {"kind": "nan_gradient", "rank": 1, "steps": [4, 5]})
    codes, outputs = again.finish()
    assert codes == [77, 77], outputs
    assert f"last good checkpoint: {root}/run/checkpoints/step00000003" in outputs[0]
    assert status(root / "run")["checkpoint"].endswith("step00000003")
