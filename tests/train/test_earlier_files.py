"""What commit bfb3d05 wrote is accepted: a data set, a half-finished data.prepare, a run.

tests/fixtures/README.md says how that commit made them. Up to it, dataset.json named its rules of
cutting and encoding by a hash of source files, `code`; that hash is ENCODING_VERSION 1.
"""

import dataclasses
import json
import shutil

import pytest

from data.inspect import main as inspect
from data.prepare import work
from data.prepare.__main__ import main as prepare
from data.provenance import check_provenance
from data.schema import ENCODING_VERSION, METADATA_FILE, Metadata, load_metadata, save_metadata
from data.stored import iter_samples
from data.verify import main as verify
from model import AVFullDiT
from tests.support.encoded import FIXTURES, assert_same_sample
from tests.support.launch import records, run_ranks
from tools.export import export
from training.checkpoint.save_load import read_weights
from training.guards.run_state import read_state

FOLDER = FIXTURES / "bfb3d05"
MANIFEST, PREPARED = str(FOLDER / "manifest.jsonl"), FOLDER / "prepared"
WAN, TANGOFLUX = (str(FOLDER / "weights" / name) for name in ("wan", "tangoflux"))
COMMAND = ["--wan", WAN, "--tangoflux", TANGOFLUX, "--frames", "9", "--height", "32", "--width",
           "64", "--video-text-length", "40", "--clips-per-shard", "2", "--device", "cpu"]
SAVED, LAST = 3, 6  # steps of the checkpoint and of the last loss


def of_other_code(folder, code="0123456789abcdef") -> Metadata:
    """As if other sources had made the data set; what is read of it."""
    values = json.loads((folder / METADATA_FILE).read_text())
    del values["sha256"]
    values["settings"]["code"] = code
    save_metadata(folder, Metadata(**values))
    return load_metadata(folder)


def test_a_data_set_is_one_of_version_1(tmp_path, capsys):
    assert "code" in json.loads((PREPARED / METADATA_FILE).read_text())["settings"]
    metadata = load_metadata(PREPARED)
    assert metadata.settings["encoding_version"] == 1 and "code" not in metadata.settings
    assert inspect([str(PREPARED), "--decode", "1", "--to", str(tmp_path), "--device", "cpu",
                    "--wan", WAN, "--tangoflux", TANGOFLUX]) == 0
    shown = capsys.readouterr()
    assert "encoding_version=1  commit=bfb3d05" in shown.out and not shown.err
    assert verify([str(PREPARED)]) == 0


def test_only_data_of_unknown_code_are_said_to_differ(tmp_path):
    old = load_metadata(PREPARED)
    settings = {k: v for k, v in old.settings.items() if k != "encoding_version"}
    new = dataclasses.replace(old, settings=settings | {"encoding_version": 1, "commit": "1234"})
    assert check_provenance({"old": old, "new": new}, WAN, TANGOFLUX) == []
    other = of_other_code(shutil.copytree(PREPARED, tmp_path / "other"))
    assert check_provenance({"new": new, "other": other}, WAN, TANGOFLUX) == [
        "data.root: encoding_version=1 in new, code 0123456789abcdef in other"]


def test_what_unknown_code_began_is_refused(tmp_path, capsys):
    half = shutil.copytree(FOLDER / "half.partial", tmp_path / ".half.partial")
    whole = shutil.copytree(PREPARED, tmp_path / "whole")
    for folder, word in ((half, "begun"), (whole, "not empty, made")):
        of_other_code(folder)
        out = tmp_path / folder.name.removeprefix(".").removesuffix(".partial")
        assert prepare([MANIFEST, str(out), *COMMAND]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line == (
            f"error: out={out}: {word} with encoding_version=code 0123456789abcdef, now "
            f"encoding_version={ENCODING_VERSION}; use its own commit (bfb3d05), or another out, "
            f"or delete {folder}")


def assert_is_prepared(out) -> None:
    """The data set that bfb3d05 made when nobody disturbed it."""
    names = [{str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
             for root in (out, PREPARED)]
    assert names[0] == names[1]
    for name in ("rejects.jsonl", "text.safetensors", "train/shard.00000.mds.zstd"):  # its own
        assert (out / name).read_bytes() == (PREPARED / name).read_bytes(), name
    found, made = load_metadata(out), load_metadata(PREPARED)
    assert found.files.keys() == made.files.keys()
    ours = {"commit": None, "wan": None, "tangoflux": None}
    assert dataclasses.replace(found, files={}, settings=found.settings | ours) == (
        dataclasses.replace(made, files={}, settings=made.settings | ours))
    assert "code" not in json.loads((out / METADATA_FILE).read_text())["settings"]
    for split in made.counts:
        pairs = zip(iter_samples(out, split), iter_samples(PREPARED, split), strict=True)
        for sample, expected in pairs:
            assert_same_sample(sample, expected)
    assert verify([str(out)]) == 0


def test_a_half_finished_folder_is_finished(tmp_path, capsys, monkeypatch):
    """By the same command, and by --merge once all is encoded."""
    out, merged = tmp_path / "half", tmp_path / "merged"
    partial = shutil.copytree(FOLDER / "half.partial", tmp_path / ".half.partial")
    receipt = partial / "receipts" / "train-00000.json"
    before = receipt.read_bytes()
    assert prepare([MANIFEST, str(out), "--status"]) == 0
    assert "1 of 5 shards, 2 samples, 8 of 10 clips left" in capsys.readouterr().out
    assert prepare([MANIFEST, str(out), "--merge"]) == 1
    assert "4 of 5 shards are not encoded yet" in capsys.readouterr().err
    for worker in ("1", "0"):
        with monkeypatch.context() as killed:  # just before the merge
            killed.setattr(work, "merge", lambda job: None)
            place = ["--worker", worker, "--workers", "2"]
            assert prepare([MANIFEST, str(out), *COMMAND, *place]) == 0
    assert receipt.read_bytes() == before and not out.exists()
    root = shutil.copytree(partial, tmp_path / ".merged.partial") / "root"
    root.mkdir()
    (root / "dataset.json.tmp").write_text("{")  # killed in the last act of its merge
    assert prepare([MANIFEST, str(merged), "--merge"]) == 0
    assert prepare([MANIFEST, str(out), *COMMAND]) == 0
    for root in (out, merged):
        assert_is_prepared(root)
    assert prepare([MANIFEST, str(out), *COMMAND]) == 0  # complete: nothing to do


@pytest.mark.slow
def test_a_checkpoint_is_resumed_and_exported(tmp_path):
    shutil.copytree(PREPARED, tmp_path / "prepared")  # training unpacks shards in it
    (tmp_path / "zero2.json").write_text(json.dumps(
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}))
    expected = json.loads((FOLDER / "losses.json").read_text())
    for ranks, engine in ((2, FOLDER / "zero3.json"), (1, tmp_path / "zero2.json")):
        run = shutil.copytree(FOLDER / "run", tmp_path / f"run{ranks}")
        shutil.copytree(FOLDER / "history", run, dirs_exist_ok=True)
        spec = [{"config": str(FOLDER / "run.yaml"), "overrides": [
            f"run_dir={run}", f"wan={WAN}", f"tangoflux={TANGOFLUX}", f"deepspeed={engine}",
            f"data.root={tmp_path}/prepared"]}]
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        done = run_ranks(ranks, "tests/support/workers/train_worker.py",
                         str(tmp_path / "spec.json"))
        assert f"resuming at step {SAVED}\n" in done.stdout
        changed = [line for line in done.stdout.splitlines() if "changed since" in line]
        assert [line for line in changed if "versions." not in line] == []
        for tag, values in expected.items():
            after = {int(step): value for step, value in values.items() if int(step) > SAVED}
            assert records(run, tag) == pytest.approx(after, rel=2e-5), (ranks, tag)
        state = read_state(run)
        assert [start.state for start in state.starts] == ["unknown", "running", "done"]
        assert [card["first_step"] for card in state.cards] == [0, 2, SAVED]
        assert not state.skips  # that of step 4 was done again
    run = FOLDER / "run"
    for ema in (False, True):
        step, weights = read_weights(run, ema=ema)
        assert step == export(run, tmp_path / f"model{ema}", None, "avfulldit", ema) == SAVED
        exported = AVFullDiT.from_pretrained(tmp_path / f"model{ema}").state_dict()
        assert exported.keys() == weights.keys()
        assert all(exported[name].equal(value) for name, value in weights.items())
