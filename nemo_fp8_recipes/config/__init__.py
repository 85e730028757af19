"""Hydra composition of a job's configuration, with typed values and errors that name the key.

`compose(["fp8_recipe=delayed", "fp8_recipe.amax_history_len=16"])` is what every command starts from.
"""

from nemo_fp8_recipes.config.compose import compose
from nemo_fp8_recipes.config.hardware import load_hardware
from nemo_fp8_recipes.config.overrides import alias_notes
from nemo_fp8_recipes.config.paths import conf_dir, groups, options
from nemo_fp8_recipes.config.schema import HardwareConfig, ParallelConfig, RootConfig, validate

__all__ = [
    "HardwareConfig",
    "ParallelConfig",
    "RootConfig",
    "alias_notes",
    "compose",
    "conf_dir",
    "groups",
    "load_hardware",
    "options",
    "validate",
]
