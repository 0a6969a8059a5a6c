"""Starts Python programs as forks of one process that has done train.py's imports.

They take some ten seconds of a core, most of a short training, and the tests start hundreds of
them. A program started here is a process of its own: session, environment, arguments, output, exit
status and signals are those of one started by a launcher. Two things differ: what a library reads
from the environment when it is imported was read before, and all programs share one hash seed.
Real interpreters are left to the tests of launchers, of Slurm, of S3 and of a killed watched run.
"""

import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, NoReturn

from training.distributed import leave

ROOT = Path(__file__).parents[1]


class Program:
    """`python COMMAND` from the repository's root; as much of subprocess.Popen as tests need."""

    def __init__(
        self, command: list[str], environment: dict[str, str], output: IO[str], errors: IO[str],
    ) -> None:
        self.returncode: int | None = None
        self._keeper = socket.socket(socket.AF_UNIX)
        self._keeper.connect(_address())
        socket.send_fds(self._keeper, [b"."], [output.fileno(), errors.fileno()])
        self._keeper.sendall(json.dumps([command, environment]).encode() + b"\n")
        self._told = self._keeper.makefile()
        self.pid = int(self._told.readline())

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, -N after signal N; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._keeper], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("python", timeout or 0)
            self.returncode = int(self._told.readline())
            self._told.close()
            self._keeper.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """SIGKILL to it and to what it started in its session."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


@functools.cache
def _address() -> str:
    """Where the zygote of this process listens; it ends with this process."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(b"")  # an address of the kernel's choice, in no folder
    listener.listen()
    zygote = subprocess.Popen(
        [sys.executable, "-m", "tests.zygote", str(listener.fileno())], cwd=ROOT,
        stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True)
    _zygotes.append(zygote)  # its standard input ends with this process
    address = listener.getsockname()
    listener.close()
    return address


_zygotes: list[subprocess.Popen[bytes]] = []


def serve(listener: socket.socket) -> None:
    """One keeper for every program that is asked for, until the asking process is gone."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  deepspeed.initialize does
    import torch.utils.cpp_extension  # noqa: F401

    import train  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            keep(connection)
        connection.close()


def keep(connection: socket.socket) -> NoReturn:
    """Fork the program, tell its pid, wait for it, tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, 2)
    with connection.makefile() as file:
        command, environment = json.loads(file.readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        become(command, environment, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(b"%d\n" % pid)
    _, status = os.waitpid(pid, 0)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def become(command: list[str], environment: dict[str, str], streams: list[int]) -> NoReturn:
    """Be the interpreter that runs COMMAND: a file or -m MODULE, and its arguments."""
    os.setsid()
    for target, stream in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    module = command[0] == "-m"
    sys.argv = command[1:] if module else command
    status = 0
    try:
        if module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str((ROOT / command[0]).parent)
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  as the interpreter does
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    leave(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
