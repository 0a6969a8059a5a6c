"""Several runs of train.run in one set of processes (imports and the process group are slow).

    torchrun --nproc-per-node=N tests/support/workers/train_worker.py SPEC.json

SPEC is a list of {"config": path, "overrides": [...]}. Beside each run's own files it leaves
`RUN/drawn_rankN.jsonl`: per micro-batch the sample ids and digests of t and of the noised inputs,
recorded from the real objective as it runs.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

import train
from common.ranks import resolve_world
from common.settings import load_config
from model.objective import Objective
from training.distributed import leave, shutdown, start


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()[:16]


class Recorder:
    """Wraps Objective.noise: the real one runs, what it drew is written down per sample."""

    def __init__(self) -> None:
        self.noise = Objective.noise
        self.path = Path("/dev/null")

    def install(self) -> None:
        recorder = self

        def noise(self, batch, t, epoch, device):
            noised = recorder.noise(self, batch, t, epoch, device)
            if epoch >= 0:
                with open(recorder.path, "a", encoding="utf-8") as file:
                    for row, sample_id in enumerate(batch.sample_ids):
                        drawn = {key: digest(value[row]) for key, value in noised.inputs.items()
                                 if key in ("noisy_video", "noisy_audio", "video_text")}
                        entry = {"epoch": epoch, "id": sample_id, "t": float(t[row]), **drawn}
                        file.write(json.dumps(entry) + "\n")
            return noised

        Objective.noise = noise  # type: ignore[method-assign]


def main() -> None:
    world = resolve_world(os.environ)
    start(world, 5)
    recorder = Recorder()
    recorder.install()
    linear = torch.nn.functional.linear
    for run in json.loads(Path(sys.argv[1]).read_text()):
        # DeepSpeed replaces it for ZeRO-3 and leaves it so: in bf16 it rounds once more.
        torch.nn.functional.linear = linear
        config = load_config(train.RunConfig, run["config"], run["overrides"])
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        recorder.path = Path(config.run_dir) / f"drawn_rank{world.rank}.jsonl"
        train.run(config, train.build_plan(config, world), world)
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
