"""Every program says what it does, and every name that a script or a page gives is there."""

import ast
import re
import runpy
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[1]
MOVED = "## Moved names"  # of docs/development.md, whose old names are gone
ROOMS = ("common", "model", "training", "data", "cluster", "playground", "evaluation", "tools")
FOLDERS = (*ROOMS, "tests", "configs", "ds_configs", "launch", "benchmarks", "weights", "docs")
PAGES = sorted([
    *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"),
    *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("weights/**/*.md"), *ROOT.glob("configs/*.yaml"),
    *ROOT.glob("launch/*"), *ROOT.glob(".ci/*"), ROOT / "Makefile", ROOT / "setup.py",
    ROOT / "pyproject.toml",
])
SOURCES = sorted([*ROOT.glob("*.py"), *(path for room in (*ROOMS, "tests", "benchmarks")
                                        for path in (ROOT / room).rglob("*.py"))])


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8").split(MOVED)[0]


def is_program(path: Path) -> bool:
    """Whether `python -m` does something with it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
               for node in tree.body)


PROGRAMS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) if is_program(path)
]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_answers_help(name, monkeypatch, capsys):
    """In this process: starting each by itself would import the same libraries twenty times."""
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert not ended.value.code
    said = capsys.readouterr().out
    assert name in said or "usage:" in said, said


def test_train_answers_help(capsys):
    assert train.main(["--help"]) == 0
    assert "python train.py configs/" in capsys.readouterr().out


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_named_modules_are_there(path):
    """`-m a.b` on a command line or in a list of arguments."""
    for found in re.finditer(r'-m[", ]+([a-z_]+(?:\.\w+)*)', read(path)):
        place = ROOT / found[1].replace(".", "/")
        if found[1].split(".")[0] in (*ROOMS, "tests"):
            there = place.with_suffix(".py"), place / "__main__.py"
            assert any(one.is_file() for one in there), f"-m {found[1]}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_paths_are_there(path):
    """Files with a suffix, folders with a slash at their end, targets of links, files of tests."""
    text = read(path)
    for found in re.finditer(
        rf"(?<![\w/.~$*}}{{-])((?:{'|'.join(FOLDERS)})/[\w./-]*)(?![\w*{{$<]|\.\.)", text
    ):
        name = found[1].rstrip(".")
        if Path(name).suffix or name.endswith("/"):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
    if path.suffix == ".md":
        for found in re.finditer(r"\]\(([^)#:\s]+)\)", text):
            assert (path.parent / found[1]).exists(), f"{path.name} links to {found[1]}"
    tests = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    for found in re.finditer(r"`(test_\w+)`", text):
        assert found[1] in tests, f"{path.name} names {found[1]}"


def test_the_core_path_is_read_in_an_afternoon():
    """The files that the README lists for it; folders stand for what is in them."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("in an afternoon\n")[1].split("Everything else")[0]
    names = re.findall(r"`([\w/]+(?:\.py|/))`", section)
    files = {path for name in names
             for path in ((ROOT / name).glob("*.py") if name.endswith("/") else [ROOT / name])}
    assert len(files) >= 20
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) < 4000


def test_the_first_page_stays_short():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 130 and len(readme.split()) <= 1200


def test_the_tables_of_the_pages_are_those_of_the_code():
    """`python docs/tables.py` writes them; every row of keys, events and reasons is a sentence."""
    code = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    for page, table in code["tables"]().items():
        assert code["written"](page, table) == (ROOT / "docs" / page).read_text(), page
        assert page == "monitoring.md" or all(row[-1].endswith(".") for row in table[1:]), page


def test_every_package_is_installed():
    assert re.findall(r'"(\w+)"', re.search(
        r"packages=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)[1]) == list(ROOMS)
