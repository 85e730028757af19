"""Values where sbatch reads them: in `#SBATCH` lines and in file name patterns."""

from __future__ import annotations

import re

from nemo_fp8_recipes.errors import ConfigError

__all__ = ["directive", "output_pattern"]

_PLAIN = re.compile(r"[A-Za-z0-9_./:,=@%+-]+")
_LONGEST = 4000  # characters; sbatch reads a line into a buffer of a few kilobytes


def directive(option: str, value: object, key: str) -> str:
    """`#SBATCH --option=value`, quoted as sbatch's own reader wants it: it knows quotes and backslashes, also
    within either kind of quotes, and takes # for a comment; no shell reads the line.

    Raises:
        ConfigError: naming `launcher.<key>`, for a value that such a line cannot hold.
    """
    text = str(value)
    if not text.isprintable() or len(text) > _LONGEST:
        raise ConfigError(
            f"launcher.{key}={text[:80]!r} cannot be an option of sbatch.",
            key=f"launcher.{key}",
            value=text,
            allowed=[f"one line of up to {_LONGEST} printable characters"],
        )
    if not _PLAIN.fullmatch(text):
        text = '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'
    return f"#SBATCH --{option}={text}"


def output_pattern(path: str) -> str:
    """A path as sbatch's file name pattern that stands for exactly this path.

    Raises:
        ConfigError: for a path that no pattern stands for.
    """
    if "\\" in path or not path.isprintable():
        raise ConfigError(
            f"SLURM cannot write output below {path!r}.",
            key="run_dir",
            value=path,
            allowed=["a path without backslashes and control characters"],
        )
    return path.replace("%", "%%")
