"""A recipe as Megatron-LM's command line and environment."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_fp8_recipes import typed
from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.targets import te_environment
from nemo_fp8_recipes.targets.megatron_lm import variable
from nemo_fp8_recipes.targets.megatron_lm.options import FLAGS, carrier, changed

__all__ = ["FACTORY_MODULE", "Route", "Settings", "settings"]

Route = Literal["flags", "factory", "injection"]
"""How the recipe object comes about: Megatron builds it; TE's CustomRecipe with our factory; injected."""

FACTORY_MODULE = "nemo_fp8_recipes.targets.megatron_lm"
ARRAY = "NEMO_FP8_ARGS"


@dataclass(frozen=True)
class Settings:
    """What to give to Megatron-LM.

    Attributes:
        route: how the recipe object comes about there.
        flags: words for its command line.
        environment: variables of every process; None: must not be set.
        notes: what the user should know.
    """

    route: Route
    flags: tuple[str, ...]
    environment: Mapping[str, str | None]
    notes: tuple[str, ...] = field(default=())

    def shell(self) -> str:
        """Bash text: exports the environment and sets the array NEMO_FP8_ARGS."""
        lines = [f"# {' '.join(note.split())}" for note in self.notes]
        for name, value in self.environment.items():
            lines.append(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")
        lines.append(f"{ARRAY}=({shlex.join(self.flags)})")
        return "\n".join(lines)


def settings(recipe: Recipe, *, route: Route | None = None, experts: bool = False) -> Settings:
    """Flags and environment that make `pretrain_gpt.py` train with `recipe`.

    Args:
        recipe: the recipe.
        route: None: flags where they carry every option that is set, otherwise the factory. "injection" is
            for a training script with the hook's two lines.
        experts: whether the model has experts, which Megatron pads for the recipe's kind.

    Raises:
        RecipeError: an option that this route cannot carry, by name.
    """
    used = route or _sufficient(recipe)
    _refuse_what_is_lost(recipe, used)
    if used == "factory":
        _refuse_in_factory(recipe, experts)
    environment: dict[str, str | None] = {variable.RECIPE_VARIABLE: variable.write(recipe)}
    environment.update(te_environment.environment(recipe))
    return Settings(
        used, tuple(_flags(recipe, factory=used == "factory")), environment, tuple(_notes(recipe, used))
    )


def _sufficient(recipe: Recipe) -> Route:
    return "factory" if "factory" in {carrier(recipe, option) for option in changed(recipe)} else "flags"


def _refuse_what_is_lost(recipe: Recipe, route: Route) -> None:
    for option in changed(recipe):
        by = carrier(recipe, option)
        if by == "nothing":
            raise _refusal(
                recipe,
                option,
                "has no flag in Megatron-LM, which acts on its own configuration",
                hint=f"Set {option} on the TransformerConfig in your copy of the training script.",
            )
        if by == "injection" and route != "injection":
            raise _refusal(
                recipe,
                option,
                "reaches Transformer Engine through injection only: Megatron-LM has no flag for it and a "
                "quantizer factory cannot carry it",
                hint="Put the hook's two lines into the training script (docs/megatron_lm.md) and give "
                "--hook.",
            )
        if by == "factory" and route == "flags":
            raise _refusal(
                recipe, option, "has no flag in Megatron-LM", hint="Give --factory, or --hook with the hook."
            )


def _refuse_in_factory(recipe: Recipe, experts: bool) -> None:
    if recipe.precision == "bf16":
        raise RecipeError(
            "fp8_recipe=bf16 quantises nothing, so there is no quantizer for a factory to make.",
            key="fp8_recipe",
            value="bf16",
            hint="Leave --factory out.",
        )
    if recipe.name == "delayed":
        raise RecipeError(
            "fp8_recipe=delayed cannot come from a quantizer factory: Megatron enters such a recipe once for "
            "every layer, and TE would update all amax histories each time one is left.",
            key="fp8_recipe",
            value="delayed",
            hint="Leave --factory out: --fp8-margin, --fp8-amax-history-len and --fp8-amax-compute-algo "
            "carry its options; the others need the hook and --hook.",
        )
    if getattr(recipe, "fp8_param", False):
        raise _refusal(
            recipe,
            "fp8_param",
            "cannot go with a quantizer factory: Megatron's optimizer treats quantised weights by the kind "
            "of recipe, and a factory's kind is `custom`",
            hint="Keep the weights in BF16, or give --hook with the hook's two lines in the training script.",
        )
    if recipe.name == "mxfp8" and experts:
        raise RecipeError(
            "fp8_recipe=mxfp8 cannot come from a quantizer factory in a model with experts: Megatron pads an "
            "expert's tokens to 32 for mxfp8 and to 16 for the kind `custom` (get_fp8_align_size).",
            key="fp8_recipe",
            value="mxfp8",
            hint="Give --hook with the hook's two lines in the training script.",
        )


def _refusal(recipe: Recipe, option: str, reason: str, *, hint: str) -> RecipeError:
    value = getattr(recipe, option)
    return RecipeError(
        f"fp8_recipe.{option}={typed.spelled(value)} {reason}.",
        key=f"fp8_recipe.{option}",
        value=value,
        hint=hint,
    )


def _flags(recipe: Recipe, *, factory: bool) -> list[str]:
    words = ["--bf16", "--transformer-impl", "transformer_engine"]
    fields = recipe.megatron()
    precision = recipe.precision
    if precision == "bf16":
        return words
    placed = bool(fields["first_last_layers_bf16"])
    for name, flag in FLAGS.items():
        value: Any = fields.get(name)
        if value is None or value is False or (name.startswith("num_layers_at") and not placed):
            continue
        if name in ("fp8_recipe", "fp4_recipe") and factory:
            words += [flag, "custom", f"--{precision}-quantizer-factory", f"{FACTORY_MODULE}.{recipe.name}"]
        elif name == "fp8_amax_compute_algo" and carrier(recipe, "amax_compute_algo") == "injection":
            continue
        else:
            words += [flag] if value is True else [flag, str(value)]
    if recipe.name == "mxfp8" and getattr(recipe, "fp8_param", False):
        # Without it Megatron never updates MXFP8 weights, and nothing complains.
        words.append("--reuse-grad-buf-for-mxfp8-param-ag")
    return words


def _notes(recipe: Recipe, route: Route) -> list[str]:
    notes = {
        "flags": [
            f"{recipe.name}: Megatron-LM's own flags and TE's environment variables carry every option."
        ],
        "factory": [
            f"{recipe.name} through TE's CustomRecipe: a quantizer factory carries what Megatron-LM has no "
            f"flag for. Every process needs {variable.RECIPE_VARIABLE}."
        ],
        "injection": [
            f"{recipe.name}: the hook in the training script injects the recipe object. Without its two "
            f"lines Megatron-LM would train with its own defaults."
        ],
    }[route]
    if getattr(recipe, "fp8_param", False):
        notes.append(
            f"Primary weights in {recipe.precision.upper()} need --use-distributed-optimizer in your command."
        )
    return notes
