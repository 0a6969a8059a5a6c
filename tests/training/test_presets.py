"""The two tables of ds_configs: every file is there, and the numbers are those of the formula."""

import pytest

from tests.support.launch import ROOT
from training.ds_config import read_ds_config

PARAMETERS, GB = 5.67e9, 1e9
STATES = {  # bytes per GPU of P parameters on N GPUs, as docs/configs.md states them
    "zero1": lambda p, n: 6 * p + 12 * p / n, "zero2": lambda p, n: 2 * p + 16 * p / n,
    "zero3": lambda p, n: 18 * p / n, "zero3_hpz": lambda p, n: 18 * p / n + 2 * p / 8,
    "zero3_offload": lambda p, n: 2 * p / n, "debug": lambda p, n: 18 * p / n,
}
ACTIVATIONS, REST = 5.4, 3.0  # GB: one sample of 49 frames; context, NCCL, fragments
PAGE = (ROOT / "docs" / "configs.md").read_text()
FILES = {path.stem for path in (ROOT / "ds_configs").glob("*.json")}


def buffers(name: str) -> float:
    """GB, from the file's own bucket sizes."""
    zero = read_ds_config(ROOT / "ds_configs" / f"{name}.json")["zero_optimization"]
    gathered = zero.get("allgather_bucket_size") or (
        zero["stage3_max_live_parameters"] + zero["stage3_prefetch_bucket_size"])
    return (zero["reduce_bucket_size"] * 4 * 2 + gathered * 2) / GB


def rows(header: str) -> list[list[str]]:
    table = PAGE[PAGE.index(header):].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_file_is_on_the_page():
    for name in FILES:
        assert f"| `{name}.json` |" in PAGE
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.stem in PAGE.replace("`..._t2v.yaml`", "playground_t2v"), path


def test_stated_buffers_are_those_of_the_files():
    assert buffers("zero1") == buffers("zero2") == 5.0
    assert buffers("zero3") == buffers("zero3_hpz") == pytest.approx(6.4)
    assert buffers("zero3_offload") == pytest.approx(3.0)


def test_states_are_those_of_the_formula():
    names = ["zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload"]
    for gpus, *cells in rows("| GPUs | zero1"):
        for name, cell in zip(names, cells, strict=True):
            if cell != "-":
                assert float(cell) == round(STATES[name](PARAMETERS, int(gpus)) / GB, 1), name


def test_the_first_preset_that_fits():
    order = ["zero1", "zero2", "zero3", "zero3_offload"]
    for memory, *cells in rows("| GPU memory |"):
        capacity = 0.92 * float(memory.split()[0]) * 2**30 / GB
        for gpus, cell in zip((1, 2, 4, 8, 16), cells, strict=True):
            needed = {name: STATES[name](PARAMETERS, gpus) / GB + buffers(name) + ACTIVATIONS + REST
                      for name in order}
            fits = next(name for name in order if needed[name] <= capacity)
            assert fits.removeprefix("zero3_") == cell, (memory, gpus, needed)
