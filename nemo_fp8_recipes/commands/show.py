"""`nemo-fp8 show`: what a recipe composes to, without torch."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.syntax import Syntax
from rich.table import Table

from nemo_fp8_recipes import config, recipes
from nemo_fp8_recipes.commands.arguments import take_flags
from nemo_fp8_recipes.recipes import OPERANDS, QuantizedRecipe, Recipe
from nemo_fp8_recipes.targets import megatron_core, transformer_engine
from nemo_fp8_recipes.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HELP", "run"]

HELP = """
usage: nemo-fp8 show [fp8_recipe=NAME] [fp8_recipe.<option>=value] ... [--json | --bridge-yaml]

Print what a recipe composes to: its options, the Transformer Engine object with every option in effect, the
fields of Megatron-Core's TransformerConfig, and what happens to each operand. It is a plan: what the layers
of a run really do is in its manifest. Needs no GPU and does not import torch.

  --json          one JSON object: {"recipe", "te", "megatron", "operands"}; te.options is null without TE
  --bridge-yaml   YAML for Megatron-Bridge's config_filepath: the recipe, and the groups that are named
                  (model, parallel, training, optimizer); see docs/bridge.md

examples:
  nemo-fp8 show fp8_recipe=mxfp8
  nemo-fp8 show fp8_recipe=nemotron_h
  nemo-fp8 show fp8_recipe=blockwise fp8_recipe.w_block_scaling_dim=1 fp8_recipe.use_f32_scales=true
  nemo-fp8 show fp8_recipe=mxfp8 parallel.tp=2 --bridge-yaml > fp8.yaml
"""

_FP8_QPARAMS = ("power_2_scale", "amax_epsilon")
_FP4_QPARAMS = ("random_hadamard_transform", "stochastic_rounding", "fp4_2d_quantization")


def run(arguments: list[str]) -> int:
    """Show the recipe that `arguments` name."""
    flags, overrides = take_flags(arguments, {"--json", "--bridge-yaml"})
    composed = config.compose(overrides)
    recipe = recipes.load(composed.fp8_recipe)
    if "--bridge-yaml" in flags:
        print(_bridge_yaml(composed, overrides), end="")
        return 0
    if "--json" in flags:
        print(json.dumps(_as_json(recipe), indent=2))
        return 0
    console = Terminal()
    for note in config.alias_notes(overrides):
        console.print(note, soft_wrap=True, markup=False)
    _heading(console, "Recipe")
    yaml = OmegaConf.to_yaml(OmegaConf.create({"fp8_recipe": dict(composed.fp8_recipe)}))
    console.print(Syntax(yaml.rstrip(), "yaml", background_color="default"))
    _show_te(console, recipe)
    _heading(console, "Megatron-Core: TransformerConfig")
    console.print(_fields(recipe.megatron()))
    hidden = megatron_core.hidden_options(recipe)
    if hidden:
        console.print(
            f"Megatron has no field for {', '.join(hidden)}: injection carries "
            f"{'it' if len(hidden) == 1 else 'them'}.",
            soft_wrap=True,
        )
    _heading(console, "Operands of a linear layer")
    console.print(_operands(recipe))
    return 0


def _bridge_yaml(composed: DictConfig, overrides: list[str]) -> str:
    from nemo_fp8_recipes.targets import bridge_yaml
    from nemo_fp8_recipes.training.settings import read_settings

    named = {override.lstrip("+~").split("=", 1)[0].split(".", 1)[0] for override in overrides}
    document = bridge_yaml.document(read_settings(composed), named & set(bridge_yaml.GROUPS))
    return OmegaConf.to_yaml(OmegaConf.create(document))


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return {
        "schema_version": recipes.SCHEMA_VERSION,
        "recipe": recipe.to_dict(),
        "te": {
            "class": recipe.te_class,
            "version": transformer_engine.installed_version(),
            "options": _te(recipe) if transformer_engine.can_preview() else None,
        },
        "megatron": recipe.megatron(),
        "operands": {name: dataclasses.asdict(plan) for name, plan in recipe.operands().items()},
    }


def _te(recipe: Recipe) -> dict[str, Any]:
    """Every attribute of the TE object that decides something, in plain values."""
    built = transformer_engine.preview(recipe)
    if built is None:
        return {}
    names = [field.name for field in dataclasses.fields(built)]
    names += [
        name for name in (*vars(type(built)), *vars(built)) if name.startswith(("fp8_quant_", "fp4_quant_"))
    ]
    return {name: _relevant(name, _plain(getattr(built, name))) for name in dict.fromkeys(names)}


def _relevant(name: str, value: Any) -> Any:
    """TE's QParams serve FP8 and FP4: the fields that the quantizers of this precision read."""
    read = {"fp8_quant_": _FP8_QPARAMS, "fp4_quant_": _FP4_QPARAMS}.get(name[:10])
    return {key: value[key] for key in read if key in value} if read else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(value):
        return f"{value.__module__}:{value.__qualname__}"
    return getattr(value, "name", value)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold")


def _show_te(console: Console, recipe: Recipe) -> None:
    version = transformer_engine.installed_version()
    if recipe.te_class is None:
        _heading(console, "Transformer Engine: no recipe, autocast is off")
        return
    if not transformer_engine.can_preview():
        _heading(console, f"Transformer Engine: {recipe.te_class}")
        console.print(
            "Not installed here, so the values it would take cannot be shown: pip install "
            "transformer-engine, or work in a container that has it.",
            soft_wrap=True,
        )
        return
    _heading(console, f"Transformer Engine {version or ''}: {recipe.te_class}".replace("  ", " "))
    console.print(_fields(_te(recipe)))


def _fields(values: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={item}" for key, item in value.items())
        table.add_row(name, str(value))
    return table


def _operands(recipe: Recipe) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 2))
    for heading in ("operand", "format", "scaling", "block", "scale", "power of 2"):
        table.add_column(heading, no_wrap=True)
    plans = recipe.operands()
    for name in OPERANDS:
        plan = plans.get(name)
        if plan is None:
            table.add_row(name, "bf16", "none", "", "", "")
            continue
        block = "x".join(str(size) for size in plan.block) if plan.block else "whole tensor"
        table.add_row(
            name, plan.format, plan.scaling, block, plan.scale_dtype, "yes" if plan.power_of_two else "no"
        )
    if isinstance(recipe, QuantizedRecipe) and recipe.layers_in_bf16:
        ends = (("first", recipe.num_layers_at_start_in_bf16), ("last", recipe.num_layers_at_end_in_bf16))
        table.caption = " and ".join(f"the {end} {count}" for end, count in ends if count) + (
            " transformer layers stay in BF16"
        )
    return table
