"""The rules of the house, checked: import graph, file sizes, twins that cannot drift."""

import ast
from pathlib import Path

import pytest

from common.settings import read_yaml

ROOT = Path(__file__).parents[1]
OURS = {"model", "data", "training", "tools", "experiment", "train"}
SOURCES = sorted(
    [ROOT / "train.py", ROOT / "config.py",
     *(path for part in ("model", "data", "training", "tools")
       for path in (ROOT / part).rglob("*.py"))]
)
ENCODERS = ("model/encoders.py", "model/weights/encoder_headers.py")
# Where a heavy library may be imported; everything else stays free of it.
ALLOWED = {
    "deepspeed": ("train.py", "training/", "tools/export.py"),
    "streaming": ("data/",),
    "diffusers": (*ENCODERS, "model/sampling.py", "playground/backbones/"),
    "transformers": (*ENCODERS, "data/caption", "playground/backbones/"),
}

# The model is a function of its inputs: only these read or write files.
MODEL_FILES = (
    "model/weights/load.py",  # released weights in and out
    "model/weights/hub.py",  # finds, checks and reads weight files for the other two
    "model/weights/saving.py",  # a trained model's own folder
    "model/weights/encoder_headers.py",  # configs and headers of the frozen encoders
    "model/encoders.py",  # frozen encoders load themselves from released folders
)
FILE_CALLS = {
    "open", "safe_open", "load_file", "save_file", "save_torch_state_dict", "mkdir", "unlink",
    "read_text", "read_bytes", "write_text", "write_bytes", "from_pretrained", "save_pretrained",
}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv", "unsetenv"}


def names_used(tree: ast.AST) -> set[str]:
    """Every bare name, attribute and imported name."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names | {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_graph(path):
    name = str(path.relative_to(ROOT))
    tops = {module.split(".")[0] for module in imports(path)}
    own = tops & OURS
    if name.startswith("model/"):
        assert own <= {"model"}
        assert not any(module.startswith("torch.distributed") for module in imports(path))
        assert not tops & {"logging"}
    if name.startswith("training/"):
        assert own <= {"training"}
    assert "train" not in own, "nothing imports train.py but tests"
    for library, places in ALLOWED.items():
        if library in tops:
            assert name.startswith(places), f"{library} is imported in {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "model").rglob("*.py")), ids=lambda p: p.name)
def test_model_reads_no_environment_and_few_files(path):
    name = str(path.relative_to(ROOT))
    used = names_used(ast.parse(path.read_text(encoding="utf-8")))
    assert not used & ENVIRONMENT, f"{name} reads the environment; pass the value in"
    if name not in MODEL_FILES:
        assert not used & FILE_CALLS, f"{name} does file I/O; {MODEL_FILES} may"


@pytest.mark.parametrize(
    "line",
    ["open('x')", "from safetensors import safe_open", "Path(x).read_text()", "p.mkdir()"],
)
def test_file_access_is_recognised(line):
    assert names_used(ast.parse(line)) & FILE_CALLS


@pytest.mark.parametrize("line", ["os.environ['A']", "from os import getenv", "os.getenv('A')"])
def test_environment_access_is_recognised(line):
    assert names_used(ast.parse(line)) & ENVIRONMENT


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    limit = 350 if path.name == "train.py" else 300
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("name", ["alt_merge", "vggsound"])
def test_twins_differ_in_task_and_run_dir_only(name):
    t2av = read_yaml(ROOT / "configs" / f"{name}_t2av.yaml")
    t2v = read_yaml(ROOT / "configs" / f"{name}_t2v.yaml")
    assert {key for key in t2av if t2av[key] != t2v.get(key)} == {"task", "run_dir"}
    assert (t2av["task"], t2v["task"]) == ("t2av", "t2v") and t2av.keys() == t2v.keys()
