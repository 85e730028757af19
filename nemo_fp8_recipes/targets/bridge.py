"""A recipe as Megatron-Bridge wants it: fields of its `MixedPrecisionConfig`, and names in its registry.

Plain data: imports neither Bridge nor torch. `callbacks.bridge` makes the objects. Written against
megatron-bridge 0.3.1 and 0.6.2 (`training/mixed_precision.py`).
"""

from __future__ import annotations

from typing import Any

from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.recipes import Recipe, names
from nemo_fp8_recipes.recipes.presets import presets
from nemo_fp8_recipes.targets import megatron_core
from nemo_fp8_recipes.targets.versions import installed

__all__ = ["PREFIX", "TARGET", "VERSIONS", "fields", "missing", "registered_names"]

PREFIX = "nemo_fp8_"
"""`mixed_precision=nemo_fp8_<recipe>` on Bridge's command line."""

TARGET = "nemo_fp8_recipes.callbacks.bridge.Fp8MixedPrecision"
"""The class that the YAML for Bridge names as `_target_`."""

VERSIONS = (
    "megatron-bridge 0.6.2 with megatron-core 0.19.2, or megatron-bridge 0.3.1 with megatron-core 0.16.1"
)
"""The sets of releases that were tested together."""


def registered_names() -> dict[str, str]:
    """Name in Bridge's registry -> name of the recipe or preset."""
    return {f"{PREFIX}{name}": name for name in (*names(), *presets())}


def fields(recipe: Recipe) -> dict[str, Any]:
    """`MixedPrecisionConfig` fields that are the recipe's; dtypes by their names.

    Bridge copies each of them to every one of its configs that has a field of that name (model, optimizer,
    data-parallel wrapper). `fp8_param` and `fp8_param_gather` are one switch there, and MXFP8 weights are
    gathered through the gradient buffer, which Bridge asserts.
    """
    values = dict(megatron_core.fields(recipe))
    precision = "fp4" if recipe.precision == "fp4" else "fp8"
    kept_quantised = bool(values.pop(f"{precision}_param", False))
    values[f"{precision}_param"] = values[f"{precision}_param_gather"] = kept_quantised
    values["reuse_grad_buf_for_mxfp8_param_ag"] = recipe.name == "mxfp8" and kept_quantised
    return {
        "bf16": True,
        "params_dtype": "bfloat16",
        "pipeline_dtype": "bfloat16",
        "autocast_enabled": False,
        "grad_reduce_in_fp32": True,
        **values,
    }


def missing(error: ImportError) -> InjectionError:
    """The error for a process in which importing Megatron-Bridge failed with `error`."""
    found = installed("megatron-bridge")
    problem = (
        "Megatron-Bridge is not installed."
        if found is None
        else f"Megatron-Bridge {found} does not import: {error}."
    )
    return InjectionError(
        problem,
        key="framework",
        value="bridge",
        hint=f"Install {VERSIONS}; `make train-bridge` does so for a machine with no GPU. The rest of this "
        "package works without it: framework=megatron_core.",
    )
