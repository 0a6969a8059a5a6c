"""Small clips and trees of them, as data sets lie on disk, and what an import of them writes."""

import json
import shutil
from pathlib import Path

import numpy as np

from data.manifest.__main__ import main
from tests.support.inputs.media import noise, numbered, write_media

RATE = 10  # pictures a second: cheap, and times that are easy to read
CUT = 49 / 24
TABLE = '''-0abcDEFghi,30,"bee, wasp, etc. buzzing",train
aaaaaaaaaaa,1,ripping paper,train
aaaaaaaaaaa,40,ripping paper,train
aaaaaaaaaaa,46,ripping paper,train
under_scor_,0,playing cello,test
ccccccccccc,5,playing cello,test
ccccccccccc,100,playing cello,train
ddddddddddd,7,dog barking,train
eeeeeeeeeee,7,dog barking
'''


def take(path: Path, seconds: float = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = numbered(round(seconds * RATE), 16, 24)
    return write_media(path, frames, np.arange(len(frames)) / RATE, noise(seconds, 8000), 8000)


def place(clip: Path, *paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, path)


def run(name: str, *roots: Path, out: Path, options: tuple = ()) -> tuple[dict, dict]:
    """(records, ledger lines) by id of what the command writes."""
    arguments = [name, *roots, "--out", out, "--workers", 1, *options]
    assert main([str(argument) for argument in arguments]) == 0
    ledger = out.with_name(f"{out.stem}.rejects.jsonl")
    return tuple({line["id"]: line for line in map(json.loads, path.read_text().splitlines())}
                 for path in (out, ledger))


def reasons(rejects: dict) -> dict[str, str]:
    return {name: line["reason"] for name, line in rejects.items()}


FACTS = {"width": 24, "height": 16, "rotation": 0, "fps": 10.0, "vfr": False, "frames": 100,
         "seconds": 10.0, "audio_rate": 8000, "channels": 2}


def error_of(capsys, *arguments) -> str:
    """The last line of an import that must fail in one line."""
    assert main([str(a) for a in (*arguments, "--workers", 1)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


def build_vggsound(root: Path, ten: Path) -> Path:
    place(
        ten,
        root / "vggsound_00/-0abcDEFghi_000030.mp4",  # seconds, six digits
        root / "vggsound_01/aaaaaaaaaaa_1000_11000.mp4",  # milliseconds
        root / "vggsound_02/aaaaaaaaaaa_000001.mp4",  # the same clip again
        root / "vggsound_01/aaaaaaaaaaa_40000_50000.mp4",
        root / "vggsound_01/aaaaaaaaaaa_000046_000056.mp4",  # overlaps the one before
        root / "vggsound_01/under_scor__000000.mp4",
        root / "vggsound_01/ccccccccccc_5000_15000.mp4",
        root / "vggsound_01/ccccccccccc_000100.mp4",  # of a recording in the test list
        root / "vggsound_01/fffffffffff_000100.mp4",
        root / "vggsound_01/my holiday.mp4",
    )
    (root / "vggsound.csv").write_text(TABLE)
    return root
