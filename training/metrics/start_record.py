"""The reproducibility card: one "start" in RUN/events.jsonl for every start of the run.

With RUN/config/*.json (what was resolved) and the skips and substitutions among the events it says
what made the weights: code, packages, hardware, data, weights, seed, world size, every resume and
every skipped update. Called by train.py on rank 0.
"""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.events import append_event
from common.git import run_git
from common.ranks import World

PACKAGES = ("torch", "deepspeed", "mosaicml-streaming", "numpy", "diffusers", "transformers",
            "safetensors", "flash-attn", "triton")


def write_start(
    run_dir: Path, world: World, hosts: list[str], first_step: int, **values: Any
) -> dict[str, Any]:
    """Append this start's event and return it; a dirty checkout's patch goes into RUN/config.

    Args:
        hosts: of every rank. values: seed, fingerprints of data and weights, the tag resumed from.
    """
    folder = run_dir / "config"
    folder.mkdir(parents=True, exist_ok=True)
    card = {
        "first_step": first_step,
        "world_size": world.world_size,
        "ranks_per_node": world.local_world_size,
        "launcher": world.source,
        "hosts": sorted(set(hosts)),
        "job": {key: os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")
                if key in os.environ},
        "code": describe_code(folder),
        "python": platform.python_version(),
        "packages": _versions(),
        "hardware": describe_hardware(),
        **values,
    }
    return append_event(run_dir, "start", **card)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # flash-attn is optional
            continue
    return found


def describe_code(folder: Path) -> dict[str, Any]:
    """Commit and uncommitted changes of the checkout; the patch goes into `folder`."""
    commit, patch = run_git("rev-parse", "HEAD").decode().strip(), run_git("diff", "HEAD")
    if not commit:
        return {"commit": None}
    names = run_git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", ":/")
    untracked = names.decode(errors="replace").split("\0")[:-1]
    code: dict[str, Any] = {"commit": commit, "dirty": bool(patch), "untracked": untracked}
    if patch:
        name = f"uncommitted-{hashlib.sha256(patch).hexdigest()[:12]}.patch"
        (folder / name).write_bytes(patch)
        code["patch"] = name
    return code


def describe_hardware() -> Mapping[str, Any]:
    """CPU, memory and GPU of this node."""
    found: dict[str, Any] = {"cpus": os.cpu_count(), "machine": platform.machine(),
                             "kernel": platform.release()}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found["memory_gib"] = round(pages / 2**30, 1)
    if torch.cuda.is_initialized():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(),
                  "cuda": torch.version.cuda, "nccl": torch.cuda.nccl.version()}
    return found
