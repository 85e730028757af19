"""`nemo-fp8 args`: flags and environment for Megatron-LM, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_fp8_recipes import config, recipes
from nemo_fp8_recipes.commands.arguments import take_flags, take_options
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.recipes.modules import ModuleRecipe
from nemo_fp8_recipes.targets.megatron_lm import Route, Settings, precision_config, settings
from nemo_fp8_recipes.training.files import atomic_write_text

__all__ = ["HELP", "run"]

SCHEMA_VERSION = 1

HELP = """
usage: nemo-fp8 args [fp8_recipe=NAME] [fp8_recipe.<option>=value] [model=NAME] [options]

Print what makes Megatron-LM's pretrain_gpt.py train with the recipe, as bash text: the environment variables
as exports, and its flags as the array NEMO_FP8_ARGS. Options that have no flag go through Transformer
Engine's variables or a quantizer factory; one that none of them carries is an error. Needs no GPU, imports no
torch.

  --module GLOB=RECIPE     other precision for modules whose path matches, such as '*linear_fc2=bf16'; may be
                           repeated, the first match counts; needs --precision-config
  --precision-config FILE  where to write the file that --te-precision-config-file is given
  --hook                   the training script has the hook's two lines (docs/megatron_lm.md): every option
                           is injected
  --factory                use the quantizer factory even where flags would do
  --json                   one JSON object: {"route", "flags", "environment", "precision_config", "notes"};
                           a variable that is null must not be set

examples:
  nemo-fp8 args fp8_recipe=mxfp8
  nemo-fp8 args fp8_recipe=blockwise fp8_recipe.w_block_scaling_dim=1
  nemo-fp8 args fp8_recipe=nemotron_h --module '*layers.3.*=bf16' --precision-config precision.yaml

in a job script (bash):
  settings=$(nemo-fp8 args fp8_recipe=mxfp8) || exit 1
  eval "$settings"
  torchrun --nproc-per-node 8 pretrain_gpt.py "${NEMO_FP8_ARGS[@]}" ...
"""


def run(arguments: list[str]) -> int:
    """Print the settings of the recipe that `arguments` name."""
    options, rest = take_options(arguments, {"--module", "--precision-config"})
    flags, overrides = take_flags(rest, {"--json", "--hook", "--factory"})
    composed = config.compose(overrides)
    recipe = recipes.load(composed.fp8_recipe)
    if composed.recipe_schedule:
        raise ConfigError(
            "recipe_schedule cannot be handed to Megatron-LM: it trains with one recipe from the first step "
            "to the last.",
            key="recipe_schedule",
            value=list(composed.recipe_schedule),
            hint="nemo-fp8 train takes a schedule; with Megatron-LM, resume with the flags of the other "
            "recipe.",
        )
    if composed.recipe_modules:
        raise ConfigError(
            "recipe_modules cannot be handed to Megatron-LM as it is: it reads them from a file.",
            key="recipe_modules",
            value=list(composed.recipe_modules),
            hint="Give each as --module 'GLOB=RECIPE', and the file as --precision-config FILE.",
        )
    made = settings(recipe, route=_route(flags), experts=_has_experts(composed))
    modules = [ModuleRecipe.parse(text) for text in options.get("--module", ())]
    content = precision_config(recipe, modules)
    path = _precision_config_path(options, modules)
    words = list(made.flags)
    if path is not None:
        _write(path, content)
        words += ["--te-precision-config-file", str(path)]
    notes = (*config.alias_notes(overrides), *made.notes)
    made = Settings(made.route, tuple(words), made.environment, notes)
    if "--json" in flags:
        print(json.dumps(_as_json(recipe, made, path), indent=2))
    else:
        print(made.shell())
    return 0


def _route(flags: set[str]) -> Route | None:
    if {"--hook", "--factory"} <= flags:
        raise ConfigError("Give --hook or --factory, not both.", key="--hook")
    if "--hook" in flags:
        return "injection"
    return "factory" if "--factory" in flags else None


def _has_experts(composed: DictConfig) -> bool:
    hybrid = composed.model.hybrid
    return hybrid is not None and bool(hybrid.num_experts)


def _precision_config_path(options: dict[str, list[str]], modules: list[ModuleRecipe]) -> Path | None:
    given = options.get("--precision-config", [])
    if len(given) > 1:
        raise ConfigError("--precision-config is given twice.", key="--precision-config", value=given)
    if bool(given) != bool(modules):
        missing, present = (
            ("--precision-config", "--module") if modules else ("--module", "--precision-config")
        )
        raise ConfigError(
            f"{present} needs {missing}.",
            key=present,
            hint="Example: --module '*linear_fc2=bf16' --precision-config precision.yaml",
        )
    return Path(given[0]).resolve() if given else None


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write the precision config; a file with other content is left alone."""
    text = "# Written by `nemo-fp8 args` for --te-precision-config-file.\n" + OmegaConf.to_yaml(
        OmegaConf.create(content)
    )
    if path.exists():
        if path.is_file() and path.read_bytes() == text.encode():
            return
        raise ConfigError(
            f"--precision-config {path} exists and holds something else.",
            key="--precision-config",
            value=str(path),
            hint="Remove it, or name another file.",
        )
    if not path.parent.is_dir():
        raise ConfigError(
            f"--precision-config {path}: there is no directory {path.parent}.",
            key="--precision-config",
            value=str(path),
        )
    atomic_write_text(path, text)


def _as_json(recipe: Recipe, made: Settings, path: Path | None) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.to_dict(),
        "route": made.route,
        "flags": list(made.flags),
        "environment": dict(made.environment),
        "precision_config": str(path) if path is not None else None,
        "notes": list(made.notes),
    }
