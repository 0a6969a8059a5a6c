"""Everything that needs one large GPU, most important first, within a time limit.

    python -m benchmarks.gpu [--out runs/gpu] [--seconds 1200] [--only NAME ...] [--rehearse]

Every section is a process of its own: an error or a lack of memory in one takes nothing from the
others. The next section imports while one runs, and touches the device only when that has ended.
OUT/result.json is whole after every section; OUT/NAME.log has what a section printed.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

SLACK = 8.0  # seconds kept for writing the result


class Section(NamedTuple):
    """One process."""

    name: str
    module: str
    argument: str = ""
    least: float = 40.0  # seconds that must be left to start it
    most: float = 150.0  # seconds after which it is ended
    expandable: bool = True  # PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True


def _steps(name: str, least: float, most: float, expandable: bool = True) -> Section:
    return Section(name, "steps", name, least, most, expandable)


def _loop(name: str, least: float = 40.0) -> Section:
    return Section(name, "baselines", name, least, 100.0)


SECTIONS = (
    Section("kernels", "kernels", least=20, most=70),
    Section("numerics", "numerics", least=30, most=100),
    _steps("t2av", 50, 240),
    _steps("t2v", 40, 150, expandable=False),
    _steps("t2av_single", 40, 120),
    _steps("t2av_5s", 60, 150),
    _steps("t2av_zero1", 45, 120),
    _loop("bare_t2av_compiled"),
    _loop("diffusers_t2v_recompute"),
    _steps("t2av_zero3", 45, 120),
    _steps("t2av_micro1", 50, 120),
    _steps("t2av_micro4", 50, 120),
    _loop("bare_t2v_compiled"),
    _loop("diffusers_t2v_recompute_batch1"),
    _loop("bare_t2v_eager"),
)


def environment(section: Section, caches: str) -> dict[str, str]:
    """As launch/env.sh sets it; compiled code is kept for the sections that follow."""
    values = os.environ | {
        "PYTHONFAULTHANDLER": "1", "TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "WARN",
        "TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", f"{caches}/extensions"),
    }
    if section.expandable:
        values["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return values


class Process:
    """A section that has been started and waits for its turn."""

    def __init__(self, section: Section, out: Path, caches: str, rehearse: bool) -> None:
        self.section, self.result = section, out / f"{section.name}.json"
        self.result.unlink(missing_ok=True)
        self.log = open(out / f"{section.name}.log", "w", encoding="utf-8")
        arguments = [str(self.result)] + ([section.argument] if section.argument else [])
        command = [sys.executable, "-m", f"benchmarks.gpu.{section.module}", *arguments]
        self.process = subprocess.Popen(
            command + (["--rehearse"] if rehearse else []), stdin=subprocess.PIPE, stdout=self.log,
            stderr=subprocess.STDOUT, env=environment(section, caches), start_new_session=True)

    def go(self, seconds: float) -> dict[str, Any]:
        """Give it the device for so long at most; what it recorded."""
        began = time.monotonic()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"go\n")
            self.process.stdin.close()
            ended = f"exit {self.process.wait(seconds)}"
        except BrokenPipeError:
            ended = f"exit {self.process.wait()} before its turn"
        except subprocess.TimeoutExpired:
            self.kill()
            ended = f"ended after {seconds:.0f} s"
        self.log.close()
        values: dict[str, Any] = {"ended": ended, "took": time.monotonic() - began}
        if self.result.is_file():
            values |= json.loads(self.result.read_text(encoding="utf-8"))
        if ended != "exit 0":
            text = Path(self.log.name).read_text(encoding="utf-8", errors="replace")
            values["output"] = text[-3000:]
        return values

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    values: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "cpus": os.cpu_count(),
        "cudnn": torch.backends.cudnn.version(),
    }
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm",
             "--format=csv,noheader"]
    try:
        values["gpu"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        values["gpu"] = str(error)
    return values


def watch_clocks(out: Path) -> subprocess.Popen | None:
    """nvidia-smi's clocks, power and memory once a second, into OUT/clocks.csv."""
    query = "timestamp,clocks.sm,power.draw,temperature.gpu,memory.used,utilization.gpu"
    try:
        with open(out / "clocks.csv", "w", encoding="utf-8") as file:
            return subprocess.Popen(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader",
                                     "-l", "1"], stdout=file, stderr=subprocess.STDOUT)
    except OSError:
        return None


def line(name: str, way: str, values: dict[str, Any]) -> str:
    """One row of the table."""
    if "error" in values:
        return f"{name:24} {way:20} {values['error'][:90]}"
    seconds, memory = values["seconds"], values.get("memory_gib", {})
    losses = values["losses"]
    return (f"{name:24} {way:20} {seconds['median']:.4f} s [{seconds['min']:.4f}, "
            f"{seconds['max']:.4f}]  mfu {values['mfu']:.3f}  {values['tflops']:.0f} TFLOP/s  "
            f"{memory.get('allocated', 0):.1f} GiB  first {values['first_step_seconds']:.0f} s  "
            f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


def table(result: dict[str, Any]) -> str:
    """The short form of everything measured."""
    lines = []
    for name, values in result["sections"].items():
        lines.append(f"{name}: {values['ended']}, {values['took']:.0f} s")
        for way, row in values.items():
            if isinstance(row, dict) and ("losses" in row or "error" in row):
                lines.append(line(name, way, row))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=1200.0, help="for everything")
    parser.add_argument("--only", nargs="*", help="names of sections, in their order")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds - SLACK
    arguments.out.mkdir(parents=True, exist_ok=True)
    by_name = {section.name: section for section in SECTIONS}
    left = [by_name[name] for name in arguments.only or by_name]
    clocks = None if arguments.rehearse else watch_clocks(arguments.out)
    result: dict[str, Any] = {"machine": machine(), "sections": {}}
    with tempfile.TemporaryDirectory() as caches:
        start = lambda: Process(left.pop(0), arguments.out, caches, arguments.rehearse)  # noqa: E731
        following: Process | None = start()
        while following is not None:
            now, following = following, start() if left else None
            seconds = deadline - time.monotonic()
            if seconds < now.section.least:
                now.kill()
                print(f"{now.section.name}: left out, {seconds:.0f} s left", flush=True)
                continue
            values = now.go(min(seconds, now.section.most))
            result["sections"][now.section.name] = values
            print(f"{now.section.name}: {values['ended']}, {values['took']:.0f} s", flush=True)
            text = json.dumps(result, indent=1)
            (arguments.out / "result.json").write_text(text + "\n", encoding="utf-8")
    if clocks is not None:
        clocks.terminate()
    print(table(result))


if __name__ == "__main__":
    main()
