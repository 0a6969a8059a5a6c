"""DeepSpeed's own behaviour where we work around it, on two ranks; run by test_library_deepspeed.

    torchrun --nproc-per-node=2 tests/support/workers/library_engine_worker.py FOLDER

Rank 0 writes FOLDER/found.json. Nothing here goes through our code.
"""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn


def build(stage: int, **more: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    config = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9,
              "zero_optimization": {"stage": stage}, **more}
    return deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), config=config)[0]


def step(engine: Any, factor: float = 1.0) -> None:
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.ones(1, 8, dtype=dtype)).square().mean() * factor)
    engine.step()


def nan_on_one_rank(stage: int, **more: Any) -> bool:
    """Whether the weights survive a NaN on rank 1."""
    engine = build(stage, **more)
    step(engine, float("nan") if dist.get_rank() == 1 else 1.0)
    return all(bool(p.isfinite().all()) for p in engine.module.parameters())


def client_state(folder: Path) -> dict[str, Any]:
    """F13: what comes back of a state saved per rank, with a key that DeepSpeed has too."""
    engine = build(2)
    step(engine)
    mine = {"global_steps": 999, "rank": dist.get_rank()}
    engine.save_checkpoint(str(folder / "f13"), tag="a", client_state=mine)
    _, state = engine.load_checkpoint(str(folder / "f13"), tag="a")
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, state["rank"])
    return {"global_steps": engine.global_steps, "ranks": ranks}


def tensorboard_tags(folder: Path) -> list[str]:
    """F35: what DeepSpeed's own monitor writes of a step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    engine = build(2, bf16={"enabled": True}, tensorboard={
        "enabled": True, "output_path": str(folder / "tb"), "job_name": "job"})
    for _ in range(3):
        step(engine)
    if dist.get_rank() != 0:
        return []
    engine.monitor.tb_monitor.summary_writer.flush()
    events = EventAccumulator(str(folder / "tb" / "job"))
    events.Reload()
    return sorted(events.Tags()["scalars"])


def main() -> None:
    folder = Path(sys.argv[1])
    deepspeed.init_distributed("gloo", verbose=False)
    found = {
        "nan_stage0_fp32": nan_on_one_rank(0),
        "nan_stage2_unchecked": nan_on_one_rank(
            2, bf16={"enabled": True, "check_grad_overflow": False}),
        "nan_stage2_bf16": nan_on_one_rank(2, bf16={"enabled": True}),
        "client_state": client_state(folder),
        "tensorboard": tensorboard_tags(folder),
    }
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
