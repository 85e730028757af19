"""Do the versions know the recipe and its options, and do they go together?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_fp8_recipes.preflight.citation import Citation
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.targets.transformer_engine import newer_options
from nemo_fp8_recipes.targets.versions import at_least

# megatron/core/enums.py: Fp8Recipe and Fp4Recipe at the tags core_v0.9.0 to core_v0.16.1.
RECIPE_SINCE = {"tensorwise": "0.12", "mxfp8": "0.12", "blockwise": "0.13", "nvfp4": "0.15"}
SETTING_SINCE = {
    "fine_grained_activation_offloading": ("0.16", False),
    "moe_router_padding_for_quantization": ("0.16", False),
    "cuda_graph_impl": ("0.15", "none"),
}
PYTHON_OF_BRIDGE = ("3.12", "3.13")


def _enums(version: str, line: int, words: str) -> Citation:
    return Citation("Megatron-LM", f"core_v{version}", "megatron/core/enums.py", line, words)


@rule(
    "FP8-VER-001",
    "error",
    "Transformer Engine is older than an option",
    source="transformer_engine/common/recipe/__init__.py of each release",
    of_gpu=False,
)
def options_exist(job: PreflightInput) -> Iterator[Problem]:
    if job.te_version is None:
        return
    for name, since in newer_options(job.recipe, job.te_version):
        key = "fp8_recipe" if name == "name" else f"fp8_recipe.{name}"
        value = job.recipe.name if name == "name" else getattr(job.recipe, name)
        yield Problem(
            message=f"{key}={value} needs Transformer Engine {since}, and the job finds {job.te_version}.",
            key=key,
            value=value,
            fix=f"Upgrade Transformer Engine to {since} or later.",
        )


@rule(
    "FP8-VER-002",
    "error",
    "Transformer Engine is not installed",
    source="nemo_fp8_recipes/training",
    of_gpu=False,
)
def engine_installed(job: PreflightInput) -> Iterator[Problem]:
    if job.te_version is None:
        yield Problem(
            message="Transformer Engine is not installed here: the recipe's options are not checked.",
            key="versions.te",
            fix="pip install 'nemo-fp8-recipes[cpu]', work in a container that has it, or state the version "
            "that the job will find: versions.te=2.20.",
            severity="error" if job.runs_here else "warning",
        )


@rule(
    "FP8-VER-003",
    "error",
    "Megatron-Core is older than the recipe or a setting",
    source=(
        _enums("0.12.0", 20, 'mxfp8 = "mxfp8"'),
        _enums("0.13.0", 21, 'blockwise = "blockwise"'),
        _enums("0.15.0", 31, "class Fp4Recipe"),
    ),
    of_gpu=False,
)
def megatron_core_knows(job: PreflightInput) -> Iterator[Problem]:
    version = job.megatron_core_version
    if version is None:
        return
    since = RECIPE_SINCE.get(job.recipe.name)
    if since is not None and not at_least(version, since):
        yield Problem(
            message=f"fp8_recipe={job.recipe.name} needs Megatron-Core {since}, and the job finds {version}.",
            key="fp8_recipe",
            value=job.recipe.name,
            fix=f"Upgrade megatron-core to {since} or later.",
        )
    for key, (needed, off) in SETTING_SINCE.items():
        value = getattr(job.megatron, key)
        if value != off and not at_least(version, needed):
            yield Problem(
                message=f"megatron.{key} exists since Megatron-Core {needed}, and the job finds {version}.",
                key=f"megatron.{key}",
                value=value,
                fix=f"Upgrade megatron-core to {needed} or later, or leave megatron.{key} as it is.",
            )


@dataclass(frozen=True)
class _Set:
    """Releases of two packages that work together."""

    package: str
    releases: tuple[str, str]
    """From, and up to, not including."""
    core: tuple[str, str]


SETS = (
    _Set("NeMo", ("2.7", "2.8"), ("0.15", "0.16")),
    _Set("Megatron-Bridge", ("0.6", "0.7"), ("0.19", "0.20")),
    _Set("Megatron-Bridge", ("0.3", "0.4"), ("0.16", "0.17")),
)


def _within(version: str, releases: tuple[str, str]) -> bool:
    return at_least(version, releases[0]) and not at_least(version, releases[1])


@rule(
    "FP8-VER-004",
    "warning",
    "releases that were not built for each other",
    source="Tried: nemo_toolkit 2.7.3 runs with megatron-core 0.15.3 and not with 0.16.1; megatron-bridge "
    "0.6.2 runs with 0.19.2, 0.3.1 with 0.16.1",
    of_gpu=False,
)
def releases_go_together(job: PreflightInput) -> Iterator[Problem]:
    found = {"NeMo": job.nemo_version, "Megatron-Bridge": job.bridge_version}
    version = job.megatron_core_version
    for pair in SETS:
        other = found[pair.package]
        if other is None or version is None or not _within(other, pair.releases):
            continue
        if not _within(version, pair.core):
            yield Problem(
                message=f"{pair.package} {other} was built for Megatron-Core {pair.core[0]}, and the job "
                f"finds {version}.",
                key="versions.megatron_core",
                value=version,
                fix=f"Use megatron-core {pair.core[0]}.",
            )


@rule(
    "FP8-VER-005",
    "error",
    "NeMo without its LLM collection",
    source="nemo_toolkit 3.0 has no nemo.collections.llm",
    versions="nemo_toolkit >= 3.0",
    of_gpu=False,
)
def llm_collection(job: PreflightInput) -> Iterator[Problem]:
    if job.nemo_version is not None and at_least(job.nemo_version, "3"):
        yield Problem(
            message=f"NeMo {job.nemo_version} no longer trains language models (nemo.collections.llm).",
            key="versions.nemo",
            value=job.nemo_version,
            fix="Use nemo_toolkit 2.7.3, or Megatron-Bridge.",
            severity=None if job.bridge_version is None else "info",
        )


@rule(
    "FP8-VER-006",
    "warning",
    "a Python that a package does not declare",
    source="Requires-Python of megatron-bridge 0.6.2: >=3.12,<3.13; of this package: >=3.11",
    of_gpu=False,
)
def python_version(job: PreflightInput) -> Iterator[Problem]:
    version = job.python_version
    if version is None:
        return
    if not at_least(version, "3.11"):
        yield Problem(
            message=f"This package needs Python 3.11, and the job finds {version}.",
            key="versions.python",
            value=version,
            fix="Use Python 3.11 or later.",
            severity="error",
        )
    bridge = job.bridge_version
    if bridge is not None and at_least(bridge, "0.6") and not _within(version, PYTHON_OF_BRIDGE):
        yield Problem(
            message=f"Megatron-Bridge {bridge} declares Python 3.12, and the job finds {version}.",
            key="versions.python",
            value=version,
            fix="Use Python 3.12, or install it with pip --ignore-requires-python.",
        )


@dataclass(frozen=True)
class _Change:
    """What a release of Transformer Engine changed for a recipe."""

    since: str
    recipes: tuple[str, ...]
    told: str
    source: str


CHANGES = (
    _Change(
        "2.6",
        ("mxfp8",),
        "an earlier release does not refuse MXFP8 on compute capability 12.x, which has not all GEMM layouts",
        "transformer_engine/pytorch/fp8.py: check_mxfp8_support, v2.5 and v2.6",
    ),
    _Change(
        "2.9",
        ("blockwise",),
        "an earlier release runs block scaling on Hopper only",
        "transformer_engine/pytorch/fp8.py: check_fp8_block_scaling_support, v2.8 and v2.9",
    ),
)


@rule(
    "FP8-VER-007",
    "info",
    "what a newer Transformer Engine changed",
    source="transformer_engine of the releases named in the message",
    of_gpu=False,
)
def changed_since(job: PreflightInput) -> Iterator[Problem]:
    if job.te_version is None:
        return
    for change in CHANGES:
        if job.recipe.name in change.recipes and not at_least(job.te_version, change.since):
            yield Problem(
                message=f"Transformer Engine {change.since} changed something for {job.recipe.name}, and the "
                f"job finds {job.te_version}: {change.told}.",
                key="versions.te",
                value=job.te_version,
                fix=f"Upgrade to {change.since} or later, or keep that in mind.",
                source=change.source,
            )


@rule(
    "FP8-VER-008",
    "warning",
    "a Transformer Engine that Megatron-Core does not declare",
    source="Requires-Dist of megatron-core 0.16.1: transformer-engine >= 2.9, < 2.12 (its extra `dev`); "
    "2.11, 2.14, 2.17 and 2.20 trained with it on the emulated device",
    versions="megatron-core 0.16",
    of_gpu=False,
)
def undeclared_engine(job: PreflightInput) -> Iterator[Problem]:
    version, found = job.megatron_core_version, job.te_version
    if version is None or found is None or not _within(version, ("0.16", "0.17")):
        return
    if not at_least(found, "2.9"):
        yield Problem(
            message=f"Megatron-Core {version} declares Transformer Engine 2.9 to 2.11, and the job finds "
            f"{found}.",
            key="versions.te",
            value=found,
            fix="Upgrade Transformer Engine to 2.9 or later.",
        )
