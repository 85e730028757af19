"""A recipe as `transformer_engine.common.recipe` object, with every option in effect.

TE's constructors take some options and drop them: modules overwrite the quantizers of Float8CurrentScaling
and Float8BlockScaling from `fp8_quant_fwd_inp`, `fp8_quant_fwd_weight` and `fp8_quant_bwd_grad`, which are
class attributes fixed when TE is imported. They are set on the instance here. Every option is passed
explicitly, so that an environment variable that TE reads as default (NVTE_BACKWARD_OVERRIDE, …) does not
decide.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.recipes.base import Recipe
from nemo_fp8_recipes.recipes.blockwise import Blockwise
from nemo_fp8_recipes.recipes.delayed import is_dotted_path
from nemo_fp8_recipes.recipes.options import MMParams, QParams
from nemo_fp8_recipes.recipes.tensorwise import Tensorwise
from nemo_fp8_recipes.targets import versions

__all__ = [
    "CANNOT_BE_IMPORTED",
    "PACKAGE",
    "build",
    "can_preview",
    "first_line",
    "installed_version",
    "newer_options",
    "preview",
]

PACKAGE = "transformer-engine"
CANNOT_BE_IMPORTED = (ImportError, OSError, RuntimeError, AssertionError)
"""What importing Transformer Engine, or what imports it, raises where its CUDA part is missing."""

_MODULE = "transformer_engine.common.recipe"
_PREVIEW_MODULE = "_nemo_fp8_recipes_transformer_engine_recipe"
_QPARAMS = {
    "input": "fp8_quant_fwd_inp",
    "weight": "fp8_quant_fwd_weight",
    "grad_output": "fp8_quant_bwd_grad",
}


def installed_version() -> str | None:
    """Version of the installed Transformer Engine, None where there is none."""
    return versions.installed(PACKAGE)


def newer_options(recipe: Recipe, version: str) -> list[tuple[str, str]]:
    """Options that differ from their default and that TE `version` does not know: (name, since).

    The class itself counts as option "name".
    """
    if recipe.since is not None and not versions.at_least(version, recipe.since):
        return [("name", recipe.since)]
    return [
        (field.name, since)
        for field in dataclasses.fields(recipe)
        if (since := field.metadata["since"]) is not None
        and not versions.at_least(version, since)
        and getattr(recipe, field.name) != field.default
    ]


def build(recipe: Recipe) -> Any:
    """The object to hand to TE in this process, of TE's own classes; None for bf16.

    Raises:
        RecipeError: when TE cannot be imported, or is older than an option that is set.
    """
    if recipe.te_class is None:
        return None
    return _build(recipe, _imported())


def can_preview() -> bool:
    """Whether Transformer Engine's files are here, so that `preview` can load its recipe classes."""
    return _MODULE in sys.modules or importlib.util.find_spec("transformer_engine") is not None


def preview(recipe: Recipe) -> Any:
    """The same object for showing only: TE's recipe classes are loaded from their file, without torch.

    Not for handing to TE: unless TE is imported already, the classes are not the ones TE compares with.
    """
    if recipe.te_class is None:
        return None
    return _build(recipe, sys.modules.get(_MODULE) or _from_file())


def _imported() -> ModuleType:
    try:
        return importlib.import_module(_MODULE)
    except CANNOT_BE_IMPORTED as error:
        raise RecipeError(
            f"Transformer Engine cannot be imported: {first_line(error)}.",
            hint="On a machine with no GPU, install the emulated device first: "
            "nemo_fp8_recipes.emulation.install().",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error: TE's own messages run over many."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@functools.cache
def _from_file() -> ModuleType:
    """TE's recipe module loaded by path: it imports nothing else of TE."""
    package = importlib.util.find_spec("transformer_engine")
    locations = package.submodule_search_locations if package is not None else None
    if not locations:
        raise RecipeError(
            "Transformer Engine is not installed, so its recipe object cannot be shown.",
            hint="pip install transformer-engine, or work in a container that has it.",
        )
    path = Path(next(iter(locations))) / "common" / "recipe" / "__init__.py"
    spec = importlib.util.spec_from_file_location(_PREVIEW_MODULE, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise RecipeError(f"Transformer Engine's recipes are not where they are expected, in {path}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PREVIEW_MODULE] = module  # its dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def _build(recipe: Recipe, te: ModuleType) -> Any:
    version = installed_version()
    if version is not None:
        for name, since in newer_options(recipe, version):
            key = "fp8_recipe" if name == "name" else f"fp8_recipe.{name}"
            value = recipe.name if name == "name" else getattr(recipe, name)
            raise RecipeError(
                f"{key}={value} needs Transformer Engine {since}, and {version} is installed.",
                key=key,
                value=value,
                hint=f"Upgrade Transformer Engine to {since} or later.",
            )
    assert recipe.te_class is not None
    te_class = getattr(te, recipe.te_class)
    known = {field.name for field in dataclasses.fields(te_class)}
    arguments = {
        field.name: _as_te(getattr(recipe, field.name), field.name, te)
        for field in dataclasses.fields(recipe)
        if field.metadata["te"] and field.name in known
    }
    built = te_class(**arguments)
    if isinstance(recipe, Tensorwise | Blockwise):
        for operand, params in recipe.quantization().items():
            setattr(built, _QPARAMS[operand], _qparams(params, te))
    return built


def _as_te(value: Any, name: str, te: ModuleType) -> Any:
    """One option's value in TE's own types: Format members, MMParams, functions."""
    if name in ("fp8_format", "fp4_format"):
        return te.Format[str(value).upper()]
    if isinstance(value, MMParams):
        return te.MMParams(use_split_accumulator=value.use_split_accumulator)
    if name in ("amax_compute_algo", "scaling_factor_compute_algo") and value and is_dotted_path(value):
        return _function(value, f"fp8_recipe.{name}")
    return value


def _qparams(params: QParams, te: ModuleType) -> Any:
    return te.QParams(power_2_scale=params.power_2_scale, amax_epsilon=params.amax_epsilon)


def _function(path: str, key: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module_name))
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"{key}={path} cannot be imported: {error}.", key=key, value=path) from error
    if not callable(found):
        raise RecipeError(f"{key}={path} is not a function.", key=key, value=path)
    return found
