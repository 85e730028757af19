"""The installed Transformer Engine release: tests run under every tested one (make test-te-versions)."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType
from typing import Any

import pytest

from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.targets.transformer_engine import newer_options

__all__ = ["RELEASE", "SAVED_INPUT_REFUSAL", "nvfp4_reference", "reference", "since", "skip_unknown"]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


RELEASE = ".".join(importlib.metadata.version("transformer-engine").split(".")[:2])
"""Major and minor version, "2.20"."""

SAVED_INPUT_REFUSAL: type[Exception] = AssertionError if _number(RELEASE) < (2, 20) else ValueError
"""How `te.Linear` refuses delayed scaling with `save_original_input`."""

_RECIPES = "transformer_engine.pytorch.custom_recipes"
_REFERENCES = {
    "2.11": "quantization_{}",
    "2.14": "quantization_{}",
    "2.17": "quantization_ref_{}",
    "2.20": "reference_{}",
}


def since(version: str) -> pytest.MarkDecorator:
    """Skip the test under older releases, which do not have what it is about."""
    return pytest.mark.skipif(
        _number(RELEASE) < _number(version), reason=f"Transformer Engine {version} or later has it"
    )


def skip_unknown(recipe: Recipe) -> None:
    """Skip the test when an option of the recipe is newer than the installed release."""
    newer = newer_options(recipe, RELEASE)
    if newer:
        pytest.skip(", ".join(f"{name} exists since Transformer Engine {version}" for name, version in newer))


def reference(name: str) -> ModuleType:
    """TE's module of reference quantizers in Python: "nvfp4" or "current_scaling"."""
    return importlib.import_module(f"{_RECIPES}.{_REFERENCES[RELEASE].format(name)}")


def nvfp4_reference(**options: Any) -> Any:
    """TE's reference quantizer of NVFP4."""
    formats = importlib.import_module(f"{_RECIPES}.{'reference_utils' if RELEASE == '2.20' else 'utils'}")
    return reference("nvfp4").NVFP4QuantizerRef(formats.Fp4Formats.E2M1, **options)
