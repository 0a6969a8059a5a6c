"""common/settings.py and the DeepSpeed JSON checks: every mistake is named with its fix."""

import json
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from common.settings import (
    ConfigError,
    flatten,
    load_config,
    parse_config,
    read_yaml,
)
from training.ds_config import (
    OFFERED,
    OWNED_BY_YAML,
    REFUSED,
    accumulation_steps,
    complete_ds_config,
    read_ds_config,
)

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Inner:
    lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be above 0")


@dataclass(frozen=True)
class Outer:
    run_dir: str
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    steps: int = 3


def test_values_arrive_with_their_types():
    got = parse_config(Outer, {"run_dir": "x", "inner": {"lr": "1e-5", "betas": [0.1, 0.2]}})
    assert got == Outer("x", Inner(1e-5, (0.1, 0.2)))
    assert parse_config(Outer, {"run_dir": "2e5"}).run_dir == "2e5"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "key 'run_dir' is missing"),
        ({"run_dir": "x", "stepps": 1}, "unknown key 'stepps'; did you mean 'steps'?"),
        ({"run_dir": "x", "inner": {"lrr": 1}},
         "unknown key 'inner.lrr'; did you mean 'inner.lr'?"),
        ({"run_dir": "x", "maybe": {"beta": 1}},
         "unknown key 'maybe.beta'; did you mean 'maybe.betas'"),
        ({"run_dir": "x", "steps": "many"}, "steps='many'"),
        ({"run_dir": "x", "steps": 1.5}, "steps=1.5"),
        ({"run_dir": "x", "steps": True}, "steps='true'"),
        ({"run_dir": 2e5}, "run_dir=200000.0"),
        ({"run_dir": "x", "inner": {"lr": -1}}, "config: lr=-1.0 must be above 0"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError) as error:
        parse_config(Outer, values)
    assert message in str(error.value)


def test_file_base_and_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text("run_dir: a\ninner: {lr: 2}\nsteps: 5\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nrun_dir: b\n")
    got = load_config(Outer, tmp_path / "top.yaml", ["inner.lr=1e-3", "steps=7"])
    assert got == Outer("b", Inner(1e-3), steps=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [("run_dir: a\nrun_dir: b\n", "given twice"), ("- a\n", "expected"), ("a: [", "not valid"),
     ("? [a]\n: 1\n", "x.yaml:1: a key must be a single word"), ("base: 3\n", "base=3 must be"),
     ("base: x.yaml\n", "is based on itself"), ("run_dir: caf\udce9\n", "not UTF-8")],
)
def test_broken_yaml_is_named(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_missing_file_and_bad_override(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_text("run_dir: a\n")
    with pytest.raises(ConfigError, match="must be key=value"):
        load_config(Outer, tmp_path / "x.yaml", ["steps"])


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_shipped_ds_configs_pass_ours_and_deepspeeds_check(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    values = read_ds_config(path)
    micro = values["train_micro_batch_size_per_gpu"]
    completed = complete_ds_config(values, micro * 2, 1.0, world_size=1)
    assert DeepSpeedConfig(completed).gradient_accumulation_steps == 2
    # The file itself, unchanged, is valid for DeepSpeed too.
    assert DeepSpeedConfig(json.loads(path.read_text())).train_batch_size == micro


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train_micro_batch_size_per_gpu": 1, "zero_optimisation": {}}',
         "did you mean 'zero_optimization'"),
        ('{"train_micro_batch_size_per_gpu": 1, "optimizer": {}}', "belongs to the experiment"),
        ('{"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1}', "set gradient_clipping"),
        ('{"train_micro_batch_size_per_gpu": 0}', "must be a whole number"),
        ('{"bf16": {}, "bf16": {}}', "given twice"),
        ("{", "not valid JSON"),
    ],
)
def test_ds_config_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_ds_config(path)


def test_ds_config_missing():
    with pytest.raises(ConfigError, match="no such file"):
        read_ds_config("ds_configs/none.json")


class Spy(dict):
    """A dict that remembers which of its own keys were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __deepcopy__(self, memo):
        return self


def test_known_top_level_keys_are_those_deepspeed_reads():
    """An upgrade that reads another top-level key fails here."""
    from deepspeed.runtime.config import DeepSpeedConfig

    spy = Spy({"train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(spy)
    removed = {  # 0.19.8 asks for these only to refuse them
        "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity",
        "graph_harvesting", "nebula", "progressive_layer_drop", "quantize_training",
        "sparse_attention", "sparse_gradients",
    }
    unknown = {key for key in spy.asked if isinstance(key, str)}
    unknown -= set(OFFERED) | set(REFUSED) | set(OWNED_BY_YAML) | removed
    unknown -= {"bfloat16"}  # alias of bf16
    assert not unknown
    assert {"bf16", "zero_optimization", "data_types"} <= spy.asked


def test_batch_arithmetic():
    assert accumulation_steps(24, 1, 8) == 3
    with pytest.raises(ConfigError, match="global_batch_size=24 .* = 16; use 16 or 32"):
        accumulation_steps(24, 1, 16)
    with pytest.raises(ConfigError, match="use 16"):
        accumulation_steps(8, 2, 8)


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": [{"e": 2}]}, "f": {}, "g": None}) == {
        "a.b.c": 1, "a.d": [{"e": 2}], "f": {}, "g": None}


@dataclass(frozen=True)
class Documented:
    rate: Annotated[float, Field(gt=0, le=2, description="How fast.")]
    kind: Annotated[Literal["a", "b"], Field(description="Which one.")] = "a"
    light: Annotated[int, "Without pydantic."] = 3
    many: list[int] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)


def test_keys_are_described_where_they_are_declared():
    keys = runpy.run_path(str(ROOT / "docs" / "tables.py"))["keys_of"](Documented)
    assert keys[:4] == [
        ("`rate`", "required", "> 0, <= 2", "How fast."), ("`kind`", "`a`", "a, b", "Which one."),
        ("`light`", "`3`", "", "Without pydantic."), ("`many`", "`[]`", "", "")]
    assert keys[4][0].startswith("`inner.")


@pytest.mark.parametrize(("value", "rule"), [
    (0, "rate=0 must be above 0"), (3, "rate=3 must be at most 2")])
def test_a_bound_is_named(value, rule):
    with pytest.raises(ConfigError, match=rule):
        parse_config(Documented, {"rate": value})
