"""Comparing a manifest with the recipe that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection.rows import Manifest, ManifestRow, OperandRow
from nemo_fp8_recipes.recipes.blockwise import Blockwise
from nemo_fp8_recipes.recipes.delayed import Delayed
from nemo_fp8_recipes.recipes.modules import ModuleRecipe, recipe_of_module
from nemo_fp8_recipes.recipes.nvfp4 import Nvfp4
from nemo_fp8_recipes.recipes.tensorwise import Tensorwise

if TYPE_CHECKING:
    from nemo_fp8_recipes.recipes import Recipe
    from nemo_fp8_recipes.recipes.options import TensorName

__all__ = ["Complaint", "complaints", "require_quantized"]

_SHOWN = 5

_EXPECTED_IN_HIGH_PRECISION = {"output_layer", "router", "attention", "per_module_override"}
"""Reasons that agree with every recipe; "bf16_layer" agrees with a recipe that asks for such layers."""


@dataclass(frozen=True)
class Complaint:
    """One way in which one module does not do what the recipe says: "`module` `text`" is a sentence."""

    module: str
    text: str

    def __str__(self) -> str:
        return f"{self.module} {self.text}"


def complaints(
    manifest: Manifest, recipe: Recipe, modules: Sequence[ModuleRecipe] = ()
) -> tuple[Complaint, ...]:
    """Every way in which the model does not do what the recipe says, in the order of the model.

    Args:
        manifest: what was found.
        recipe: what was asked for.
        modules: what was asked for of single modules instead.
    """
    return tuple(
        Complaint(row.module, text)
        for row in manifest.rows
        for text in _row_complaints(row, recipe, recipe_of_module(row.module, recipe, modules))
    )


def require_quantized(
    manifest: Manifest,
    recipe: Recipe,
    *,
    modules: Sequence[ModuleRecipe] = (),
    megatrons: Mapping[str, str] | None = None,
) -> None:
    """Refuse a model that does not do what the recipe says.

    Args:
        manifest: what was found.
        recipe: what was asked for.
        modules: what was asked for of single modules instead.
        megatrons: module -> recipe that Megatron's own precision config gives it, by canonical name or
            "custom": being quantised by that one is no complaint.

    Raises:
        InjectionError: a quantised recipe was asked for and no module is quantised, a row disagrees with the
            recipe, or a module is in high precision for a reason the recipe does not give. For "bf16": a
            module is quantised. Or an entry of `modules` names no linear layer of Transformer Engine.
    """
    for entry in modules:
        if not any(entry.matches(row.module) and _takes_recipes(row) for row in manifest.rows):
            raise InjectionError(
                f"{entry.key} {entry} names no linear layer of Transformer Engine in this model.",
                key=entry.key,
                value=str(entry),
                hint="The manifest has the modules' paths, such as "
                + next((row.module for row in manifest.rows if _takes_recipes(row)), "decoder.layers.0.mlp")
                + ".",
            )
    if recipe.precision != "bf16" and not manifest.quantized():
        raise InjectionError(
            f"fp8_recipe={recipe.name} was asked for and no module is quantised: {_census(manifest)}.",
            key="fp8_recipe",
            value=recipe.name,
            hint=_advice(manifest),
        )
    found = complaints(manifest, recipe, modules)
    if megatrons:
        agree = {
            row.module for row in manifest.quantized() if megatrons.get(row.module) in (row.recipe, "custom")
        }
        found = tuple(complaint for complaint in found if complaint.module not in agree)
    if found:
        raise InjectionError(
            f"The model does not do what fp8_recipe={recipe.name} says: {_summary(found)}.",
            key="fp8_recipe",
            value=recipe.name,
            hint="Print the manifest to see every module.",
        )


def _takes_recipes(row: ManifestRow) -> bool:
    return row.reason_code not in ("output_layer", "router", "attention", "not_transformer_engine")


def _row_complaints(row: ManifestRow, main: Recipe, recipe: Recipe) -> list[str]:
    """What is wrong with a module that was to train with `recipe`, in a model that trains with `main`."""
    if recipe.precision == "bf16":
        return [f"is quantised by {row.recipe}"] if row.quantized else []
    if not row.quantized:
        switched_off = recipe is not main and row.reason_code == "per_module_override"
        return [] if _may_stay(row, main) and not switched_off else [f"is in high precision: {row.reason}"]
    if row.input is None:
        # Attention: its tensors are not the operands of a linear layer, and fp8_dpa may add a second recipe.
        return []
    if row.recipe != recipe.name:
        return [f"is quantised by {row.recipe}"]
    return [
        f"{tensor} {difference}"
        for tensor, operand in row.operands()
        for difference in _differences(operand, tensor, recipe)
    ]


def _may_stay(row: ManifestRow, recipe: Recipe) -> bool:
    if row.reason_code == "bf16_layer":
        return bool(getattr(recipe, "layers_in_bf16", 0))
    return row.reason_code in _EXPECTED_IN_HIGH_PRECISION


def _differences(operand: OperandRow, tensor: TensorName, recipe: Recipe) -> list[str]:
    """Each property of an operand that is not as planned, as "has format=e5m2, the recipe says e4m3"."""
    plan = recipe.operands().get(tensor)
    if plan is None:
        return ["is quantised, the recipe leaves it in high precision"] if operand.quantized else []
    checks: list[tuple[str, object, object]] = [
        ("format", operand.format, plan.format),
        ("scaling", operand.scaling, plan.scaling),
        ("block", operand.block, plan.block),
        ("scale_dtype", operand.scale_dtype, plan.scale_dtype),
        ("power_of_two", operand.power_of_two, plan.power_of_two),
    ]
    if isinstance(recipe, Tensorwise | Blockwise):
        epsilon = recipe.quantization()[tensor].amax_epsilon
        checks.append(("amax_epsilon", operand.amax_epsilon, epsilon))
    if isinstance(recipe, Delayed):
        checks.append(("amax_history_len", operand.amax_history_len, recipe.amax_history_len))
    if isinstance(recipe, Nvfp4):
        checks += [
            (
                "random_hadamard_transform",
                operand.random_hadamard_transform,
                tensor != "weight" and not recipe.disable_rht,
            ),
            (
                "stochastic_rounding",
                operand.stochastic_rounding,
                tensor == "grad_output" and not recipe.disable_stochastic_rounding,
            ),
        ]
    return [f"has {name}={found}, the recipe says {asked}" for name, found, asked in checks if found != asked]


def _summary(found: Sequence[Complaint]) -> str:
    """Equal complaints once, with the first module they concern: "X input has ... (and 11 more modules)"."""
    modules: dict[str, list[str]] = {}
    for complaint in found:
        modules.setdefault(complaint.text, []).append(complaint.module)
    lines = [
        f"{where[0]} {text}" + (f" (and {len(where) - 1} more)" if len(where) > 1 else "")
        for text, where in modules.items()
    ]
    more = f"; and {len(lines) - _SHOWN} other complaints" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def _census(manifest: Manifest) -> str:
    """How many modules stayed in high precision for which reason."""
    if not manifest.rows:
        return "the model has no linear layer"
    reasons = Counter(row.reason for row in manifest.rows)
    return ", ".join(
        f"{count} {'module' if count == 1 else 'modules'}: {reason}" for reason, count in reasons.items()
    )


def _advice(manifest: Manifest) -> str:
    codes = {row.reason_code for row in manifest.rows}
    if "outside_context" in codes:
        return (
            "The model has Transformer Engine layers, so Megatron's FP8 context was never entered: "
            "set the config fields that recipe.megatron() gives, and run the model inside inject(recipe)."
        )
    if "no_fp8_forward" in codes:
        return "Run a training step first, inside autocast(recipe): operations keep quantizers since then."
    if "no_forward" in codes:
        return "Run a training step first: quantizers exist only after a forward pass."
    return (
        "The model was built without Transformer Engine layers: build it with "
        "get_gpt_layer_with_transformer_engine_spec(), not with the local spec."
    )
