"""SIGKILL at random moments of one training, then the same command again, until it is done.

    python -m tests.support.kills.training_kills --kills 100 --steps 1200 --work /tmp/kills

Two ranks under ZeRO-3 with two shapes of clips, an EMA and a loader worker each. A kill takes a
rank, its loader worker, or everything at once; a third of them wait for a save to be under way.
The other ranks mostly end by themselves; one that waits for a dead one where nothing tells it (a
start, streaming's barrier of loader workers) is ended as srun does. Prints one line per kill and
the verdict; exits 0 only if weights, moments, EMA and losses are those of a run that nobody
disturbed, bit for bit.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.inputs.prepared import write_shards
from tests.support.launch import records, start_ranks
from tests.support.models.tiny import write_tangoflux, write_wan
from training.checkpoint.contents import MANIFEST, read_contents
from training.checkpoint.retention import tag_of

RANKS = 2
LAUNCHER_WAITS = 8  # seconds before the ranks that do not end by themselves are killed
SAVE_EVERY = 4
TAGS = ("train/loss", "train/loss_video", "train/loss_audio", "train/grad_norm")


def write_world(root: Path, steps: int) -> Path:
    """Backbones, shards of two shapes, engine and run.yaml."""
    write_wan(root / "wan")
    write_tangoflux(root / "tangoflux")
    write_shards(root / "wide", train=29, validation=2)
    write_shards(root / "small", train=17, validation=2, seed=1, silent=3, height=32, width=32,
                 video_latent_shape=[48, 3, 2, 2])
    (root / "engine.json").write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    config = root / "run.yaml"
    config.write_text(f"""
run_dir: {root}/runs/default
wan: {root}/wan
tangoflux: {root}/tangoflux
model: {{num_joint_blocks: 1}}
data:
  streams: [{{root: {root}/wide}}, {{root: {root}/small}}]
  num_workers: 1
optimizer: {{lr: 1.0e-4}}
ema_decay: 0.9
warmup_steps: 3
global_batch_size: 4
max_steps: {steps}
validate_every: null
save_every: {SAVE_EVERY}
self_check: false
deepspeed: {root}/engine.json
""")
    return config


class Life:
    """One start of the command: its ranks, and what became of them."""

    def __init__(self, config: Path, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.log = config.parent / f"{run_dir.name}.log"
        self.said = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "a", encoding="utf-8") as log:
            self.ranks = start_ranks(RANKS, ["train.py", str(config), f"run_dir={run_dir}"],
                                     [log] * 2 * RANKS)

    @property
    def alive(self) -> bool:
        return any(rank.poll() is None for rank in self.ranks)

    def wait_for_steps(self) -> None:
        """Until this life has made a step, or has ended."""
        while self.alive and not self.makes_steps():
            time.sleep(0.02)

    def makes_steps(self) -> bool:
        return self.log.exists() and b"  grad " in self.log.read_bytes()[self.said :]

    def wait_for_a_save(self) -> bool:
        """Until the newest tag has no manifest yet; False if that was not seen."""
        deadline = time.monotonic() + 30
        while self.alive and time.monotonic() < deadline:
            tags = sorted((self.run_dir / "checkpoints").glob("step*"))
            if tags and any(tags[-1].iterdir()) and not (tags[-1] / MANIFEST).exists():
                return True
            time.sleep(0.0005)
        return False

    def processes(self) -> list[tuple[list[int], list[int]]]:
        """Per rank: (its own process and all below it, of those its loader's workers)."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = path.read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.parent.name))
        found = []
        for rank in self.ranks:
            below = children.get(rank.pid, [])  # the workers' fork server is there
            workers = [worker for server in below for worker in children.get(server, [])]
            found.append(([rank.pid, *below, *workers], workers))
        return found

    def end_undisturbed(self) -> list[int]:
        return [rank.wait() for rank in self.ranks]

    def end(self) -> list[int]:
        """Exit codes, once every rank is gone, by itself or because the launcher waited enough."""
        deadline = time.monotonic() + LAUNCHER_WAITS
        for rank in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(max(deadline - time.monotonic(), 0))
            rank.kill()
        return [rank.wait() for rank in self.ranks]


def _kill(life: Life, chance: random.Random) -> str | None:
    """Kill one thing of a running training, a random time after a random event; what it was."""
    saving = ""
    if chance.random() < 0.85:  # the others may meet a start
        life.wait_for_steps()
    if chance.random() < 1 / 3:
        saving = ", during a save" if life.wait_for_a_save() else ""
        time.sleep(chance.uniform(0, 0.03))
    else:
        time.sleep(chance.uniform(0, 2.5))
    families = life.processes()
    kind = chance.choice(["rank 0", "rank 1", "a loader worker", "everything"])
    rank = {"rank 0": 0, "rank 1": 1}.get(kind, chance.randrange(RANKS))
    family, workers = families[rank]
    if kind == "a loader worker" and not workers:  # not started yet
        kind = f"rank {rank}"
    victims = {"everything": [pid for each, _ in families for pid in each],
               "a loader worker": workers[-1:]}.get(kind, family[:1])
    if not life.alive:
        return None
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
    return kind + saving


def disturbed_run(config: Path, run_dir: Path, kills: int, seed: int) -> int:
    """Kill and start again, `kills` times, then let it finish. Returns the kills during saves."""
    chance, began, done, in_saves = random.Random(seed), time.monotonic(), 0, 0
    while done < kills:
        life = Life(config, run_dir)
        what = _kill(life, chance)
        codes = life.end()
        found = sorted(path.parent.name for path in run_dir.glob(f"checkpoints/step*/{MANIFEST}"))
        done += what is not None
        in_saves += "save" in (what or "")
        print(f"{time.monotonic() - began:7.1f} s  kill {done:3d}: {what or 'came too late'}; exit "
              f"codes {codes}; last checkpoint {found[-1] if found else 'none'}", flush=True)
        assert codes != [0] * RANKS, f"the training ended after {done} kills; take more steps"
    codes = Life(config, run_dir).end_undisturbed()
    assert codes == [0] * RANKS, codes
    return in_saves


def differences(calm: Path, killed: Path, steps: int) -> list[str]:
    """What is not equal bit for bit: losses of any step, files of the last checkpoint."""
    found = [tag for tag in TAGS if records(calm, tag) != records(killed, tag)
             or len(records(killed, tag)) != steps]
    ends = [read_contents(path / "checkpoints" / tag_of(steps)) for path in (calm, killed)]
    kinds = {name.split("-")[0] for name in ends[0].files}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    found += [name for name in ends[0].files if ends[0].files[name] != ends[1].files.get(name)]
    steps_logged = [json.loads(line)["step"] for line in
                    (killed / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
    return found + (["a step is there twice"] if len(set(steps_logged)) < len(steps_logged) else [])


def run(work: Path, kills: int, steps: int, seed: int) -> tuple[list[str], int]:
    """(differences from the undisturbed run, kills during saves)."""
    config = write_world(work, steps)
    codes = Life(config, work / "runs/calm").end_undisturbed()
    assert codes == [0] * RANKS, f"{codes}; see {work / 'calm.log'}"
    in_saves = disturbed_run(config, work / "runs/killed", kills, seed)
    return differences(work / "runs/calm", work / "runs/killed", steps), in_saves


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    different, in_saves = run(arguments.work, arguments.kills, arguments.steps, arguments.seed)
    print(f"{arguments.kills} kills, {in_saves} of them during saves, {arguments.steps} steps: "
          + (f"DIFFERENT: {different}" if different else
             "losses, weights, moments and EMA equal the undisturbed run's bit for bit"))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
