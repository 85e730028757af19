"""Presets: recipes as others publish them, in conf/fp8_recipe beside the base recipes they are made from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

__all__ = ["Preset", "presets"]


@dataclass(frozen=True)
class Preset:
    """A published recipe: the base recipe, the options that it sets, and what its file says about it."""

    name: str
    base: str
    options: Mapping[str, Any]
    about: str


@functools.cache
def presets() -> Mapping[str, Preset]:
    """Every preset by its name, read from the YAML that Hydra composes too."""
    from nemo_fp8_recipes.config.paths import conf_dir

    found = (_read(path) for path in sorted((conf_dir() / "fp8_recipe").glob("*.yaml")))
    return MappingProxyType({preset.name: preset for preset in found if preset is not None})


def _read(path: Path) -> Preset | None:
    """The preset in a file; None for a base recipe."""
    from omegaconf import OmegaConf

    text = path.read_text(encoding="utf-8")
    if "\ndefaults:" not in text:
        return None
    values: Any = OmegaConf.to_container(OmegaConf.create(text))
    base = next(entry for entry in values.pop("defaults") if entry != "_self_")
    values.pop("preset")
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return Preset(path.stem, base, MappingProxyType(values), " ".join(comment))
