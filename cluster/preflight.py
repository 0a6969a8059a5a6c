"""Before a job takes its time: is every node as good as the others, and which one is not.

    srun ... python -m cluster.preflight CONFIG [key=value ...]

Every rank looks at itself (device, driver, memory, disk, clock, versions, code, the paths that the
config names, one matrix product) and reports to rank 0 through a key-value store, before any
collective can hang. Then the ranks of each node reduce among themselves, then all of them. Rank 0
says what it found, a line per node, and whom to exclude: a node that does not answer, answers late,
differs, or computes wrongly or slowly. Exit status 0: go on. Called by launch/train.sbatch.
"""

import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.node_report import describe, judge, look
from common.ranks import World, WorldError, export_world, resolve_world
from common.settings import ConfigError, overlay, parse_overrides, read_yaml
from training.distributed import on_gpu

ANSWER_SECONDS = 180.0  # for a node to start Python and look at itself
REDUCE_SECONDS = 90.0  # for the first collective, which builds the connections


def reduce_timed(group: Any, ranks: int, device: torch.device) -> float:
    """Seconds of one all-reduce, the best of several; RuntimeError if a sum is wrong."""
    times = []
    for _ in range(4):
        values = torch.ones(1 << (24 if device.type == "cuda" else 16), device=device)
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if not bool((values == ranks).all()):
            raise RuntimeError(f"an all-reduce over {ranks} ranks came out wrong")
    return min(times)


class Meeting:
    """The store through which ranks report to rank 0, stage by stage."""

    def __init__(self, world: World, hosts: list[str]) -> None:
        self.world, self.hosts = world, hosts
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world.world_size,
            is_master=world.is_main, wait_for_workers=False,
            timeout=timedelta(seconds=ANSWER_SECONDS),
        )
        # A wait blocks every other call on the same connection.
        self.own = self.store.clone()  # type: ignore[attr-defined]

    def host(self, rank: int) -> str:
        node = rank // self.world.local_world_size
        return self.hosts[node] if node < len(self.hosts) else f"node {node}"

    def tell(self, stage: str, report: dict[str, Any]) -> None:
        self.own.set(f"{stage}/{self.world.rank}", json.dumps(report))

    def collect(self, stage: str, seconds: float) -> tuple[dict[int, dict], list[int]]:
        """(reports by rank, ranks that did not answer in time)."""
        until, reports = time.monotonic() + seconds, {}
        waiting = set(range(self.world.world_size))
        while waiting and time.monotonic() < until:
            for rank in sorted(waiting):
                if self.store.check([f"{stage}/{rank}"]):
                    reports[rank] = json.loads(self.store.get(f"{stage}/{rank}"))
                    waiting.discard(rank)
            time.sleep(0.05)
        return dict(sorted(reports.items())), sorted(waiting)

    def silent(self, ranks: list[int], doing: str) -> dict[str, list[str]]:
        """Blame for the nodes of ranks that did not answer."""
        return {self.host(rank): [f"rank {rank} did not answer: {doing}"] for rank in ranks[::-1]}

    def verdict(self, wrong: dict[str, list[str]]) -> int:
        """Rank 0's last word, to all."""
        for host, problems in sorted(wrong.items()):
            print(f"error: preflight: {host}: {'; '.join(problems)}", file=sys.stderr)
        if wrong:
            names = ",".join(sorted(wrong))
            advice = f"submit again with --exclude={names}, and report it to the administrators"
            everywhere = len(wrong) * self.world.local_world_size >= self.world.world_size
            if everywhere and all("is not reachable" in text for each in wrong.values()
                                  for text in each):
                advice = "no node has it: make it, or put its right place into the configuration"
            print(f"error: preflight: {advice}", file=sys.stderr, flush=True)
        self.store.set("verdict", "1" if wrong else "0")
        return 1 if wrong else 0

    def preside(self) -> int:
        """Rank 0, in a thread of its own: its collectives may hang like any other's."""
        reports, missing = self.collect("look", ANSWER_SECONDS)
        if missing:
            return self.verdict(self.silent(missing, "it may not have started") | judge(reports))
        self.store.set("go", "")
        clocks, missing = self.collect("clock", REDUCE_SECONDS)
        wrong = self.silent(missing, "it stopped") or judge(
            {rank: reports[rank] | clocks[rank] for rank in reports})
        self.store.set("reduce", "no" if wrong else "yes")
        for stage in () if wrong else ("node", "all"):
            times, missing = self.collect(stage, REDUCE_SECONDS)
            where = "in the node" if stage == "node" else "between nodes"
            wrong |= self.silent(missing, f"the all-reduce {where} failed or hung")
            reports = {rank: reports[rank] | clocks[rank] | times.get(rank, {}) for rank in reports}
            wrong = wrong or judge(reports)
            if wrong:
                break
        print(describe(reports), flush=True)
        return self.verdict(wrong)


def attend(meeting: Meeting, values: dict[str, Any]) -> None:
    """Every rank's part, up to what rank 0 has decided."""
    world, store = meeting.world, meeting.own
    meeting.tell("look", look(values, world) | {"clock": 0.0})
    store.wait(["go"])
    meeting.tell("clock", {"clock": time.time()})
    store.wait(["reduce"])
    if store.get("reduce") == b"no":
        return
    device = torch.device("cuda", world.local_rank) if on_gpu() else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu() else "gloo", store=dist.PrefixStore("group", store), rank=world.rank,
        world_size=world.world_size, timeout=timedelta(seconds=REDUCE_SECONDS),
    )
    own, _ = dist.new_subgroups(world.local_world_size)
    meeting.tell("node", {"node_seconds": reduce_timed(own, world.local_world_size, device)})
    meeting.tell("all", {"all_seconds": reduce_timed(None, world.world_size, device)})


def main(arguments: list[str]) -> int:
    """Exit status 0: all nodes are good; 1: some are not, they are named; 78: bad arguments."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    began = time.monotonic()
    try:
        values = overlay(read_yaml(arguments[0]), parse_overrides(arguments[1:]))
        world = resolve_world(os.environ)
        export_world(world, os.environ)
    except (ConfigError, WorldError, IndexError) as error:
        print(f"error: preflight: {error}", file=sys.stderr)
        return 78
    if world.is_main:
        Path(values["run_dir"]).mkdir(parents=True, exist_ok=True)
    meeting = Meeting(world, os.environ.get("NODE_NAMES", "").split())
    part = threading.Thread(target=attend, args=(meeting, values), daemon=True)
    part.start()
    if world.is_main:
        code = meeting.preside()
        print(f"preflight: {world.world_size} ranks, {time.monotonic() - began:.1f} s", flush=True)
        time.sleep(1.0)  # the others read the verdict before its store goes
    else:
        meeting.store.wait(["verdict"], timedelta(seconds=ANSWER_SECONDS + 3 * REDUCE_SECONDS))
        code = int(meeting.store.get("verdict"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a hung collective must not keep the process


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
