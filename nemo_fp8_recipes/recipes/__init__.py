"""Recipes as plain data: named, typed and checked. Imports neither torch nor Transformer Engine."""

from nemo_fp8_recipes.recipes.base import SCHEMA_VERSION, QuantizedRecipe, Recipe
from nemo_fp8_recipes.recipes.bf16 import Bf16
from nemo_fp8_recipes.recipes.blockwise import Blockwise
from nemo_fp8_recipes.recipes.delayed import Delayed
from nemo_fp8_recipes.recipes.mxfp8 import Mxfp8
from nemo_fp8_recipes.recipes.nvfp4 import Nvfp4
from nemo_fp8_recipes.recipes.options import OPERANDS, MMParams, OperandPlan, QParams, TensorName
from nemo_fp8_recipes.recipes.presets import Preset, presets
from nemo_fp8_recipes.recipes.registry import RECIPES, Resolution, load, names, resolve
from nemo_fp8_recipes.recipes.tensorwise import Tensorwise

__all__ = [
    "OPERANDS",
    "RECIPES",
    "SCHEMA_VERSION",
    "Bf16",
    "Blockwise",
    "Delayed",
    "MMParams",
    "Mxfp8",
    "Nvfp4",
    "OperandPlan",
    "Preset",
    "QParams",
    "QuantizedRecipe",
    "Recipe",
    "Resolution",
    "TensorName",
    "Tensorwise",
    "load",
    "names",
    "presets",
    "resolve",
]
