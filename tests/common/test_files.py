"""Files appear whole or not at all; lines of JSON survive kills and foreign hands."""

import errno
import hashlib
import json
import os
from contextlib import nullcontext
from functools import partial

import pytest

from common import files
from common.files import (
    append_lines,
    file_sha256,
    json_sha256,
    keep_lines_before,
    mend_last_line,
    read_lines,
    whole_file,
    write_json,
    write_lines,
)

DAMAGED = [b"{", b"[1]", b"7", b"\xff\xfe", b"\0\0\0", b"", b'{"step": 2, "x"', b"[" * 100_000]


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_file_is_there_whole_or_as_it_was(tmp_path, mode):
    path, old, new = tmp_path / "x", "old\n", "new\n" * 9
    path.write_text(old)
    for error in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), whole_file(path, mode) as file:
            file.write(new if mode == "w" else new.encode())
            assert path.read_text() == old
            raise error
        assert path.read_text() == old and os.listdir(tmp_path) == ["x"]
    with whole_file(path, mode) as file:
        file.write(new if mode == "w" else new.encode())
        assert path.read_text() == old
    assert path.read_text() == new and os.listdir(tmp_path) == ["x"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a power cut leaves an empty file in place of the old one; the name is on disk last."""
    acts, fsync, replace = [], os.fsync, os.replace

    def sync(handle):
        acts.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", sync)
    monkeypatch.setattr(files.os, "replace", lambda *names: (acts.append("name"), replace(*names)))
    write_json(tmp_path / "x", {"a": 1})
    assert acts == ["file", "name", "folder"]


def test_a_file_system_that_cannot_sync_a_folder_will_do(tmp_path, monkeypatch):
    def sync(handle, error):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise error

    for code in (errno.EINVAL, errno.ENOTSUP, errno.EIO):
        monkeypatch.setattr(files.os, "fsync", partial(sync, error=OSError(code, "folder")))
        with pytest.raises(OSError) if code == errno.EIO else nullcontext():
            write_json(tmp_path / "x", {"code": code})
        assert json.loads((tmp_path / "x").read_text()) == {"code": code}


def test_what_json_does_not_know_becomes_a_string(tmp_path):
    write_json(tmp_path / "x", {"a": tmp_path})
    write_lines(tmp_path / "y", [{"a": tmp_path}])
    append_lines(tmp_path / "y", [{"a": "half a \ud800 character"}])
    assert json.loads((tmp_path / "x").read_text()) == {"a": str(tmp_path)}
    assert read_lines(tmp_path / "y", whole=True) == [
        {"a": str(tmp_path)}, {"a": "half a ? character"}]


def test_an_empty_file_needs_no_mending(tmp_path):
    (tmp_path / "x").touch()
    mend_last_line(tmp_path / "x")
    append_lines(tmp_path / "x", [{"a": 1}])
    assert (tmp_path / "x").read_text() == '{"a": 1}\n'


def test_a_write_that_fails_says_why_whatever_happens_to_its_remains(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "remove", lambda path: open("/nowhere/at/all"))
    with pytest.raises(KeyError), whole_file(tmp_path / "x"):
        raise KeyError


def test_another_name_until_it_is_whole(tmp_path):
    with whole_file(tmp_path / "x", aside=tmp_path / "y") as file:
        assert os.listdir(tmp_path) == ["y"]
        file.write("\ud800é")  # half a character is no reason to lose the rest
    assert (tmp_path / "x").read_bytes() == "?é".encode()


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_line_is_named_or_left_out(tmp_path, damaged, capsys):
    path = tmp_path / "x.jsonl"
    assert read_lines(path) == []
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not a JSON object"):
        read_lines(path)
    assert read_lines(path, skip_damaged=True) == [{"step": 1}, {"step": 3}]
    assert capsys.readouterr().err.count("x.jsonl:2: not a JSON object") == 1
    keep_lines_before(path, 3)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_growing_file_may_be_missing_one_that_was_written_whole_may_not(tmp_path):
    assert read_lines(tmp_path / "x.jsonl") == []
    with pytest.raises(FileNotFoundError):
        read_lines(tmp_path / "x.jsonl", whole=True)


def test_what_is_not_a_file_holds_no_lines(tmp_path):
    """A folder in its place, and a device that never ends."""
    (tmp_path / "device").symlink_to("/dev/full")
    for path in (tmp_path, tmp_path / "device"):
        assert read_lines(path) == []
        mend_last_line(path)
        keep_lines_before(path, 3)


def test_a_whole_last_line_costs_no_reading(tmp_path, monkeypatch):
    """An append looks at the last byte: a ledger may be long."""
    path = tmp_path / "x.jsonl"
    append_lines(path, [{"step": 1}])
    monkeypatch.setattr(files, "_json_object", lambda line: pytest.fail("read again"))
    append_lines(path, [{"step": 2}])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("torn", [one for one in DAMAGED if one])
def test_a_torn_last_line_is_left_out_and_mended(tmp_path, torn, capsys):
    path = tmp_path / "x.jsonl"
    for whole in (b"", b'{"step": 1}\n'):
        path.write_bytes(whole + torn)
        kept = [{"step": 1}] if whole else []
        assert read_lines(path) == kept  # another process may be writing it
        with pytest.raises(ValueError, match=r"x\.jsonl:\d: not a JSON object"):
            read_lines(path, whole=True)
        assert path.read_bytes() == whole + torn
        mend_last_line(path)
        assert path.read_bytes() == whole
        path.write_bytes(whole + torn)
        append_lines(path, [{"step": 2}, {"step": 3}])
        assert read_lines(path) == [*kept, {"step": 2}, {"step": 3}]
    assert not capsys.readouterr().err


def test_a_last_line_that_lacks_its_end_alone_is_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    append_lines(path, [{"step": 3}])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_records_of_steps_that_are_done_again_go(tmp_path):
    path = tmp_path / "x.jsonl"
    keep_lines_before(path, 3)
    assert not path.exists()
    write_lines(path, [{"step": 2, "text": "é"}, {"step": 3}, {"no": 1}, {"step": "a"}])
    keep_lines_before(path, 3)
    assert path.read_text(encoding="utf-8") == '{"step": 2, "text": "é"}\n'


def test_hashes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
    one, other = {"a": 1, "b": {"c": [2]}}, {"b": {"c": [2]}, "a": 1}
    assert json_sha256(one) == json_sha256(other) == json_sha256(json.loads(json.dumps(one)))
    assert json_sha256(one) != json_sha256(one | {"a": 2})
