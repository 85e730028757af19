"""Our names in Bridge's registry of mixed-precision recipes, our classes among those its YAML may name."""

from __future__ import annotations

import functools
from types import ModuleType

from megatron.bridge.training.mixed_precision import MIXED_PRECISION_RECIPES

from nemo_fp8_recipes.callbacks.bridge.mixed_precision import mixed_precision
from nemo_fp8_recipes.targets.bridge import registered_names

__all__ = ["register"]


def register(package: ModuleType) -> None:
    """Register every recipe and preset; again changes nothing.

    Args:
        package: the package whose classes Bridge's YAML may name in `_target_`.
    """
    for name, recipe in registered_names().items():
        MIXED_PRECISION_RECIPES[name] = functools.partial(mixed_precision, recipe)
    try:
        from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
    except ImportError:  # before Bridge 0.4 every class may be named
        return
    register_allowed_target_prefix(package.__name__)
