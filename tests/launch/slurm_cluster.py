"""A real SLURM cluster on this machine: munged, one slurmctld, several slurmd, all in a temporary directory.

Debian's packages `slurm-wlm` and `munge`, run as root (slurmd starts jobs as their owners). The nodes share
the host's name and address and differ in their ports, which is all that SLURM needs to tell them apart.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    return None


@dataclass(frozen=True)
class Cluster:
    """A running cluster; commands reach it through `environment`."""

    directory: Path
    nodes: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**clean, "SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": _PATH}

    def run(self, *command: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command; raises when it fails."""
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=60, **options
        )  # type: ignore[call-overload]  # options are subprocess.run's own

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, field by field."""
        shown = self.run("scontrol", "show", "job", "-o", job_id).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def wait(self, job_id: str, *states: str, seconds: float) -> dict[str, str]:
        """Wait until the job is in one of `states`; raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while True:
            job = self.job(job_id)
            if job["JobState"] in states:
                return job
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is {job['JobState']} ({job.get('Reason')}), not {states}")
            time.sleep(0.5)

    def start_again(self, job_id: str) -> None:
        """Start a requeued job without the two minutes that SLURM waits. Not at once: in the second in which
        it ended, slurmd takes the new start for the one that it has just ended, and SLURM fails the job."""
        time.sleep(3)
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _configuration(directory: Path, nodes: tuple[str, ...], munge_socket: Path) -> str:
    host = socket.gethostname().split(".")[0]
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={_free_port()}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={munge_socket}",
        "CredType=cred/munge",
        "SlurmUser=root",
        "SlurmdUser=root",
        f"StateSaveLocation={directory}/state",
        f"SlurmdSpoolDir={directory}/spool-%n",
        f"SlurmctldPidFile={directory}/slurmctld.pid",
        f"SlurmdPidFile={directory}/slurmd-%n.pid",
        f"SlurmctldLogFile={directory}/slurmctld.log",
        f"SlurmdLogFile={directory}/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "MpiDefault=none",
        "ReturnToService=2",
        "SlurmdParameters=config_overrides",
        "SwitchType=switch/none",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2,requeue_delay=1",
        "JobRequeue=1",
        "KillWait=15",
        "MinJobAge=3600",
        "InactiveLimit=0",
        "SlurmctldTimeout=30",
        "SlurmdTimeout=60",
        "AccountingStorageType=accounting_storage/none",
        "JobAcctGatherType=jobacct_gather/none",
        "JobCompType=jobcomp/none",
    ]
    lines += [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} CPUs=4 State=UNKNOWN"
        for name in nodes
    ]
    lines.append(f"PartitionName=main Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP")
    return "\n".join(lines) + "\n"


def _start_munged(directory: Path) -> tuple[subprocess.Popen[bytes], Path]:
    user = pwd.getpwnam("munge")
    home = directory / "munge"
    home.mkdir()
    key = home / "munge.key"
    key.write_bytes(os.urandom(1024))
    for path in (home, key):
        os.chown(path, user.pw_uid, user.pw_gid)
    home.chmod(0o755)  # clients reach the socket
    key.chmod(0o400)
    where = home / "munge.socket"
    files = [f"--socket={where}", f"--key-file={key}", f"--pid-file={home}/munged.pid"]
    files += [f"--log-file={home}/munged.log", f"--seed-file={home}/munged.seed"]
    daemon = subprocess.Popen(
        [shutil.which("munged", path=_PATH) or "munged", "--foreground", "--force", *files],
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return daemon, where


def _wait_for(condition: object, what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]  # a callable
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds} s")
        time.sleep(0.2)


@contextmanager
def start(directory: Path, nodes: tuple[str, ...] = ("n1", "n2")) -> Iterator[Cluster]:
    """A cluster of `nodes`, ended with its jobs and daemons when the block ends."""
    for parent in (directory, *directory.parents):
        if parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(parent.stat().st_mode | 0o055)  # the munge user has to come through
    daemons: list[subprocess.Popen[bytes]] = []
    cluster = Cluster(directory, nodes)
    try:
        munged, where = _start_munged(directory)
        daemons.append(munged)
        _wait_for(where.exists, "munged's socket")
        (directory / "state").mkdir()
        for name in nodes:
            (directory / f"spool-{name}").mkdir()
        (directory / "slurm.conf").write_text(_configuration(directory, nodes, where))
        commands = [["slurmctld", "-D", "-f"], *(["slurmd", "-D", "-N", name, "-f"] for name in nodes)]
        for command in commands:
            daemons.append(
                subprocess.Popen(
                    [
                        shutil.which(command[0], path=_PATH) or command[0],
                        *command[1:],
                        directory / "slurm.conf",
                    ],
                    env=cluster.environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        _wait_for(lambda: _idle(cluster) == len(nodes), "all nodes idle", 60)
        yield cluster
    finally:
        _end(cluster, daemons)


def _idle(cluster: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%T"], env=cluster.environment, capture_output=True, text=True, timeout=30
    )
    return done.stdout.split().count("idle")


def _end(cluster: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    if len(daemons) > 1:
        subprocess.run(
            ["scancel", "--signal=KILL", "--full", "--state=RUNNING", "-u", "root"],
            env=cluster.environment,
            capture_output=True,
            timeout=30,
        )
        subprocess.run(["scancel", "-u", "root"], env=cluster.environment, capture_output=True, timeout=30)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            left = subprocess.run(
                ["squeue", "-h"], env=cluster.environment, capture_output=True, text=True, timeout=30
            )
            if not left.stdout.strip():
                break
            time.sleep(0.5)
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
    for daemon in reversed(daemons):
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
