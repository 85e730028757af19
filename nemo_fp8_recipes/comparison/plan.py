"""What a comparison runs: one variant for each recipe, checked before the first one starts."""

from __future__ import annotations

import datetime
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]  # comes with OmegaConf, without types

from nemo_fp8_recipes import config, preflight, recipes
from nemo_fp8_recipes.errors import ConfigError, Fp8Error, RunDirectoryError
from nemo_fp8_recipes.training.job import check
from nemo_fp8_recipes.training.run_directory import DEFAULT_PARENT, METRICS_FILE, RUN_FILE, read_run

__all__ = ["Plan", "Variant", "flat", "make_plan"]

BASELINE = "bf16"
COMPARISON_FILE = "comparison.json"
_RECIPE = "fp8_recipe="
_UNSAFE = re.compile(r"[^A-Za-z0-9_.=+-]+")
_OURS = ("run_dir", "training.resume", "training.stop_at_step", "launcher")
_MAY_DIFFER = ("run_dir", "training.resume", "training.stop_at_step", "launcher", "debug")
"""Keys of the configuration that do not change what a run computes."""


@dataclass(frozen=True)
class Variant:
    """One run of the comparison.

    Attributes:
        label: what the table calls it, unique in the comparison; also its directory's name.
        recipe: canonical name.
        overrides: of its configuration, without its run directory.
        path: its run directory.
        config: the composed configuration.
    """

    label: str
    recipe: str
    overrides: tuple[str, ...]
    path: Path
    config: DictConfig

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.config.training.steps)

    def status(self) -> str | None:
        """Status in its run's record; None where there is no run yet."""
        return str(read_run(self.path)["status"]) if (self.path / RUN_FILE).exists() else None


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison, the baseline first.

    Attributes:
        directory: holds the run directories.
        variants: in the order they are run.
        baseline: label of the one that the others are compared with; None: with none.
    """

    directory: Path
    variants: tuple[Variant, ...]
    baseline: str | None


def make_plan(
    overrides: Sequence[str],
    *,
    more: Sequence[str] = (),
    baseline: str | None = BASELINE,
    resume: bool = False,
) -> Plan:
    """Compose every run, and check that it can start, before any does.

    Args:
        overrides: of all runs; `fp8_recipe=a,b,c` names the recipes, `run_dir=` the directory of the
        comparison. more: each one more run: "RECIPE [key=value ...]", for options that not every recipe has.
        baseline: recipe that the others are compared with; it is run too. None: there is none.
        resume: go on with the comparison in the directory: runs that finished are kept as they are.

    Raises:
        ConfigError: no recipe, the same one twice, a key that the comparison sets itself; a finished run of
            another configuration.
        RunDirectoryError: the directory holds something already, or with `resume` no comparison.
        PreflightError: one of the runs would fail.
    """
    names, common, directory = _split(overrides)
    asked = [(name, ()) for name in names] + [_parse(text) for text in more]
    if not asked:
        raise ConfigError(
            "No recipe to compare.",
            key="fp8_recipe",
            allowed=recipes.names(),
            hint="Example: nemo-fp8 compare fp8_recipe=mxfp8,blockwise,delayed",
        )
    if baseline is not None:
        chosen = recipes.resolve(baseline).choice
        if (chosen, ()) not in asked:
            asked.insert(0, (chosen, ()))
        asked.sort(key=lambda run: run != (chosen, ()))
    parent = _directory(directory, resume=resume)
    variants = tuple(_variant(name, options, common, parent) for name, options in asked)
    labels = [variant.label for variant in variants]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{label} is asked for twice.", key="fp8_recipe", value=label)
    for variant in variants:
        _check(variant, resume=resume)
    return Plan(parent, variants, recipes.resolve(baseline).choice if baseline is not None else None)


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str], str | None]:
    """The recipes, what all runs have in common, and the directory."""
    names: list[str] = []
    common: list[str] = []
    directory: str | None = None
    for override in overrides:
        key = override.partition("=")[0]
        if override.startswith(_RECIPE):
            names += [
                recipes.resolve(name).choice for name in override.removeprefix(_RECIPE).split(",") if name
            ]
        elif key == "run_dir":
            directory = override.partition("=")[2]
        elif key in _OURS or key.startswith("launcher."):
            raise ConfigError(
                f"nemo-fp8 compare does not take {key}: it runs one process after the other, here.",
                key=key,
                value=override,
                hint="Give --resume to go on with a comparison; nemo-fp8 launch -m submits recipes as a job "
                "array.",
            )
        else:
            common.append(override)
    return names, common, directory


def _parse(text: str) -> tuple[str, tuple[str, ...]]:
    """ "RECIPE key=value ..." as choice and overrides."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--run {text!r} cannot be read: {error}.", key="--run", value=text) from error
    if not words:
        raise ConfigError("--run needs a recipe.", key="--run", value=text)
    return recipes.resolve(words[0].removeprefix(_RECIPE)).choice, tuple(words[1:])


def _variant(name: str, options: tuple[str, ...], common: Sequence[str], parent: Path) -> Variant:
    said = [option.removeprefix("fp8_recipe.") for option in options]
    label = _UNSAFE.sub("_", ",".join([name, *said])).strip("_")
    path = parent / label
    overrides = (f"{_RECIPE}{name}", *common, *options)
    composed = config.compose([*overrides, f"run_dir={_quoted(path)}"])
    return Variant(label, recipes.load(composed.fp8_recipe).name, overrides, path, composed)


def _quoted(path: Path) -> str:
    """A path as Hydra's override grammar takes it whatever is in it."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def _directory(given: str | None, *, resume: bool) -> Path:
    if given is None:
        if resume:
            raise ConfigError(
                "--resume needs the directory of the comparison.",
                key="run_dir",
                hint="Example: nemo-fp8 compare run_dir=runs/compare-20260101-120000 --resume fp8_recipe=...",
            )
        return (DEFAULT_PARENT / f"compare-{datetime.datetime.now():%Y%m%d-%H%M%S}").resolve()
    path = Path(given.strip("'\"")).resolve()
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{path} is a file, not a directory.", key="run_dir", value=given)
    if (path / RUN_FILE).exists():
        raise RunDirectoryError(
            f"{path} is a run directory, and a comparison needs one of its own.", key="run_dir", value=given
        )
    if not resume and path.exists() and any(path.iterdir()):
        raise RunDirectoryError(
            f"{path} is not empty.",
            key="run_dir",
            value=given,
            hint="Give --resume to go on with the comparison in it, or name another directory.",
        )
    return path


def _check(variant: Variant, *, resume: bool) -> None:
    """What would make this run fail later, named with its label."""
    try:
        check(variant.config)
        preflight.require(preflight.check_job(variant.config))
    except Fp8Error as error:
        error.add_note(f"In the run {variant.label}.")
        raise
    if resume and variant.status() is not None:
        _same_configuration(variant)


def _same_configuration(variant: Variant) -> None:
    """A run that is there must be of this configuration: a table of unlike runs would compare nothing."""
    file = variant.path / "config.yaml"
    if not file.exists() and not (variant.path / METRICS_FILE).exists():
        return  # it was killed at its first moment
    try:
        there = OmegaConf.load(file)
    except (OSError, ValueError, YAMLError) as error:
        raise RunDirectoryError(
            f"{file} cannot be read: {error}.",
            value=str(file),
            hint="Which configuration that run had is not known: put its directory aside to train it anew.",
        ) from error
    now = OmegaConf.create(OmegaConf.to_yaml(variant.config, resolve=True))
    old, new = flat(there), flat(now)
    different = sorted(key for key in {*old, *new} if old.get(key) != new.get(key) and not _may_differ(key))
    if different:
        key = different[0]
        raise ConfigError(
            f"The run in {variant.path} has {key}={old.get(key)}, and now {key}={new.get(key)} is asked for.",
            key=key,
            value=new.get(key),
            hint="Give the overrides that the comparison was started with, or another run_dir.",
        )


def _may_differ(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _MAY_DIFFER)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a configuration."""
    if OmegaConf.is_dict(node):
        found: dict[str, Any] = {}
        for key in node:
            found.update(flat(node[key], f"{prefix}.{key}" if prefix else str(key)))
        return found
    return {prefix: OmegaConf.to_container(node) if OmegaConf.is_list(node) else node}
