"""Start Python programs as forks of one process that has done train.py's imports.

The imports take most of a short training, and the tests start hundreds of them. A program started
here is a process of its own: session, environment, arguments, output, exit status and signals are
those of one started by a launcher. Two things differ: what a library reads from the environment
when it is imported was read before, and all programs share one hash seed. Real interpreters are
left to the tests of launchers, of Slurm, of S3 and of a killed watched run.

multiprocessing's fork server with a preload does not serve: its children have its session and
standard streams, share its resource tracker, and would take the loader's workers from it, so that
signals to a rank's process group would reach other processes than on a cluster.
"""

import fcntl
import json
import multiprocessing.util
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

ROOT = Path(__file__).parents[2]
STOPS = (signal.SIGUSR1, signal.SIGTERM)
ADDRESS = "AVFULLDIT_TESTS_ZYGOTE"  # a variable: the processes of pytest-xdist share one


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


def start() -> None:
    """Start the zygote of this process and of those it will start; it ends with this process."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(b"")  # an address of the kernel's choice, in no folder
    listener.listen(100)
    zygote = subprocess.Popen(
        [sys.executable, "-m", "tests.support.zygote", str(listener.fileno())], cwd=ROOT,
        stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True)
    _zygotes.append(zygote)  # its standard input ends with this process
    os.environ[ADDRESS] = listener.getsockname().hex()
    listener.close()


_zygotes: list[subprocess.Popen[bytes]] = []


def _address() -> bytes:
    """Where the zygote listens; a program that comes before its imports are done waits for it."""
    if ADDRESS not in os.environ:
        start()
    return bytes.fromhex(os.environ[ADDRESS])


def serve(listener: socket.socket) -> None:
    """One keeper for every program that is asked for, until the asking process is gone."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  deepspeed.initialize does
    import torch.utils.cpp_extension  # noqa: F401

    import data.prepare  # noqa: F401
    import evaluation.samples  # noqa: F401
    import playground.world.clip  # noqa: F401
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
    """Be the interpreter that runs COMMAND: a file, -m MODULE or -c TEXT, and its arguments."""
    os.setsid()
    for target, stream in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    stand_by()
    how, named = command[0], command[0] in ("-m", "-c")
    sys.argv = command[1:] if named else command
    status = 0
    try:
        if how == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        elif how == "-c":
            sys.argv[0], sys.path[0] = "-c", str(ROOT)
            exec(compile(command[1], "<string>", "exec"), sys.modules["__main__"].__dict__)  # noqa: S102
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


def stand_by() -> None:
    """Keep a fork of this program, made before it has threads, to be its fork server if it asks.

    Else the loader's would be a new interpreter with the same imports, in every rank.
    """
    ours, its = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        for number in STOPS:  # they are for the program, of whose group this is
            signal.signal(number, signal.SIG_IGN)
        text, fds, _, _ = socket.recv_fds(its, 1 << 16, 16)
        its.close()
        if not text:  # the program has ended, or is gone
            os._exit(0)
        wanted, heard, code = json.loads(text)
        for number in heard:
            signal.signal(number, signal.SIG_DFL)
        for fd, target in zip([fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for fd in fds], wanted,
                              strict=True):
            os.dup2(fd, target)
        exec(code, {})  # noqa: S102  multiprocessing's own: from ... import main; main(...)
        os._exit(0)
    its.close()
    started = multiprocessing.util.spawnv_passfds

    def spawnv_passfds(path: bytes, arguments: list[str], passed: list[int]) -> int:
        if "multiprocessing.forkserver" not in arguments[-1]:
            return started(path, arguments, passed)
        heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
        text = json.dumps([list(passed), heard, arguments[-1]])
        socket.send_fds(ours, [text.encode()], passed)
        return pid

    multiprocessing.util.spawnv_passfds = spawnv_passfds  # type: ignore[attr-defined]


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
