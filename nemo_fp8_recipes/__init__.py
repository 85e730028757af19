"""FP8 recipes for NeMo and Megatron: named, checked, injected, proven and logged.

Importing this package loads neither torch nor Transformer Engine; the names below are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nemo_fp8_recipes import emulation, telemetry
    from nemo_fp8_recipes.injection import autocast, inject, manifest
    from nemo_fp8_recipes.recipes import Recipe, load
    from nemo_fp8_recipes.startup import start

_HOME = {
    "Recipe": "recipes",
    "load": "recipes",
    "inject": "injection",
    "autocast": "injection",
    "manifest": "injection",
    "start": "startup",
    "emulation": None,
    "telemetry": None,
}

__all__ = [
    "Recipe",
    "__version__",
    "autocast",
    "emulation",
    "inject",
    "load",
    "manifest",
    "start",
    "telemetry",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nemo_fp8_recipes.dependencies import explained

    home = _HOME[name]
    with explained():
        if home is None:
            return importlib.import_module(f"{__name__}.{name}")
        return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
