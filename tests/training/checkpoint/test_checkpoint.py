"""Checkpoints under faults on real ranks and engines; the checks are in
checkpoint_worker.py and checkpoint_faults.py."""

import errno
import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.requeue import newest_step
from common.files import file_sha256
from common.ranks import World
from tests.support.launch import run_ranks, start_ranks
from training.checkpoint import retention
from training.checkpoint.contents import FORMAT, MANIFEST, Contents, read_contents, write_contents
from training.checkpoint.retention import (
    PROTECTED,
    Retention,
    complete_tags,
    find_checkpoint,
    prune,
    set_aside,
)
from training.checkpoint.run_dir import CheckpointError
from training.checkpoint.save_load import read_weights, write_weights
from training.checkpoint.slices import Slice, SliceReader, write_slices
from training.zero_state import FlatBuffer, Piece

WORKER = "tests/support/workers/checkpoint_worker.py"
ALONE = World(0, 1, 0, 1, "alone")


@pytest.mark.slow
def test_faults_on_two_ranks(tmp_path):
    done = run_ranks(2, "tests/support/workers/checkpoint_faults.py", str(tmp_path))
    for name in (
        "second writer refused",
        "fresh start",
        "keeps the last two, every third and the protected one",
        "full disk on one rank",
        "a file that grows no further",
        "read-only folder",
        "slow rank",
        "too little space",
        "flipped bit: the one before is taken",
        "one that a rank could not read is passed over, and stays",
        "a damaged one is not counted among the last two",
        "no complete checkpoint: refused",
        "killed in the first save: a fresh start",
    ):
        assert name in done.stdout


def losses(output: str) -> dict[str, list[list[float]]]:
    """Folder and engine that saved -> the two losses after it, of each engine that resumed."""
    found: dict[str, list[list[float]]] = {}
    for line in output.splitlines():
        if line.startswith("losses "):
            _, saved, *values = line.split()
            found.setdefault(saved, []).append([float(value) for value in values])
    return found


@pytest.mark.slow
def test_resume_is_exact_and_has_no_world_size(tmp_path):
    """Weights, moments, EMA, losses: bit for bit on the same ranks, to rounding on others."""
    brief = ["stage0", "stage3_small", "bf16_stage1"]
    first = run_ranks(2, WORKER, str(tmp_path), "exact:" + ",".join(brief))
    assert all(f"exact {name}" in first.stdout for name in brief)
    second = run_ranks(1, WORKER, str(tmp_path), "exact2:" + ",".join(brief))
    check_losses(losses(second.stdout), {f"exact2/{name}" for name in brief})


def check_losses(found: dict[str, list[list[float]]], expected: set[str]) -> None:
    assert set(found) == expected
    for saved, lines in found.items():
        for line in lines:
            assert line == pytest.approx(lines[0], rel=2e-2 if "bf16" in saved else 1e-6), saved


@pytest.mark.faults(seconds=130)
def test_every_engine_resumes_itself_and_another_on_1_2_and_4_ranks(tmp_path):
    from tests.support.workers.checkpoint_worker import ENGINES

    found: dict[str, list[list[float]]] = {}
    for ranks, *parts in ((1, "exact"), (2, "exact", "exact1"), (4, "exact", "exact1", "exact2"),
                          (2, "exact4"), (1, "exact2", "exact4")):
        done = run_ranks(ranks, WORKER, str(tmp_path), *parts)
        said = done.stdout.splitlines()
        assert "exact" not in parts or all(f"exact {name}" in said for name in ENGINES)
        for saved, lines in losses(done.stdout).items():
            found.setdefault(saved, []).extend(lines)
    # The same on either of the two other world sizes.
    check_losses(found, {f"exact{ranks}/{name}" for ranks in (1, 2, 4) for name in ENGINES})
    assert min(map(len, found.values())) == 2


@pytest.mark.faults
def test_offloaded_optimiser(tmp_path):
    """DeepSpeedCPUAdam, which the C++ compiler of the README builds."""
    done = run_ranks(2, WORKER, str(tmp_path), "offload")
    assert "exact offload2" in done.stdout and "exact offload3" in done.stdout, done.stderr[-3000:]


@pytest.mark.faults
def test_killed_at_any_moment_of_saving(tmp_path):
    """SIGKILL of a process that only saves: what is left is the last whole one, or none yet."""
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from training.checkpoint.save_load import write_weights\n"
        "print('ready', flush=True)\n"
        "for step in range(1, 10**6):\n"
        "    write_weights(Path(sys.argv[1]), step, {'w': torch.full((200_000,), float(step))})\n"
    )
    torch.manual_seed(0)
    steps = []
    for turn in range(10):
        run_dir = tmp_path / str(turn)
        with open(tmp_path / f"{turn}.txt", "w+") as said:
            (program,) = start_ranks(1, ["-c", code, str(run_dir)], [said, said])
            while "ready\n" not in Path(said.name).read_text():
                assert program.poll() is None
                time.sleep(0.01)
        time.sleep(0.1 + 0.3 * float(torch.rand(())))
        program.kill()
        assert program.wait() == -signal.SIGKILL
        found = find_checkpoint(run_dir, ALONE)
        if found is not None:
            assert not found.damaged
            step, weights = read_weights(run_dir)
            assert step == found.contents.step and (weights["w"] == step).all()
            steps.append(step)
    assert len(set(steps)) > 3


def test_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_weights(tmp_path)


def test_a_checkpoint_of_the_older_format_is_no_fresh_start(tmp_path):
    tag = tmp_path / "checkpoints" / "step00000004"
    tag.mkdir(parents=True)
    (tag / MANIFEST).write_text('{"step": 4, "world_size": 2, "files": {}}')
    with pytest.raises(CheckpointError, match=f"not of format {FORMAT}: go on with the version"):
        find_checkpoint(tmp_path, ALONE)


def test_a_checkpoint_of_another_format_is_kept_and_not_passed_over(tmp_path):
    """After an update and back: the older code would go back a day, and delete the newer work."""
    older, newer = (write_weights(tmp_path, step, {"x": torch.ones(3)}) for step in (3, 6))
    values = json.loads((newer / MANIFEST).read_text())
    (newer / MANIFEST).write_text(json.dumps(values | {"format": FORMAT + 1}))
    with pytest.raises(CheckpointError, match="step00000006.*with the version .*, or move it away"):
        find_checkpoint(tmp_path, ALONE)
    prune(tmp_path, Retention(last=1))
    assert newer.is_dir() and complete_tags(tmp_path) == [older]
    shutil.move(newer, tmp_path / "elsewhere")
    assert find_checkpoint(tmp_path, ALONE).tag == older


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_what_every_rank_has_is_saved_once(world_size):
    shard = FlatBuffer(torch.zeros(7), [Piece("a", 0, 0, 4), Piece("b", 0, 4, 3)], replicated=True)
    pieces = [piece for rank in range(world_size)
              for piece in shard.owned(World(rank, world_size, 0, 1, "test"))]
    elements = sorted((p.name, p.begin + i, p.start + i) for p in pieces for i in range(p.length))
    assert elements == [("a", i, i) for i in range(4)] + [("b", i, 4 + i) for i in range(3)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_cut_into_slices_reads_back(tmp_path_factory, data):
    """Whoever wrote which slices: each file holds some, a reader takes any range."""
    folder = tmp_path_factory.mktemp("slices")
    length = data.draw(st.integers(1, 40))
    whole = torch.arange(length, dtype=torch.float32)
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=5))})
    paths = []
    for index, (begin, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        paths.append(folder / f"weight-{index:05d}.safetensors")
        write_slices(paths[-1], [Slice("w", begin, whole[begin:end])])
    reader = SliceReader(data.draw(st.permutations(paths)))
    begin = data.draw(st.integers(0, length - 1))
    into = torch.empty(data.draw(st.integers(1, length - begin)))
    reader.read("w", begin, into)
    assert torch.equal(into, whole[begin : begin + len(into)])
    with pytest.raises(CheckpointError, match="elements of w from"):
        reader.read("w", begin, torch.empty(length - begin + 1))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of two parameters: (run directory, its weights, its files' bytes)."""
    run_dir = tmp_path_factory.mktemp("run")
    weights = {"a.weight": torch.randn(3, 5), "b": torch.randn(7)}
    tag = write_weights(run_dir, 1, weights)
    return run_dir, weights, {path.name: path.read_bytes() for path in tag.iterdir()}


def read_damaged(small, name: str, damaged: bytes) -> None:
    """CheckpointError, or exactly what was saved."""
    run_dir, weights, files = small
    path = run_dir / "checkpoints/step00000001" / name
    path.write_bytes(damaged)
    try:
        found = find_checkpoint(run_dir, ALONE)
        assert found is not None
        _, again = read_weights(run_dir)
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[key], weights[key]) for key in weights)
    except CheckpointError:
        pass
    finally:
        path.write_bytes(files[name])


@given(st.sampled_from(["weight-00000.safetensors", MANIFEST]), st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_files_are_refused_or_harmless(small, name, data):
    content = bytearray(small[2][name])
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "zeros"]))
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "flip" and content:
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=20))
        else:
            content[place : place + 16] = bytes(len(content[place : place + 16]))
    read_damaged(small, name, bytes(content))


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_slices_are_refused_even_when_the_hash_is_right(small, tmp_path_factory, data):
    """The reader alone, as if whoever damaged the file also rewrote the manifest."""
    content = bytearray(small[2]["weight-00000.safetensors"])
    header = int.from_bytes(content[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("damaged") / "weight-00000.safetensors"
    path.write_bytes(bytes(content))
    try:
        reader = SliceReader([path])
        for name, value in small[1].items():
            reader.read(name, 0, torch.empty(value.numel()))
    except CheckpointError:
        pass


def test_a_pickle_in_place_of_tensors_is_not_run(small, tmp_path):
    class Poison:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))

    poison = pickle.dumps(Poison())
    run_dir, weights, _ = small
    for name in ("weight-00000.safetensors", MANIFEST):
        read_damaged(small, name, poison)
    tag = write_weights(tmp_path / "run", 1, weights)
    path = tag / "weight-00000.safetensors"
    for write in (lambda: path.write_bytes(poison), lambda: torch.save({"x": Poison()}, path)):
        write()  # with its right hash, as someone would who wants it to be read
        contents = read_contents(tag)
        contents.files[path.name] = (path.stat().st_size, file_sha256(path))
        write_contents(tag, contents)
        assert complete_tags(tmp_path / "run") == [tag]
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_weights(tmp_path / "run")
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    """A disk that errs may be well again: passed over and told, but kept."""
    older, newer = (write_weights(tmp_path, step, {"x": torch.ones(3)}) for step in (3, 6))

    def erring(path):
        if path.parent == newer:
            raise OSError(5, "Input/output error")
        return file_sha256(path)

    monkeypatch.setattr(retention, "file_sha256", erring)
    found = find_checkpoint(tmp_path, ALONE)
    assert found.tag == older and "Input/output error" in found.unread[newer]
    assert not found.damaged
    with pytest.raises(CheckpointError, match="Input/output error"):
        read_weights(tmp_path)
    monkeypatch.undo()
    (newer / "weight-00000.safetensors").write_bytes(b"cut")
    found = find_checkpoint(tmp_path, ALONE)
    assert newer in found.damaged and not found.unread


@pytest.mark.parametrize("renamed", [True, False])
def test_a_run_that_went_back_does_not_jump_ahead_later(tmp_path, monkeypatch, capsys, renamed):
    """Readable again, the newer one would be gone on from, without the records in between."""
    older, newer = (write_weights(tmp_path, step, {"x": torch.ones(3)}) for step in (3, 6))
    found = find_checkpoint(tmp_path, ALONE)
    found = found._replace(tag=older, unread={newer: "Input/output error"})
    if not renamed:
        monkeypatch.setattr(os, "rename", lambda *names: open("/nowhere/at/all"))
    set_aside(found)
    assert ("cannot be renamed" in capsys.readouterr().err) == (not renamed)
    assert find_checkpoint(tmp_path, ALONE).tag == (older if renamed else newer)
    write_weights(tmp_path, 6, {"x": torch.zeros(3)})
    prune(tmp_path, Retention(last=1))
    [kept] = newer.parent.glob("*.unread-*") if renamed else [newer]
    assert (kept / MANIFEST).is_file()


@pytest.mark.parametrize("hidden", [MANIFEST, "weight-00000.safetensors", PROTECTED])
def test_what_a_disk_hides_for_the_moment_is_not_deleted(tmp_path, monkeypatch, hidden):
    """A stale handle while a save looks at the checkpoints neither ends it nor costs one."""
    oldest, hit, newest = (write_weights(tmp_path, n, {"x": torch.ones(3)}) for n in (3, 6, 9))
    for name in ("stat", "read_bytes"):
        real = getattr(Path, name)

        def erring(path, *arguments, real=real, **options):
            if path == hit / hidden:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return real(path, *arguments, **options)

        monkeypatch.setattr(Path, name, erring)
    prune(tmp_path, Retention(last=1))
    assert complete_tags(tmp_path)[-1] == newest and not oldest.exists()
    (newest / MANIFEST).write_bytes(b"cut")
    if hidden != PROTECTED:
        with pytest.raises(CheckpointError, match="make them readable"):
            find_checkpoint(tmp_path, ALONE)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path, ALONE).tag == hit


def test_a_copy_beside_the_checkpoints_is_none_of_them(tmp_path):
    """`cp -r step00000003 step00000003.bak` neither counts nor goes, and stops no program."""
    older, newer = (write_weights(tmp_path, step, {"x": torch.ones(3)}) for step in (3, 6))
    copies = [shutil.copytree(tag, tag.with_name(tag.name + ".bak")) for tag in (older, newer)]
    assert complete_tags(tmp_path) == [older, newer] and newest_step(tmp_path) == 6
    assert find_checkpoint(tmp_path, ALONE).tag == newer
    assert read_weights(tmp_path)[0] == 6
    prune(tmp_path, Retention(last=1, every=3))
    assert complete_tags(tmp_path) == [older, newer] and all(copy.is_dir() for copy in copies)
    prune(tmp_path, Retention(last=1))
    assert complete_tags(tmp_path) == [newer] and all(copy.is_dir() for copy in copies)


@pytest.mark.parametrize("name", ["../escaped", "/etc/passwd", "a/b"])
def test_a_manifest_names_files_beside_it_only(name):
    with pytest.raises(ValueError, match="not inside the checkpoint"):
        Contents(1, 1, 0, 0, {}, ["weight"], [], {name: (1, "")}, {})
