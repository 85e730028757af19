"""The hardware group read on its own, for what is looked up without composing a job."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from nemo_fp8_recipes.config.paths import conf_dir, options
from nemo_fp8_recipes.config.schema import HardwareConfig, read
from nemo_fp8_recipes.errors import ConfigError, nearest

__all__ = ["load_hardware"]


def load_hardware(name: str) -> HardwareConfig:
    """conf/hardware/<name>.yaml.

    Raises:
        ConfigError: there is no such choice.
    """
    if name not in options("hardware"):
        close = nearest(name, options("hardware"))
        raise ConfigError(
            f"hardware={name} is not available.",
            key="hardware",
            value=name,
            allowed=options("hardware"),
            hint=f"Did you mean '{close}'?" if close else None,
        )
    values: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "hardware" / f"{name}.yaml"))
    hardware: HardwareConfig = read("hardware", values)
    return hardware
