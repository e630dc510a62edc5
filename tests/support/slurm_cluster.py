"""A Slurm cluster of several nodes on one machine, for tests: its own munged, slurmctld and slurmd, on loopback, in one folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")


def missing_programs() -> list[str]:
    """Return the programs of Slurm and munge that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"  # where Debian installs the servers; not in a user's PATH


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster; `environment` makes Slurm's programs connect to it."""

    environment: dict[str, str]

    def run(self, *command: str, **environment: str) -> str:
        """Run one of Slurm's programs and return its output. Raises AssertionError if it fails."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**self.environment, **environment})
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return a job's state: PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.job(job)["JobState"]

    def job(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` prints about a job, by field name."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextlib.contextmanager
def slurm_cluster(*, nodes: int, cpus: int) -> Iterator[SlurmCluster]:
    """Start a cluster; stop all of its processes at the end."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a short path: a socket's path may have at most 107 characters
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    cluster = SlurmCluster(environment)
    folder.chmod(0o755)
    for name in ("munge", "state", "log", "run"):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge" / "key").chmod(0o600)
    (folder / "munge").chmod(0o700)
    (folder / "slurm.conf").write_text(_configuration(folder, nodes=nodes, cpus=cpus))
    servers: list[subprocess.Popen[bytes]] = []

    def serve(*command: str) -> None:
        with (folder / "log" / f"{len(servers)}.log").open("wb") as log:
            servers.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))

    try:
        serve(*_munged(folder))
        _wait_for((folder / "run" / "munge.sock").exists, "munged", folder)
        serve("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for number in range(1, nodes + 1):
            serve("slurmd", "-D", "-N", f"n{number}", "-f", str(folder / "slurm.conf"))
        _wait_for(lambda: _idle_nodes(environment) == nodes, "the nodes", folder)
        yield cluster
    finally:
        with contextlib.suppress(AssertionError):
            cluster.run("scancel", "--user", getpass.getuser())
            _wait_for(lambda: not cluster.run("squeue", "--noheader"), "the jobs' end", folder)
        for server in reversed(servers):
            with contextlib.suppress(ProcessLookupError):
                server.terminate()
        for server in servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _munged(folder: Path) -> list[str]:
    run, munge = folder / "run", folder / "munge"
    return [
        *("munged", "--foreground", "--force", f"--key-file={munge / 'key'}", f"--socket={run / 'munge.sock'}"),
        *(f"--pid-file={run / 'munged.pid'}", f"--log-file={folder / 'log' / 'munged.log'}", f"--seed-file={munge / 'seed'}"),
    ]


def _configuration(folder: Path, *, nodes: int, cpus: int) -> str:
    """Return a slurm.conf without accounting, cgroup process tracking or task binding, none of which works everywhere.

    cred_expire shortens the delay before a requeued job may start again (two minutes by default); a start must take less. The other
    timeouts are longer than Slurm's defaults, so that a busy machine is not taken for a broken one.
    """
    ports = _free_ports(nodes + 1)
    host = socket.gethostname().partition(".")[0]
    machines = "".join(
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000\n"
        for number, port in enumerate(ports[1:], start=1)
    )
    return f"""\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=15
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdSpoolDir={folder}/state/%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
ReturnToService=2
MessageTimeout=100
TCPTimeout=30
BatchStartTimeout=100
SlurmdTimeout=900
{machines}PartitionName=main Nodes=n[1-{nodes}] Default=YES State=UP
"""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _idle_nodes(environment: dict[str, str]) -> int:
    shown = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True, check=False, timeout=100, env=environment)
    return shown.stdout.split().count("idle")


def _wait_for(condition: Callable[[], bool], what: str, folder: Path, *, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(path.read_text(errors="replace")[-1000:] for path in sorted((folder / "log").iterdir()))
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}:\n{logs}"
        time.sleep(0.1)
