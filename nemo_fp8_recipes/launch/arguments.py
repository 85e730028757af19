"""What was typed after `nemo-fp8 launch`: options, overrides, and after `--` a script with its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_fp8_recipes.errors import ConfigError, nearest

__all__ = ["Arguments", "Payload", "parse"]

_OPTIONS = {
    "--dry-run": "dry_run",
    "--resume": "resume",
    "--overwrite": "overwrite",
    "--on-node": "on_node",
    "-m": "multirun",
    "--multirun": "multirun",
}


@dataclass(frozen=True)
class Payload:
    """What each process runs: `train` with the overrides, or the user's own script or module."""

    kind: Literal["train", "script", "module"]
    target: str = ""
    """Path of the script, or name of the module."""
    arguments: tuple[str, ...] = ()
    """Of the script or module."""

    @property
    def words(self) -> tuple[str, ...]:
        """As typed after `--`; empty for `train`."""
        if self.kind == "train":
            return ()
        flag = ("-m",) if self.kind == "module" else ()
        return (*flag, self.target, *self.arguments)


@dataclass(frozen=True)
class Arguments:
    """The command line of `nemo-fp8 launch`, taken apart."""

    overrides: tuple[str, ...]
    payload: Payload
    dry_run: bool = False
    resume: bool = False
    overwrite: bool = False
    multirun: bool = False
    on_node: bool = False
    """Set by the batch script on each node of the job; not for typing."""


def parse(words: Sequence[str]) -> Arguments:
    """Take the words after `launch` apart.

    Raises:
        ConfigError: an unknown option, `--` with nothing behind it, a script that does not exist, or
        `--resume` together with `--overwrite`.
    """
    own = list(words)
    payload = Payload("train")
    if "--" in own:
        cut = own.index("--")
        payload = _payload(own[cut + 1 :])
        own = own[:cut]
    flags: dict[str, bool] = {}
    overrides = []
    for word in own:
        if not word.startswith("-"):
            overrides.append(word)
        elif word in _OPTIONS:
            flags[_OPTIONS[word]] = True
        else:
            close = nearest(word, _OPTIONS)
            raise ConfigError(
                f"nemo-fp8 launch has no option {word}.",
                key=word,
                allowed=[option for option in _OPTIONS if option != "--on-node"],
                hint=f"Did you mean {close}?" if close else None,
            )
    if flags.get("resume") and flags.get("overwrite"):
        raise ConfigError(
            "--resume goes on with a run, --overwrite replaces it: give one.", key="--overwrite"
        )
    return Arguments(tuple(overrides), payload, **flags)


def _payload(words: list[str]) -> Payload:
    if words[:1] == ["-m"]:
        if len(words) < 2:
            raise ConfigError("-- -m names no module.", key="--", hint="Example: -- -m my_package.pretrain")
        return Payload("module", words[1], tuple(words[2:]))
    if not words:
        raise ConfigError(
            "There is nothing after --.",
            key="--",
            hint="Put the path of a Python script and its arguments there, or leave -- out to train.",
        )
    script = Path(words[0])
    if not script.is_file():
        raise ConfigError(
            f"There is no script {script}.",
            key="--",
            value=words[0],
            hint="Give the path of a Python script.",
        )
    return Payload("script", str(script.resolve()), tuple(words[1:]))
