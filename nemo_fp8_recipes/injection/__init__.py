"""The recipe put where Megatron asks for it, and the manifest read back from the built model."""

from __future__ import annotations

from nemo_fp8_recipes.injection.across_ranks import gather, merge
from nemo_fp8_recipes.injection.config_check import check_config, check_kind
from nemo_fp8_recipes.injection.context import Injection, inject
from nemo_fp8_recipes.injection.model_check import check_model
from nemo_fp8_recipes.injection.module_recipes import assign_module_recipes, megatrons_module_recipes
from nemo_fp8_recipes.injection.plain_te import autocast
from nemo_fp8_recipes.injection.read_back import manifest
from nemo_fp8_recipes.injection.rows import Difference, Manifest, ManifestRow, OperandRow
from nemo_fp8_recipes.injection.state import frozen_delayed_modules, reset_quantization_state
from nemo_fp8_recipes.injection.switch import check_switchable, set_fields, switch
from nemo_fp8_recipes.injection.verify import Complaint, complaints, require_quantized

__all__ = [
    "Complaint",
    "Difference",
    "Injection",
    "Manifest",
    "ManifestRow",
    "OperandRow",
    "assign_module_recipes",
    "autocast",
    "check_config",
    "check_kind",
    "check_model",
    "check_switchable",
    "complaints",
    "frozen_delayed_modules",
    "gather",
    "inject",
    "manifest",
    "megatrons_module_recipes",
    "merge",
    "require_quantized",
    "reset_quantization_state",
    "set_fields",
    "switch",
]
