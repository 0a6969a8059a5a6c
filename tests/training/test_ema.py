"""training/ema.py against the formula, on an engine; sharded and saved in test_checkpoint.py."""

import pytest
import torch

from common.settings import ConfigError
from tests.support.workers import checkpoint_worker as worker
from tests.training.checkpoint.test_checkpoint import ALONE
from training.distributed import shutdown, start
from training.ema import EMA
from training.zero_state import find_buffers


@pytest.fixture(scope="module", autouse=True)
def alone():
    start(ALONE, 1)
    yield
    shutdown()


def weights(engine) -> torch.Tensor:
    return torch.cat([shard.flat.clone() for shard in find_buffers(engine)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage0", "stage2", "bf16_stage3"])
def test_it_is_the_average_and_leaves_training_alone(name):
    plain, averaged = worker.build(name, ALONE), worker.build(name, ALONE)
    ema = EMA(averaged, worker.DECAY)
    expected = weights(averaged)
    for step in range(3):
        worker.train(plain, step, ALONE)
        worker.train(averaged, step, ALONE, ema)
        expected = worker.DECAY * expected + (1 - worker.DECAY) * weights(averaged)
        x = torch.ones(1, 7).to(next(averaged.module.parameters()).dtype)
        before, average = averaged(x), torch.cat(ema.flats)
        with ema.swapped_in():
            inside = averaged(x)
            assert torch.equal(weights(averaged), average)
        assert not torch.equal(inside, before) and torch.equal(averaged(x), before)
    assert torch.equal(weights(plain), weights(averaged))
    assert torch.allclose(torch.cat(ema.flats), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_skipped_step_does_not_count():
    engine = worker.build("bf16_stage2", ALONE)
    ema = EMA(engine, worker.DECAY)
    before = [flat.clone() for flat in ema.flats]
    for _ in range(worker.GLOBAL_BATCH):
        loss = engine(torch.ones(1, 7).bfloat16()).sum() * float("nan")
        engine.backward(loss)
        engine.step()
    ema.update()
    assert engine.skipped_steps == 1
    assert all(map(torch.equal, before, ema.flats))


@pytest.mark.slow
def test_16_bits_without_zero_is_refused(monkeypatch):
    monkeypatch.setitem(worker.ENGINES, "bf16_stage0", {"bf16": {"enabled": True}})
    with pytest.raises(ConfigError, match="16 bits without ZeRO"):
        worker.build("bf16_stage0", ALONE)
