"""Where the YAML is: beside the code in a wheel, one level up in an editable install or checkout."""

from __future__ import annotations

from pathlib import Path

from nemo_fp8_recipes.errors import ConfigError

__all__ = ["conf_dir", "groups", "options"]

_PACKAGE = Path(__file__).resolve().parent.parent
ROOT_CONFIG = "config"


def conf_dir() -> Path:
    """The directory that holds config.yaml and the config groups.

    Raises:
        ConfigError: when the installation is incomplete.
    """
    candidates = (_PACKAGE / "conf", _PACKAGE.parent / "conf")
    for candidate in candidates:
        if (candidate / f"{ROOT_CONFIG}.yaml").is_file():
            return candidate
    raise ConfigError(
        f"The configuration files of nemo_fp8_recipes are missing: no {ROOT_CONFIG}.yaml in "
        + " or ".join(str(candidate) for candidate in candidates)
        + ".",
        hint="Install the package again.",
    )


def groups() -> tuple[str, ...]:
    """The config groups, such as fp8_recipe and hardware."""
    return tuple(sorted(path.name for path in conf_dir().iterdir() if path.is_dir()))


def options(group: str) -> tuple[str, ...]:
    """The choices of a group, such as h100 and b200 for hardware."""
    return tuple(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))
