"""A private Slurm of two nodes on this machine: real slurmctld, slurmd and munged, own ports.

    with Cluster(folder) as slurm:
        job = slurm.submit("--nodes=2", "launch/train.sbatch", "configs/x.yaml")
        slurm.wait(job, "COMPLETED")

Both nodes are this machine under another name (`slurmd -N`), each with mounts and a /dev/shm of its
own. Nothing of a Slurm that the machine may already run is touched. Partition `high` preempts
`low`. Needs root, and Debian's slurm-wlm and munge.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from tests.support.launch import ROOT, environment

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare", "setpriv")
CORES = 4  # per node, and GPUs, as Slurm counts; the machine has what it has
# Measured: a requeued job waits as long as a credential lives (120 s where nothing is set).
REQUEUE_DELAY = 10

CONF = """
ClusterName=private
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={delay}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=0
MpiDefault=none
ReturnToService=2
FirstJobId={first_job}
KillWait={kill_wait}
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs={cores} RealMemory=2000 Gres=gpu:{cores}
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port1}
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port2}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs a private cluster needs and this machine has not."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """Two nodes, n1 and n2; `grace` seconds between a preempted job's SIGTERM and its end."""

    def __init__(self, folder: Path, grace: int = 60, kill_wait: int = 30) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        ports = _free_ports(3)
        for name in ("munge", "state", "spool-n1", "spool-n2", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        (folder / "munge").chmod(0o755)
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        self.conf = folder / "slurm.conf"
        self.conf.write_text(CONF.format(
            user=user, folder=folder, port=ports[0], port1=ports[1], port2=ports[2], cores=CORES,
            # Ports and folders of a job come from its number; two clusters must not share them.
            first_job=1 + secrets.randbelow(10000),
            delay=REQUEUE_DELAY, grace=grace, kill_wait=kill_wait,
        ))
        # Not GPUs, but counted: the scripts ask for them as they do on a real cluster.
        devices = ("null", "zero", "full", "random")
        (folder / "gres.conf").write_text("".join(f"Name=gpu File=/dev/{x}\n" for x in devices))
        self.environment = environment() | {"SLURM_CONF": str(self.conf),
                                             "SLURM_TMPDIR": str(folder / "tmp")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"

    def __enter__(self) -> "Cluster":
        try:
            self._start_all()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start_all(self) -> None:
        munge = self.folder / "munge"
        self._start("munged", "munged", "-F", "--force", f"--key-file={munge}/key",
                    f"--socket={munge}/socket", f"--pid-file={munge}/pid",
                    f"--log-file={munge}/log", f"--seed-file={munge}/seed")
        _wait_for(lambda: (munge / "socket").exists(), 20, "munged's socket")
        self._start("slurmctld", "slurmctld", "-D", "-c")
        self.start_node("n1")
        self.start_node("n2")
        self.until_idle()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        jobs = self.run("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            print(f"cancelling jobs {' '.join(jobs)}", flush=True)
            self.run("scancel", *jobs, check=False)
        deadline = time.monotonic() + 60
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        for name in ("n1", "n2"):
            if name in self.daemons:
                self._kill_all_on(name)
        for name in ("slurmctld", "munged"):
            if name in self.daemons:
                self._stop(name)

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "a") as log:
            self.daemons[name] = subprocess.Popen(  # goes with this process, however that ends
                ["setpriv", "--pdeathsig", "TERM", *command], env=self.environment, stdout=log,
                stderr=log, start_new_session=True)

    def _stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        daemon = self.daemons.pop(name)
        daemon.send_signal(how)
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def start_node(self, node: str) -> None:
        """A slurmd whose jobs have a shared memory of their own, as on another machine."""
        own = 'mount -t tmpfs shm /dev/shm && exec "$@"'
        self._start(node, "unshare", "--mount", "sh", "-c", own, "sh",
                    "slurmd", "-D", "-N", node, "-f", str(self.conf))

    def crash_node(self, node: str) -> None:
        """As when its power fails: the daemon and every process of every job on it, at once."""
        self._kill_all_on(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crashed")

    def _kill_all_on(self, node: str) -> None:
        machine = os.readlink(f"/proc/{self.daemons[node].pid}/ns/mnt")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone in between
                if os.readlink(process / "ns" / "mnt") == machine:
                    os.kill(int(process.name), signal.SIGKILL)
        self.daemons.pop(node).wait()

    def until_idle(self) -> None:
        _wait_for(lambda: self.node_states() == {"n1": "idle", "n2": "idle"}, 60,
                  f"idle nodes; logs in {self.folder}")

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t", check=False).split("\n")
        return dict(line.split() for line in lines if line.strip())

    def run(self, *command: str, check: bool = True, **extra: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.environment | extra, text=True,
                              capture_output=True, timeout=120, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} exited with {done.returncode}: "
                                 f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def submit(self, *arguments: str, **extra: str) -> int:
        """sbatch; the job's id."""
        return int(self.run("sbatch", "--parsable", *arguments, **extra).split(";")[0])

    def show(self, job: int | str) -> dict[str, str]:
        """`scontrol show job` as a dict."""
        text = self.run("scontrol", "show", "job", "-o", str(job))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, job: int | str, state: str, timeout: float = 180) -> dict[str, str]:
        """Until the job is in `state`; fails early when it has ended otherwise."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"} - {state}
        deadline = time.monotonic() + timeout
        while True:
            found = self.show(job)
            if found["JobState"] == state:
                return found
            if found["JobState"] in ends or time.monotonic() > deadline:
                raise AssertionError(
                    f"job {job} is {found['JobState']} ({found['Reason']}), not {state}:\n"
                    f"{self.log(found)[-8000:]}")
            time.sleep(0.3)

    def log(self, job: dict[str, str] | int) -> str:
        """What the job wrote."""
        found = job if isinstance(job, dict) else self.show(job)
        path = Path(found["StdOut"])
        return path.read_text(errors="replace") if path.exists() else "(no log)"


def _wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.2)


# python -m tests.support.slurm_cluster COMMAND: a shell on a private cluster
if __name__ == "__main__":
    if sys.argv[1:2] in ([], ["--help"]):
        print(__doc__, "\n    python -m tests.support.slurm_cluster COMMAND    # in such a cluster")
        sys.exit()
    with tempfile.TemporaryDirectory(prefix="slurm") as place, Cluster(Path(place)) as private:
        sys.exit(subprocess.run(sys.argv[1:], env=private.environment, check=False).returncode)
