"""A composed configuration and this machine, as preflight input. Imports neither torch nor TE."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import ConfigError, nearest
from nemo_fp8_recipes.preflight.finding import Finding, worst_first
from nemo_fp8_recipes.preflight.hardware import posing_device
from nemo_fp8_recipes.preflight.inputs import Hardware, PreflightInput
from nemo_fp8_recipes.preflight.registry import all_rules
from nemo_fp8_recipes.preflight.shapes import HybridShape, ModelShape, Parallel
from nemo_fp8_recipes.recipes.schedule import Schedule, schedule_of
from nemo_fp8_recipes.targets import transformer_engine, versions

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["check", "check_job", "job_input", "named_hardware"]

_SHAPE_KEYS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "seq_length",
)
_CUDA = re.compile(r"cu(\d\d)(\d)$")


def check(job: PreflightInput) -> list[Finding]:
    """Everything that is known to fail or to hurt, worst first."""
    return worst_first(finding for rule in all_rules().values() for finding in rule.findings(job))


def check_job(
    config: DictConfig,
    environment: Mapping[str, str] | None = None,
    *,
    emulated: bool | None = None,
    runs_here: bool = True,
    found: Hardware | None = None,
    knows_model: bool = True,
) -> list[Finding]:
    """The findings for a composed configuration on this machine.

    Findings named in `preflight.ignore` come back as "info", so that they do not stop the job.

    Args:
        config: what `config.compose` returned.
        environment: the process environment; None: this process's.
        emulated: whether the device is emulated; None: as `device=` and this machine decide.
        runs_here: whether the job runs on this machine, with the packages installed here.
        found: the GPU that the job runs on, once it is known: it takes the place of hardware=auto.
        knows_model: whether `config.model` is the model that will run; otherwise no shape is checked.

    Raises:
        ConfigError: `preflight.ignore` names a code that does not exist.
        EmulationError: the device asked for cannot be had here.
    """
    ignored = _ignored(list(config.preflight.ignore))
    job = job_input(config, os.environ if environment is None else environment, emulated=emulated)
    job = dataclasses.replace(job, runs_here=runs_here, model=job.model if knows_model else None)
    if found is not None and job.hardware.capability is None:
        job = dataclasses.replace(job, hardware=found)
    findings = check(job)
    for other in schedule_of(config).recipes()[1:]:
        findings += [
            dataclasses.replace(finding, message=f"In recipe_schedule, {other.name}: {finding.message}")
            for finding in check(dataclasses.replace(job, recipe=other))
            if finding not in findings
        ]
    return worst_first(_lighter(finding) if finding.code in ignored else finding for finding in findings)


def _ignored(codes: list[str]) -> set[str]:
    known = list(all_rules())
    for code in codes:
        if code not in known:
            close = next((k for k in known if k.lower() == code.lower()), None) or nearest(
                code.upper(), known
            )
            raise ConfigError(
                f"preflight.ignore names '{code}', which is no finding's code.",
                key="preflight.ignore",
                value=code,
                allowed=known,
                hint=f"Did you mean '{close}'?" if close else None,
            )
    return set(codes)


def _lighter(finding: Finding) -> Finding:
    return dataclasses.replace(
        finding, severity="info", message=f"Ignored as preflight.ignore says: {finding.message}"
    )


def job_input(
    config: DictConfig, environment: Mapping[str, str], *, emulated: bool | None = None
) -> PreflightInput:
    """The configuration, the installed versions and the environment as the rules read them."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    recipe = recipes.load(values["fp8_recipe"])
    if emulated is None:
        emulated = _emulated(values["device"], environment)
    model = values["model"]
    parallel = values["parallel"]
    return PreflightInput(
        recipe=recipe,
        hardware=_hardware(values["hardware"], schedule_of(config), emulated),
        model=ModelShape(
            **{key: model[key] for key in _SHAPE_KEYS},
            micro_batch_size=values["training"]["micro_batch_size"],
            gated=model["activation"] == "swiglu",
            hybrid=HybridShape(**model["hybrid"]) if model["hybrid"] is not None else None,
        ),
        parallel=Parallel(**{key: parallel[key] for key in ("tp", "pp", "cp", "ep", "sequence")}),
        emulated=emulated,
        te_version=values["versions"]["te"] or transformer_engine.installed_version(),
        cuda_version=_cuda_version(versions.installed("torch")),
        environment=environment,
    )


def _emulated(device: str, environment: Mapping[str, str]) -> bool:
    emulation = importlib.import_module("nemo_fp8_recipes.emulation")
    return bool(emulation.should_start(device, environment))


def named_hardware(name: str) -> Hardware:
    """The GPU of conf/hardware/<name>.yaml.

    Raises:
        ConfigError: there is no such choice.
    """
    from nemo_fp8_recipes import config

    return _as_hardware(dataclasses.asdict(config.load_hardware(name)))


def _hardware(node: Mapping[str, Any], schedule: Schedule, emulated: bool) -> Hardware:
    """The device named; for auto the one that emulation poses as, or an unknown one."""
    if node["name"] == "auto" and emulated:
        main, *others = schedule.recipes()
        return named_hardware(posing_device(main, "auto", *others))
    return _as_hardware(node)


def _as_hardware(node: Mapping[str, Any]) -> Hardware:
    capability = node["compute_capability"]
    return Hardware(
        name=node["name"],
        display_name=node["display_name"],
        capability=tuple(capability) if capability is not None else None,
    )


def _cuda_version(torch_version: str | None) -> tuple[int, int] | None:
    """CUDA of a torch build as its version says, (12, 8) for "2.9.0+cu128"; None where it does not."""
    found = _CUDA.search(torch_version or "")
    return (int(found.group(1)), int(found.group(2))) if found else None
