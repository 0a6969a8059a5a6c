"""Why DeepSpeed's own checkpoints are not used: each of their defects, shown in the library itself.

A test that fails here after an upgrade says that a defect is gone. The numbers are those of the
list of failure modes that training/checkpoint/save_load.py was designed against.
"""

import os
import pickle

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.decoupled_checkpoint_engine import (
    DecoupledCheckpointEngine,
)
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from tests.support.launch import run_ranks


@pytest.fixture(scope="module")
def met(tmp_path_factory) -> str:
    """What two ranks of DeepSpeed met."""
    return run_ranks(2, "tests/support/workers/library_worker.py",
                     str(tmp_path_factory.mktemp("library"))).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["F1 F2", "F3", "F4", "F5", "F7", "F8", "F12", "F13a", "F13b", "F15", "F16a", "F16b",
             "F17", "F18", "F46"])
def test_defect_is_still_there(met, name):
    assert f"{name}: " in met


class Poison:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_f11_a_poisoned_file_runs(tmp_path):
    torch.save({"x": Poison(tmp_path / "executed")}, tmp_path / "shard.pt")
    TorchCheckpointEngine().load(str(tmp_path / "shard.pt"))
    assert (tmp_path / "executed").is_dir()


def test_f9_what_the_asynchronous_writer_wrote_cannot_be_loaded(tmp_path):
    torch.save({"scaler": LossScaler(1.0)}, tmp_path / "shard.pt")  # every ZeRO shard has one
    with pytest.raises(pickle.UnpicklingError):
        DecoupledCheckpointEngine.load(None, str(tmp_path / "shard.pt"))  # type: ignore[arg-type]


def test_f10_a_flipped_bit_is_loaded(tmp_path):
    values = torch.arange(1000, dtype=torch.float32)
    torch.save({"fp32_flat_groups": values}, tmp_path / "shard.pt")
    data = bytearray((tmp_path / "shard.pt").read_bytes())
    place = data.index(values.numpy().tobytes())
    data[place + 2002] ^= 1
    (tmp_path / "shard.pt").write_bytes(data)
    loaded = TorchCheckpointEngine().load(str(tmp_path / "shard.pt"))["fp32_flat_groups"]
    assert not torch.equal(loaded, values)
