"""Start real processes the way users do; shared by the tests that train."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tests.support.zygote import ROOT, Program

TIMEOUT = 600  # seconds
LAUNCHER_WAITS = 30  # seconds before a launcher ends the other ranks, as `srun --wait` does


def environment() -> dict[str, str]:
    """This process's environment without any rank, on the CPU, ninja on the PATH."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {key: value for key, value in os.environ.items()
             if key not in ranks and not key.startswith("SLURM_")}
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"
    return clean | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(command: list[str], check: bool = True, **extra: str) -> subprocess.CompletedProcess:
    """One command from the repository's root; its output is in the error when it fails."""
    if command[0] == sys.executable:
        with _outputs() as (output, errors):
            program = Program(command[1:], environment() | extra, output, errors)
            return _finish([program], command, output, errors, check)
    done = subprocess.run(
        command, cwd=ROOT, env=environment() | extra, capture_output=True, text=True,
        timeout=TIMEOUT, check=False,
    )
    return _checked(done, check)


def start_ranks(
    processes: int, command: list[str], outputs: list[IO[str]], **extra: str
) -> list[Program]:
    """`python COMMAND` on every rank, as srun starts it: no launcher that could end the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        Program(command, environment() | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        } | extra, output, errors)
        for rank, (output, errors) in enumerate(zip(outputs[::2], outputs[1::2], strict=True))
    ]


def run_ranks(processes: int, *command: str, check: bool = True) -> subprocess.CompletedProcess:
    """`python COMMAND` on every rank to its end; what they said is in the error when one fails."""
    with _outputs() as (output, errors):
        programs = start_ranks(processes, list(command), [output, errors] * processes)
        return _finish(programs, list(command), output, errors, check)


@contextlib.contextmanager
def _outputs() -> Iterator[tuple[IO[str], IO[str]]]:
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        yield output, errors


def _finish(
    programs: list[Program], command: list[str], output: IO[str], errors: IO[str], check: bool,
) -> subprocess.CompletedProcess:
    """Wait for all; one that fails gives the others half a minute, as launchers do."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(program.poll() is None for program in programs):
            if any(program.returncode for program in programs):
                deadline = min(deadline, time.monotonic() + LAUNCHER_WAITS)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for program in programs:
            program.kill()
    status = next((code for code in [program.wait() for program in programs] if code), 0)
    texts = []
    for file in (output, errors):
        file.seek(0)
        texts.append(file.read())
    return _checked(subprocess.CompletedProcess(command, status, *texts), check)


def _checked(done: subprocess.CompletedProcess, check: bool) -> subprocess.CompletedProcess:
    if check and done.returncode:
        raise AssertionError(f"{' '.join(done.args)} exited with {done.returncode}\n"
                             f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    return done


def records(run_dir: Path, tag: str) -> dict[int, float]:
    """step -> value of one tag of a run's metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {record["step"]: record[tag] for record in found if tag in record}
