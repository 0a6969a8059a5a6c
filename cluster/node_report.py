"""What one rank can say of its node without talking to others, and what the ranks' reports mean.

`look` measures, `judge` compares: who differs, who is slow, who cannot see the data. Called by
cluster.preflight.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common.git import run_git, short_commit
from common.ranks import World
from training.distributed import on_gpu

CLOCK_SECONDS = 5.0
SLOW = {"cuda": 1.5, "cpu": 4.0}  # times the median; CPU processes may share a core
DISK_GB, MEMORY_FRACTION = 5.0, 0.8  # free on the node; free of a GPU that nobody else should use
FETCH_SECONDS = 90.0  # for the remote data of a config
EQUAL = ("versions", "driver", "device", "code")


def look(values: dict[str, Any], world: World) -> dict[str, Any]:
    """This rank's report; a problem of its own is a line in `problems`."""
    report: dict[str, Any] = {
        "host": os.environ.get("SLURMD_NODENAME", socket.gethostname()), "problems": [],
        "versions": {name: version(name) for name in ("torch", "deepspeed", "mosaicml-streaming")}
        | {"python": platform.python_version()},
        "code": read_code(), "driver": read_driver(), "memory": 0.0,
        "disk": shutil.disk_usage(tempfile.gettempdir()).free / 1e9,
    }
    if report["disk"] < DISK_GB:
        report["problems"].append(f"{report['disk']:.1f} GB free in {tempfile.gettempdir()}")
    report["problems"] += unreachable(values)
    if world.local_rank == 0:  # one of a node asks
        report["problems"] += unfetched(values)
    try:
        report |= measure_device(world)
    except (RuntimeError, AssertionError) as error:  # no driver, a GPU that fell off the bus
        report |= {"device": "none", "seconds": 0.0}
        report["problems"].append(f"device {world.local_rank}: {str(error).splitlines()[0]}")
    return report


def measure_device(world: World) -> dict[str, Any]:
    """Name, free GB and the seconds of one matrix product, the best of several."""
    if on_gpu():
        device, size, dtype = torch.device("cuda", world.local_rank), 8192, torch.bfloat16
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info(device)
        if free < MEMORY_FRACTION * total:
            raise RuntimeError(f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free: in use")
        name, memory = torch.cuda.get_device_name(device), free / 1e9
    else:
        device, size, dtype = torch.device("cpu"), 512, torch.float32
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        name, memory = "cpu", int(available[1]) * 1024 / 1e9 if available else 0.0
    # Whole numbers, small enough to be exact in any order of summation.
    left = torch.randint(-2, 3, (size, size), device=device).to(dtype)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        product = left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        # Summed over columns it is left times left's row sums; bfloat16 rounds 0.2 % away.
        found, expected = product.double().sum(1), left.double() @ left.double().sum(1)
        if not bool((found - expected).norm() < 0.01 * expected.norm()):  # also where it is NaN
            raise RuntimeError("a matrix product came out wrong")
    return {"device": name, "memory": memory, "seconds": min(times)}


def read_driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].split("Module")[-1].split()[0] if path.exists() else ""


def read_code() -> str:
    """Commit and a digest of what differs from it; "" where there is no git."""
    counts = run_git("diff", "HEAD", "--shortstat").decode().strip()
    digest = hashlib.sha256(run_git("diff", "HEAD", "--binary")).hexdigest()[:8]
    return short_commit() + (f" +{counts}, {digest}" if counts else "")


def data_places(values: dict[str, Any], key: str) -> list[str]:
    """Every data.root or data.remote; train.py refuses what is not a mapping."""
    data = values.get("data")
    streams = data.get("streams") if isinstance(data, dict) else None
    found = [data, *(streams if isinstance(streams, list) else [])]
    return [str(one[key]) for one in found if isinstance(one, dict) and one.get(key)]


def unreachable(values: dict[str, Any]) -> list[str]:
    """Folders that the config names and this node does not see; hub ids are no folders."""
    places = {f"data.root={root}": root for root in data_places(values, "root")}
    for key in ("wan", "tangoflux"):
        name = str(values.get(key, ""))
        if name.startswith(("/", ".", "weights/")):
            places[f"{key}={name}"] = name
    found = [f"{what} is not reachable" for what, place in places.items() if not filled(place)]
    run_dir = Path(values["run_dir"])
    if not (run_dir.is_dir() and os.access(run_dir, os.W_OK)):  # rank 0 has made it
        found.append(f"run_dir={run_dir} is not writable, or not the same on all nodes")
    return found


def unfetched(values: dict[str, Any]) -> list[str]:
    """Remote data that this node cannot fetch the first small file of."""
    remotes = data_places(values, "remote")
    if not remotes:
        return []
    command = [sys.executable, "-m", "data.loading.reach", *remotes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS,
                              check=False)
    except subprocess.TimeoutExpired:
        return [f"data.remote={remote} is not reachable (no answer in {FETCH_SECONDS:.0f} s)"
                for remote in remotes]
    lines = done.stdout.splitlines()
    return lines or done.stderr.splitlines()[-1:] if done.returncode else []


def filled(place: str) -> bool:
    """An empty folder is what is left where a file system is not mounted."""
    try:
        return any(os.scandir(place))
    except OSError:
        return False


def judge(reports: dict[int, dict[str, Any]]) -> dict[str, list[str]]:
    """host -> what is wrong with it, from the ranks' reports; a pure function."""
    wrong: dict[str, list[str]] = {}

    def blame(report: dict[str, Any], problem: str) -> None:
        lines = wrong.setdefault(report["host"], [])
        if problem not in lines:
            lines.append(problem)

    now = statistics.median(report["clock"] for report in reports.values())
    usual = {key: Counter(json.dumps(report[key]) for report in reports.values()).most_common(1)
             for key in EQUAL}
    for report in reports.values():
        for problem in report["problems"]:
            blame(report, problem)
        if abs(report["clock"] - now) > CLOCK_SECONDS:
            blame(report, f"clock is {report['clock'] - now:+.0f} s off")
        for key in EQUAL:
            if json.dumps(report[key]) != usual[key][0][0]:
                blame(report, f"{key} {report[key]} differs from {usual[key][0][0]}")
    ranks_of = Counter(report["host"] for report in reports.values())
    for key, what in (("seconds", "matrix product"), ("node_seconds", "all-reduce in the node")):
        # A rank alone on its node sends nothing: those microseconds say nothing of the node.
        times = {rank: report[key] for rank, report in reports.items() if report.get(key)
                 and (key == "seconds" or ranks_of[report["host"]] > 1)}
        for rank, seconds in times.items():
            kind = "cpu" if reports[rank]["device"] == "cpu" else "cuda"
            # Of two the faster: a mean of both would hide a slow one. (CPUs vary more than that.)
            middle = statistics.median_low if kind == "cuda" else statistics.median
            median, factor = middle(times.values()), SLOW[kind]
            if seconds > factor * median:
                blame(reports[rank], f"rank {rank}: {what} took {1e3 * seconds:.1f} ms, median "
                                     f"{1e3 * median:.1f} ms")
    return wrong


def describe(reports: dict[int, dict[str, Any]]) -> str:
    """A line per node."""
    nodes: dict[str, list[dict[str, Any]]] = {}
    for report in reports.values():
        nodes.setdefault(report["host"], []).append(report)
    return "\n".join(
        f"preflight: {host}  {len(own)} x {own[0]['device']}  driver {own[0]['driver'] or '-'}  "
        f"free {min(r['memory'] for r in own):.0f} GB, disk {min(r['disk'] for r in own):.0f} GB  "
        f"product {1e3 * max(r['seconds'] for r in own):.1f} ms  all-reduce in the node "
        f"{1e3 * max(r.get('node_seconds', 0) for r in own):.1f} ms, over all "
        f"{1e3 * max(r.get('all_seconds', 0) for r in own):.1f} ms" for host, own in nodes.items())
