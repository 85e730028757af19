"""The typed shape of the group `launcher`: where and how a job is started. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_fp8_recipes.errors import ConfigError

__all__ = ["GROUPS", "LauncherConfig", "LocalConfig", "SlurmConfig", "TorchrunConfig"]

EnvironmentValue = str | int | float | bool
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:]+\]|[^\s:]+):(\d{1,5})")


def _refuse(key: str, value: object, *allowed: str, hint: str | None = None) -> ConfigError:
    return ConfigError(
        f"launcher.{key}={value!r} is not possible.",
        key=f"launcher.{key}",
        value=value,
        allowed=allowed or None,
        hint=hint,
    )


def _at_least(config: object, minimum: int, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if value is not None and value < minimum:
            raise _refuse(key, value, f">= {minimum}")


@dataclass
class LauncherConfig:
    """What every launcher takes."""

    name: str
    environment: dict[str, EnvironmentValue] = field(default_factory=dict)
    hang_timeout_minutes: float = 30
    stop_timeout_seconds: int = 300

    def __post_init__(self) -> None:
        _at_least(self, 0, "hang_timeout_minutes")
        _at_least(self, 1, "stop_timeout_seconds")
        for variable, value in self.environment.items():
            if not _VARIABLE.fullmatch(variable):
                raise _refuse(f"environment.{variable}", value, "letters, digits and _ in a name")
            if "\0" in str(value):
                raise _refuse(f"environment.{variable}", value, "text without a NUL character")


@dataclass
class _NamedJob(LauncherConfig):
    """A launcher that is no batch system and so has to be given, or make up, the job's id."""

    job_id: str | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.job_id is not None and not _JOB_ID.fullmatch(str(self.job_id)):
            raise _refuse("job_id", self.job_id, "up to 64 letters, digits, '.', '_' and '-'")


@dataclass
class LocalConfig(_NamedJob):
    """One process on this machine."""


@dataclass
class TorchrunConfig(_NamedJob):
    """torchrun on this node, which may be one of several."""

    nodes: int = 1
    nproc_per_node: int | None = None
    rendezvous: str | None = None
    rendezvous_timeout_minutes: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "nodes", "nproc_per_node", "rendezvous_timeout_minutes")
        if self.rendezvous is not None:
            match = _ENDPOINT.fullmatch(self.rendezvous)
            if match is None or not 0 < int(match.group(2)) < 65536:
                raise _refuse("rendezvous", self.rendezvous, "HOST:PORT")
        if self.nodes > 1:
            for key in ("rendezvous", "job_id"):
                if getattr(self, key) is None:
                    raise ConfigError(
                        f"launcher.{key} needs a value: {self.nodes} nodes must share it.",
                        key=f"launcher.{key}",
                        hint="Type the same command on every node, such as launcher.rendezvous=node-1:29500 "
                        "launcher.job_id=42.",
                    )


@dataclass
class SlurmConfig(LauncherConfig):
    """A batch job of SLURM."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    nodes: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    memory: str | int | None = None
    exclusive: bool = False
    time: str | int | None = None
    job_name: str | None = None
    comment: str | None = None
    sbatch_arguments: list[str] = field(default_factory=list)
    srun_arguments: list[str] = field(default_factory=list)
    tasks: Literal["node", "gpu"] = "node"
    nproc_per_node: int | None = None
    rendezvous_host: str | None = None
    rendezvous_port: int | None = None
    rendezvous_timeout_minutes: int = 10
    python: str | None = None
    container_image: str | None = None
    container_mounts: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    pre_commands: list[str] = field(default_factory=list)
    requeue: bool = True
    max_requeues: int = 20
    signal_seconds: int = 300
    array_parallel: int | None = None
    wait: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "nodes", "nproc_per_node", "cpus_per_task", "rendezvous_timeout_minutes")
        _at_least(self, 1, "signal_seconds", "array_parallel")
        _at_least(self, 0, "gpus_per_node", "max_requeues")
        if self.rendezvous_port is not None and not 1024 <= self.rendezvous_port < 65536:
            raise _refuse("rendezvous_port", self.rendezvous_port, "1024 to 65535")
        if self.signal_seconds > 65535:  # sbatch --signal refuses more
            raise _refuse("signal_seconds", self.signal_seconds, "<= 65535")
        for key in ("sbatch_arguments", "srun_arguments"):
            for argument in getattr(self, key):
                if not argument.startswith("-"):
                    raise _refuse(key, argument, "options that start with -, values after =")


# One schema a choice of the group.
GROUPS: dict[str, type[Any] | dict[str, type[Any]]] = {
    "launcher": {"local": LocalConfig, "torchrun": TorchrunConfig, "slurm": SlurmConfig},
}
