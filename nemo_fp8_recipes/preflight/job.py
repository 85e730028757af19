"""A composed configuration and this machine, as preflight input. Imports neither torch nor TE."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from nemo_fp8_recipes import typed
from nemo_fp8_recipes.errors import ConfigError, PreflightError, nearest
from nemo_fp8_recipes.preflight import driver
from nemo_fp8_recipes.preflight.finding import Finding, worst_first
from nemo_fp8_recipes.preflight.hardware import posing_device
from nemo_fp8_recipes.preflight.inputs import Hardware, PreflightInput
from nemo_fp8_recipes.preflight.megatron import MegatronSettings
from nemo_fp8_recipes.preflight.registry import all_rules
from nemo_fp8_recipes.preflight.shapes import HybridShape, ModelShape, Parallel, linears
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.recipes.modules import ModuleRecipe, module_recipes_of, recipes_of
from nemo_fp8_recipes.recipes.schedule import schedule_of
from nemo_fp8_recipes.targets import transformer_engine, versions
from nemo_fp8_recipes.targets.megatron_lm.precision_config import precision_config

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = [
    "check",
    "check_job",
    "check_on",
    "hardware_here",
    "ignoring",
    "installed_versions",
    "job_input",
    "named_hardware",
]

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


def check_on(job: PreflightInput, gpus: Iterable[Hardware]) -> dict[str, list[Finding]]:
    """`check` of the job on each of these GPUs, by the GPU's name."""
    rules = all_rules().values()
    common = [finding for rule in rules if not rule.of_gpu for finding in rule.findings(job)]
    found = {}
    for gpu in gpus:
        here = dataclasses.replace(job, hardware=gpu)
        own = [finding for rule in rules if rule.of_gpu for finding in rule.findings(here)]
        found[gpu.name] = worst_first([*own, *common])
    return found


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
        knows_model: whether `config.model` is the model that will run; otherwise neither
            shapes nor Megatron's settings are checked.

    Raises:
        ConfigError: `preflight.ignore` names a code that does not exist.
        EmulationError: the device asked for cannot be had here.
    """
    job = job_input(config, os.environ if environment is None else environment, emulated=emulated)
    job = dataclasses.replace(job, runs_here=runs_here)
    if not knows_model:
        job = dataclasses.replace(job, model=None, distributed_optimizer=None, megatron=MegatronSettings())
    if found is not None and config.hardware.name == "auto":
        job = dataclasses.replace(job, hardware=found)
    findings = check(job)
    for key, variant in _variants(config, job):
        findings += [
            dataclasses.replace(finding, message=f"In {key}, {variant.recipe.name}: {finding.message}")
            for finding in check(variant)
            if finding not in findings
        ]
    return ignoring(findings, list(config.preflight.ignore))


def _variants(config: DictConfig, job: PreflightInput) -> Iterator[tuple[str, PreflightInput]]:
    """The job with each further recipe that it trains with, and the key that asks for it."""
    schedule = schedule_of(config)
    for recipe in schedule.recipes()[1:]:
        yield "recipe_schedule", dataclasses.replace(job, recipe=recipe)
    for recipe in recipes_of(module_recipes_of(config, schedule)):
        if recipe not in schedule.recipes():
            # Which of the model's shapes it meets depends on the modules: device and versions do not.
            yield "recipe_modules", dataclasses.replace(job, recipe=recipe, model=None)


def ignoring(findings: Iterable[Finding], codes: Iterable[str]) -> list[Finding]:
    """`findings` with those of these codes as "info", so that they do not stop the job.

    Raises:
        ConfigError: there is no such code.
    """
    ignored = _ignored(list(codes))
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
    schedule = schedule_of(config)
    modules = module_recipes_of(config, schedule)
    recipe = schedule.main
    precision_config(recipe, modules)  # refuses what Megatron cannot give to single modules
    if emulated is None:
        emulated = _emulated(values["device"], environment)
    model = values["model"]
    parallel = values["parallel"]
    shape = ModelShape(
        **{key: model[key] for key in _SHAPE_KEYS},
        micro_batch_size=values["training"]["micro_batch_size"],
        gated=model["activation"] == "swiglu",
        make_vocab_size_divisible_by=model["make_vocab_size_divisible_by"],
        packing_multiple=values["training"]["packing_multiple"],
        hybrid=HybridShape(**model["hybrid"]) if model["hybrid"] is not None else None,
    )
    cut = Parallel(**{key: parallel[key] for key in ("tp", "pp", "cp", "ep", "sequence")})
    return PreflightInput(
        recipe=recipe,
        hardware=_hardware(values["hardware"], (*schedule.recipes(), *recipes_of(modules)), emulated),
        model=shape,
        parallel=cut,
        elsewhere=_elsewhere(modules, shape, cut),
        modules=modules,
        emulated=emulated,
        environment=environment,
        scheduled=len(schedule.recipes()) > 1,
        megatron=typed.read(MegatronSettings, values["megatron"], key="megatron", error=ConfigError),
        distributed_optimizer=values["optimizer"]["distributed_optimizer"],
        telemetry=values["telemetry"]["enabled"],
        attention_dropout=model["attention_dropout"],
        **_versions(values["versions"]),
    )


def _versions(stated: Mapping[str, str | None]) -> dict[str, Any]:
    """What the configuration states, and for the rest what is installed here."""
    given: dict[str, Any] = {f"{key}_version": value for key, value in stated.items() if value is not None}
    if stated["cuda"] is not None:
        given["cuda_version"] = _two(versions.parse(stated["cuda"]))
    return installed_versions() | given


def installed_versions() -> dict[str, Any]:
    """The versions of this environment, as `PreflightInput` takes them."""
    return {
        "te_version": transformer_engine.installed_version(),
        "megatron_core_version": versions.installed("megatron-core"),
        "nemo_version": versions.installed("nemo-toolkit"),
        "bridge_version": versions.installed("megatron-bridge"),
        "python_version": ".".join(str(part) for part in sys.version_info[:3]),
        "cuda_version": _cuda_version(versions.installed("torch")),
    }


def _two(numbers: tuple[int, ...]) -> tuple[int, int]:
    """Major and minor, (13, 0) for (13,)."""
    major, minor, *_ = (*numbers, 0)
    return major, minor


def _emulated(device: str, environment: Mapping[str, str]) -> bool:
    emulation = importlib.import_module("nemo_fp8_recipes.emulation")
    return bool(emulation.should_start(device, environment))


@functools.cache
def named_hardware(name: str) -> Hardware:
    """The GPU of conf/hardware/<name>.yaml.

    Raises:
        ConfigError: there is no such choice.
    """
    from nemo_fp8_recipes import config

    return _as_hardware(dataclasses.asdict(config.load_hardware(name)))


def _elsewhere(modules: Sequence[ModuleRecipe], model: ModelShape, parallel: Parallel) -> frozenset[str]:
    """The kinds of linear layers that `modules` take out of the job's recipe in every layer."""
    return frozenset(
        linear.name
        for linear in linears(model, parallel)
        if all(
            any(entry.matches(f"decoder.layers.{layer}.{linear.name}") for entry in modules)
            for layer in range(model.num_layers)
        )
    )


def _hardware(node: Mapping[str, Any], recipes: Sequence[Recipe], emulated: bool) -> Hardware:
    """The device named; for auto the one that emulation poses as, or what the driver here says."""
    if node["name"] != "auto":
        return _as_hardware(node)
    if emulated:
        main, *others = recipes
        return named_hardware(posing_device(main, "auto", *others))
    return hardware_here() or _as_hardware(node)


def hardware_here() -> Hardware | None:
    """The GPU of this machine, as its driver says; None where it has none.

    Raises:
        PreflightError: the driver fails, or the machine has GPUs of different compute capability.
    """
    gpus = driver.found()
    if not gpus:
        return None
    if len({gpu.compute_capability for gpu in gpus}) > 1:
        raise PreflightError(
            f"This machine has different GPUs: {', '.join(sorted({gpu.name for gpu in gpus}))}.",
            key="hardware",
            value="auto",
            hint="Choose them with CUDA_VISIBLE_DEVICES, or name one: hardware=h100.",
        )
    return Hardware(
        name="auto",
        display_name=gpus[0].name,
        capability=gpus[0].compute_capability,
        memory_gb=gpus[0].memory_gb,
    )


def _as_hardware(node: Mapping[str, Any]) -> Hardware:
    capability = node["compute_capability"]
    return Hardware(
        name=node["name"],
        display_name=node["display_name"],
        capability=tuple(capability) if capability is not None else None,
        memory_gb=node["memory_gb"],
    )


def _cuda_version(torch_version: str | None) -> tuple[int, int] | None:
    """CUDA of a torch build as its version says, (12, 8) for "2.9.0+cu128"; None where it does not."""
    found = _CUDA.search(torch_version or "")
    return (int(found.group(1)), int(found.group(2))) if found else None
