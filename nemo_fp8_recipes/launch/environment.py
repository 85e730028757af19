"""The environment variables that a job's recipe and layout need, before Transformer Engine is imported.

Our own jobs hand every option to Transformer Engine's recipe object. A user's script may build that object
itself, and Transformer Engine reads the defaults of some options from the environment when it is imported:
there the variables below carry the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nemo_fp8_recipes.recipes import Recipe

__all__ = ["Setting", "Variable", "needed", "resolve"]

Origin = Literal["recipe", "launcher.environment", "environment"]

# Option -> variable, per recipe: transformer_engine/common/recipe/__init__.py reads them as class attributes.
_SWITCHES: dict[str, dict[str, str]] = {
    "tensorwise": {"use_power_2_scales": "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES"},
    "blockwise": {"use_f32_scales": "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"},
    "nvfp4": {
        "disable_rht": "NVTE_NVFP4_DISABLE_RHT",
        "disable_stochastic_rounding": "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING",
        "disable_2d_quantization": "NVTE_NVFP4_DISABLE_2D_QUANTIZATION",
        "row_scaled_activation": "NVTE_NVFP4_ROW_SCALED_ACTIVATION",
        "nvfp4_4over6": "NVTE_NVFP4_4OVER6",
        "nvfp4_4over6_e4m3_use_256": "NVTE_NVFP4_4OVER6_E4M3_USE_256",
        "nvfp4_4over6_err_mode": "NVTE_NVFP4_4OVER6_ERR_MODE",
    },
}
BLACKWELL = (10, 0)


@dataclass(frozen=True)
class Variable:
    """A variable that the job needs; `binding` ones win over what the user's shell has set."""

    name: str
    value: str
    reason: str
    binding: bool = True


@dataclass(frozen=True)
class Setting:
    """A variable as the job gets it, for its record: where the value is from, and what it replaces."""

    name: str
    value: str
    origin: Origin
    reason: str = ""
    replaced: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        return asdict(self)

    def note(self) -> str | None:
        """A sentence for the user where a value of theirs is not the one in effect."""
        if self.replaced is None:
            return None
        return f"{self.name}={self.value} replaces {self.replaced} ({self.reason or self.origin})."


def needed(
    recipe: Recipe,
    *,
    capability: tuple[int, int] | None,
    tensor_parallel: int,
    deterministic: bool,
    processes: int,
) -> Iterator[Variable]:
    """The variables for a job.

    Args:
        recipe: the recipe of the job.
        capability: compute capability of its GPUs; None: not known.
        tensor_parallel: `parallel.tp`.
        deterministic: `training.deterministic`.
        processes: processes on one node.
    """
    for option, name in _SWITCHES.get(recipe.name, {}).items():
        yield Variable(name, _spelled(getattr(recipe, option)), f"fp8_recipe.{option}")
    if tensor_parallel > 1 and (capability is None or capability < BLACKWELL):
        # megatron/core/tensor_parallel/layers.py: communication is to be queued before the GEMM it overlaps.
        yield Variable(
            "CUDA_DEVICE_MAX_CONNECTIONS", "1", "parallel.tp above 1: communication overlaps GEMMs", False
        )
    if deterministic:
        reason = "training.deterministic"
        yield Variable("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0", reason)
        yield Variable("NCCL_ALGO", "Ring", reason, False)  # the user may choose another fixed one
        yield Variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8", reason, False)
    if processes > 1:
        yield Variable("OMP_NUM_THREADS", "1", "several processes share the CPU cores", False)


def _spelled(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def resolve(
    variables: Iterator[Variable], explicit: Mapping[str, Any], inherited: Mapping[str, str]
) -> list[Setting]:
    """What each variable is set to: `launcher.environment` over the recipe over the shell, where binding."""
    settings: dict[str, Setting] = {}
    for variable in variables:
        before = inherited.get(variable.name)
        if before is not None and not variable.binding:
            settings[variable.name] = Setting(variable.name, before, "environment", variable.reason)
            continue
        replaced = before if before not in (None, variable.value) else None
        settings[variable.name] = Setting(variable.name, variable.value, "recipe", variable.reason, replaced)
    for name, raw in explicit.items():
        value = _spelled(raw)
        other = settings[name].value if name in settings else inherited.get(name)
        settings[name] = Setting(
            name, value, "launcher.environment", replaced=other if other not in (None, value) else None
        )
    return list(settings.values())
