"""The rules of the house, checked: floors, rooms, sizes, names, twins that cannot drift."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from common.settings import read_yaml

ROOT = Path(__file__).parents[1]
MOST_FILES, MOST_LINES = 12, 450  # in a folder; in a file
# Floor by floor: what each may import of ours. Tools are verbs: they join what they need, and
# nobody imports them, nor train.py, but tests.
FLOORS = {
    "common": set(),
    "model": {"common"},
    "training": {"common"},
    "data": {"common", "model"},
    "cluster": {"common", "training"},
    "playground": {"common", "model", "data"},
    "config": {"common", "model", "training", "data"},
    "evaluation": {"common", "model", "training", "data", "playground", "config"},
    "train": {"common", "model", "training", "data", "config", "evaluation"},
    "tools": {"common", "model", "training", "data", "playground", "config", "evaluation",
              "cluster"},
}
# A trained model loads with torch and safetensors alone.
LIGHT = {"common.errors", "common.files", "common.strict_config"}
# Where a heavy library may be imported; everything else stays free of it.
ENCODERS = ("model/encoders.py", "model/weights/encoder_headers.py")
ALLOWED = {
    "deepspeed": ("training/",),
    "streaming": ("data/",),
    "diffusers": (*ENCODERS, "model/sampling.py", "playground/backbones/"),
    "transformers": (*ENCODERS, "data/captions/", "playground/backbones/"),
}
# DeepSpeed's private names: where a ZeRO stage keeps weights, moments and gradients.
ZERO_STATE = "training/zero_state.py"
PRIVATE = {
    "BF16_Optimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "_hp_mapping",
    "averaged_gradients", "bf16_groups", "bit16_groups", "ds_numel", "fp16_groups",
    "fp32_groups_flat_partition", "fp32_groups_gradient_flat_partition",
    "fp32_partitioned_groups_flat", "partition_numel", "single_partition_of_fp32_groups",
}
# The model is a function of its inputs: only these read or write files.
MODEL_FILES = (
    "model/weights/load.py",  # released weights in and out
    "model/weights/hub.py",  # finds, checks and reads weight files for the others
    "model/weights/saving.py",  # a trained model's own folder
    "model/weights/encoder_headers.py",  # configs and headers of the frozen encoders
    "model/encoders.py",  # frozen encoders load themselves from released folders
)
FILE_CALLS = {
    "open", "safe_open", "load_file", "save_file", "save_torch_state_dict", "mkdir", "unlink",
    "read_text", "read_bytes", "write_text", "write_bytes", "from_pretrained", "save_pretrained",
}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv", "unsetenv"}


def python_files(*tops: str) -> dict[str, ast.Module]:
    """Path -> tree of every Python file of these packages or modules."""
    paths = [path for top in tops
             for path in [ROOT / f"{top}.py", *sorted((ROOT / top).rglob("*.py"))]
             if path.is_file()]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
            for path in paths}


PRODUCT = python_files(*FLOORS)
TESTS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("*.py"))]
MODULES = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
           for name in PRODUCT}


def names_used(tree: ast.AST) -> set[str]:
    """Every bare name, attribute and imported name."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names | {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def imports(tree: ast.Module, when_imported: bool = False) -> set[str]:
    """Modules that a file imports: anywhere, or only what runs when it is imported itself."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            found.add(node.module)
        if not (when_imported and isinstance(node, ast.FunctionDef | ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("name", PRODUCT)
def test_floors(name):
    found = imports(PRODUCT[name])
    tops = {module.split(".")[0] for module in found}
    own = name.removesuffix(".py").split("/")[0]
    assert not tops & {"tests", "benchmarks"}
    wrong = tops & FLOORS.keys() - FLOORS[own] - {own}
    assert not wrong, f"{name} imports {sorted(wrong)}; {own} may: {sorted(FLOORS[own])}"
    if own == "tools":
        assert "tools" not in tops, "a verb imports no other: share it in evaluation/"
    if own == "model":
        assert not any(module.startswith("torch.distributed") for module in found)
        assert "logging" not in tops
        assert {module for module in found if module.startswith("common.")} <= LIGHT
    for library, places in ALLOWED.items():
        if library in tops:
            assert name.startswith(places), f"{library} is imported in {name}"


def test_every_room_has_its_floor():
    """A module or package next to these would be checked by none of the rules here."""
    tops = {path.stem for path in ROOT.glob("*.py")}
    tops |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert tops == FLOORS.keys() | {"setup", "tests"}


def stored_attributes(tree: ast.AST) -> set[str]:
    """Every x of a `self.x` that is given a value."""
    return {node.attr for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name) and node.value.id == "self"}


def late_attributes(tree: ast.Module) -> set[str]:
    """CLASS.x of all that an object does not have when it is constructed."""
    found = set()
    for owner in ast.walk(tree):
        if isinstance(owner, ast.ClassDef):
            methods = [part for part in owner.body if isinstance(part, ast.FunctionDef)]
            built = {node.id for part in owner.body if not isinstance(part, ast.FunctionDef)
                     for node in ast.walk(part) if isinstance(node, ast.Name)}
            for method in methods:
                if method.name in ("__init__", "__post_init__"):
                    built |= stored_attributes(method)
            found |= {f"{owner.name}.{name}" for method in methods
                      for name in stored_attributes(method) - built}
    return found


@pytest.mark.parametrize("name", PRODUCT)
def test_objects_are_complete_when_they_are_constructed(name):
    assert not late_attributes(PRODUCT[name])


def test_late_attributes_are_recognised():
    text = "class A:\n b: int = 1\n def __init__(self):\n  self.c = 1\n def f(self):\n  {}"
    for line, late in (("self.b = self.c = 2", set()), ("self.d, e = 1, 2", {"A.d"}),
                       ("with x as self.d: pass", {"A.d"}), ("self.c.d = 1", set())):
        assert late_attributes(ast.parse(text.format(line))) == late, line


# A constructor of our own YAML loader.
DONE_ON_IMPORT = {"_StrictLoader.add_constructor"}


def import_effects(tree: ast.Module) -> list[str]:
    """What a module does to others when it is imported: calls for their effect, patched names."""
    found, waiting = [], list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef) or "__name__" in ast.unparse(node).split("\n")[0]:
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            found.append(ast.unparse(node.value.func))
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
            targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
            found += [ast.unparse(one) for target in targets for one in ast.walk(target)
                      if isinstance(one, ast.Attribute | ast.Subscript)
                      and not isinstance(one.ctx, ast.Load)]
        waiting += [part for part in ast.iter_child_nodes(node)
                    if isinstance(part, ast.stmt | ast.ExceptHandler)]
    return [name for name in found if name not in DONE_ON_IMPORT]


@pytest.mark.parametrize("name", PRODUCT)
def test_an_import_changes_nothing(name):
    assert not import_effects(PRODUCT[name])


@pytest.mark.parametrize("line", ["matplotlib.use('Agg')", "os.environ['A'] = 'b'", "a.b = c",
                                  "del a.b", "setattr(a, 'b', c)", "a, b.c = 1, 2",
                                  "if a:\n    b()", "try:\n    a.b = 1\nexcept E:\n    pass",
                                  "class A:\n    b()", "with a:\n    b()"])
def test_effects_of_an_import_are_recognised(line):
    assert import_effects(ast.parse(line))


@pytest.mark.parametrize("name", PRODUCT)
def test_one_file_knows_deepspeeds_layout(name):
    used = names_used(PRODUCT[name]) & PRIVATE
    assert used == (PRIVATE if name == ZERO_STATE else set()), name


def test_light_modules_stay_light():
    for module in LIGHT:
        found = imports(PRODUCT[module.replace(".", "/") + ".py"])
        assert not {name.split(".")[0] for name in found} & {"torch", "yaml", "pydantic"}, module


def test_no_circle_of_imports():
    """Of what runs when a module is imported, with the packages that this imports on the way."""
    needs = {}
    for name, tree in PRODUCT.items():
        module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        reached = {".".join(parts[:count]) for parts in
                   (found.split(".") for found in imports(tree, when_imported=True))
                   for count in range(1, len(parts) + 1)}
        needs[module] = {one for one in reached & MODULES
                         if not f"{module}.".startswith(f"{one}.")}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module):], module])
        if module not in done:
            for one in sorted(needs[module]):
                visit(one, [*path, module])
            done.add(module)

    for module in needs:
        visit(module, [])


def test_rooms_are_small():
    """At most so many Python files a folder, __init__.py counted; tests too."""
    counts = Counter(str(Path(name).parent) for name in [*PRODUCT, *TESTS])
    assert not {name: count for name, count in counts.items() if count > MOST_FILES}


def test_files_stay_readable():
    long = {}
    for name in [*PRODUCT, *TESTS]:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            long[name] = lines
    assert not long


def test_no_file_name_twice():
    names = Counter(Path(name).name for name in PRODUCT)
    twice = {name for name, count in names.items() if count > 1}
    assert twice <= {"__init__.py", "__main__.py"}


def test_no_class_name_twice():
    where: dict[str, list[str]] = {}
    for name, tree in PRODUCT.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(name)
    assert not {name: places for name, places in where.items() if len(places) > 1}


def test_tests_stand_where_the_files_stand():
    """tests/a/b/ holds the tests of a/b/; train/ has whole runs, support/ what tests share."""
    folders = {str(Path(name).parent.relative_to("tests")) for name in TESTS}
    rooms = {folder for folder in folders
             if folder.split("/")[0] not in (".", "support", "train", "fixtures")}
    assert not {room for room in rooms if not (ROOT / room / "__init__.py").is_file()}
    helpers = {name for name in TESTS if not name.startswith(("tests/support/", "tests/fixtures/"))
               and not Path(name).name.startswith(("test_", "__init__", "conftest"))}
    assert not helpers, "helpers belong to tests/support/"


@pytest.mark.parametrize("name", [name for name in PRODUCT if name.startswith("model/")])
def test_model_reads_no_environment_and_few_files(name):
    used = names_used(PRODUCT[name])
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


@pytest.mark.parametrize("name", ["alt_merge", "vggsound"])
def test_twins_differ_in_task_and_run_dir_only(name):
    t2av = read_yaml(ROOT / "configs" / f"{name}_t2av.yaml")
    t2v = read_yaml(ROOT / "configs" / f"{name}_t2v.yaml")
    assert {key for key in t2av if t2av[key] != t2v.get(key)} == {"task", "run_dir"}
    assert (t2av["task"], t2v["task"]) == ("t2av", "t2v") and t2av.keys() == t2v.keys()
