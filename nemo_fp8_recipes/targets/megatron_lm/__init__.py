"""A recipe for Megatron-LM's `pretrain_gpt.py`: flags, environment, precision config, and quantizer
factories.

The factories are what `--fp8-quantizer-factory nemo_fp8_recipes.targets.megatron_lm.<recipe>` names, with
`--fp8-recipe custom`. `nemo-fp8 args` writes both, and the environment variable that tells a factory the
options.
"""

from nemo_fp8_recipes.targets.megatron_lm.factories import blockwise, delayed, mxfp8, nvfp4, tensorwise
from nemo_fp8_recipes.targets.megatron_lm.precision_config import precision_config
from nemo_fp8_recipes.targets.megatron_lm.settings import FACTORY_MODULE, Route, Settings, settings
from nemo_fp8_recipes.targets.megatron_lm.variable import RECIPE_VARIABLE, read, write

__all__ = [
    "FACTORY_MODULE",
    "RECIPE_VARIABLE",
    "Route",
    "Settings",
    "blockwise",
    "delayed",
    "mxfp8",
    "nvfp4",
    "precision_config",
    "read",
    "settings",
    "tensorwise",
    "write",
]
