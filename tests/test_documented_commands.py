"""Every command of the README and of docs/ is run, as bash reads it, in a folder as a user's.

What needs a download, a GPU, a cluster or over 20 seconds runs with check=true or --help; of these,
every option that the page gives must be in the help.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from common.files import read_lines, write_lines
from common.settings import load_config
from tests.support.launch import ROOT, environment, run
from tests.test_commands import MOVED

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "make", "sbatch", "bash", "tensorboard", "pydeps", "scontrol", "scancel",
            "squeue", "tail")  # all else, as mkdir and head, bash itself does
# On a page -> what it stands for.
NAMES = {r"\bCONFIG\b": "configs/playground.yaml", r"\bRUN\b": "runs/first",
         r"\bRUN_B\b": "runs/alt_merge_t2av", r"\bruns/NAME\b": "runs/first", r"\bSTEP\b": "1",
         r"\bCODE\b": "0", r"\[ID\]": "", r"[\[\]]": ""}
DOWNLOADS = ("data.manifest", "data.captions", "data.prepare")  # of data sets or of encoders
# A word of bash that writes down a program's arguments and runs nothing.
RECORD = """
{names}() {{ {{ printf '%s\\0' {names} "$@"; printf '\\0'; }} >>"$RECORDED"; }}
"""


def commands_on(page: Path) -> list[str]:
    """Blocks of bash, and whole commands between backticks."""
    text = page.read_text(encoding="utf-8").split(MOVED)[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(rf"`((?:{'|'.join(PROGRAMS[:5])}) [^`\n]+)`",
                        re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for word, meaning in NAMES.items():
        inline = [re.sub(word, meaning, command) for command in inline]
    return [*blocks, *inline]


CASES = [pytest.param(command, id=f"{page.name}: {command.strip().splitlines()[-1]:.60}")
         for page in PAGES for command in commands_on(page)]


def recorded(script: str, folder: Path) -> list[list[str]]:
    """The programs that a script starts, with the arguments that bash makes of its words."""
    record = folder / "recorded"
    record.write_text("")
    words = "".join(RECORD.format(names=name) for name in PROGRAMS)
    subprocess.run(["bash", "-euc", words + script], cwd=folder, check=True,
                   env=environment() | {"RECORDED": str(record), "HOME": str(folder)})
    return [one.split("\0") for one in record.read_text().split("\0\0")[:-1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout after `make quickstart`, with a data set and a run of two steps of that world."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "ds_configs", "launch", "weights", "train.py", "Makefile", "setup.py",
                 "constraints.txt", *(path.parent.name for path in ROOT.glob("*/__init__.py"))):
        (root / name).symlink_to(ROOT / name)
    (root / "docs").mkdir()
    python(root, "playground.world", "clips", "--clips", "1", "--validation", "1")
    records = read_lines(root / "clips" / "manifest.jsonl")
    write_lines(root / "clips" / "manifest.jsonl", [
        record | {"id": f"{record['id']}-{copy}"} for record in records
        for copy in range(8 if record["split"] == "train" else 1)])
    python(root, "data.prepare", "clips/manifest.jsonl", "shards/alt_merge", "--wan",
           "weights/playground/wan", "--tangoflux", "weights/playground/tangoflux", "--frames", "9",
           "--height", "64", "--width", "96", "--video-text-length", "64")
    (root / "runs" / "quickstart").mkdir(parents=True)
    shutil.copytree(root / "shards" / "alt_merge", root / "runs" / "quickstart" / "shards")
    run([sys.executable, *inside(root, "train", "configs/playground.yaml", "run_dir=runs/first",
                                 "max_steps=1", "validation_samples=2", "samples.num_steps=2")])
    shutil.copytree(root / "runs" / "first", root / "runs" / "alt_merge_t2av")
    return root


def inside(folder: Path, module: str, *arguments: str) -> list[str]:
    """`python -m MODULE ARGUMENTS` in a folder, for `run`."""
    return ["-c", f"import os, runpy, sys; os.chdir({str(folder)!r}); "
                  f"sys.argv = {[module, *arguments]!r}; "
                  f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"]


def python(folder: Path, module: str, *arguments: str) -> str:
    return run([sys.executable, *inside(folder, module, *arguments)]).stdout


def perform(command: list[str], folder: Path) -> None:
    """Run it, or as much of it as can be run here."""
    match command:
        case ["python", "train.py", *arguments] | ["bash", "launch/local.sh", *arguments]:
            check_run(arguments, folder)
        case ["python", "-m", module, *arguments]:
            if module.startswith(DOWNLOADS) or module == "tests.support.slurm_cluster":
                check_options(module, arguments, folder)
            else:
                python(folder, module, *arguments)
        case ["bash", "launch/pair.sbatch", *arguments]:
            prefix = next(one for one in arguments if not one.startswith("-"))
            for task in ("t2av", "t2v"):
                load_config(train.RunConfig, f"{ROOT}/{prefix}_{task}.yaml", [])
        case ["sbatch", *arguments]:
            script = next((one for one in arguments if one.endswith(".sbatch")), None)
            if script is None:
                assert "--wrap" in arguments
                return
            subprocess.run(["bash", "-n", script], cwd=folder, check=True)
            rest = arguments[arguments.index(script) + 1:]
            inner = {"train": ["train.py"], "prepare": ["-m", "data.prepare"]}[Path(script).stem]
            perform(["python", *inner, *rest], folder)
        case ["make", *targets]:
            subprocess.run(["make", "-n", *targets], cwd=folder, check=True, capture_output=True)
        case ["scontrol" | "scancel" | "squeue", *_]:
            pass  # test_slurm runs them; without a cluster they have not even a --help
        case [program, *_]:
            if shutil.which(program, path=environment()["PATH"]) is None:
                pytest.skip(f"{program} is not installed: its command is not run")
            subprocess.run([program, "--help"], env=environment(), check=True, capture_output=True)


def check_run(arguments: list[str], folder: Path) -> None:
    """As train.py checks it; a run of the released weights, which are a download, by its keys."""
    config = load_config(train.RunConfig, str(folder / arguments[0]), arguments[1:])
    if not (folder / config.wan).is_dir():
        return
    if not config.check:
        arguments = [*arguments, "check=true"]
    run([sys.executable, *inside(folder, "train", *arguments)])


def check_options(module: str, arguments: list[str], folder: Path) -> None:
    """Its help, or its subcommand's, which must have every option that is given."""
    first = [one for one in arguments[:1] if module == "data.manifest"]
    said = python(folder, module, *first, "--help")
    for option in arguments:
        assert not option.startswith("--") or option in said, f"{module} has no {option}"


@pytest.mark.slow
@pytest.mark.parametrize("command", CASES)
def test_command(command, folder):
    found = recorded(command, folder)
    for one in found:
        perform(one, folder)
    assert found or not re.search(rf"^(?:{'|'.join(PROGRAMS)}) ", command, re.MULTILINE)


def test_commands_are_found():
    """A page that writes its commands otherwise would be skipped in silence."""
    said = json.dumps([case.values[0] for case in CASES])
    for command in ("make quickstart", "python -m data.prepare", "python -m tools.sample",
                    "data.manifest alt_merge", "check=true", "tools.replay", "check=weights"):
        assert command in said, command
    assert len(CASES) >= 20 and os.path.exists(ROOT / "docs" / "slurm.md")
