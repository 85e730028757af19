"""Time limits as sbatch reads them."""

from __future__ import annotations

import re

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.launch.schema import SlurmConfig

__all__ = ["minutes", "refuse_early_notice"]

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


def _seconds(time: str | int) -> int | None:
    """Seconds of a time limit; None for one in words, such as UNLIMITED."""
    match = _TIME.fullmatch(str(time))
    if match is None:
        return None
    parts = [int(part) for part in (match["first"], match["second"], match["third"]) if part is not None]
    if match["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, mins, seconds = (*parts, 0, 0)[:3]
        hours += 24 * int(match["days"])
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:  # minutes[:seconds]
        hours, (mins, seconds) = 0, (*parts, 0)[:2]
    return (hours * 60 + mins) * 60 + seconds


def minutes(time: str | int | None) -> int:
    """A time limit in minutes, rounded up.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if time is None:
        raise ConfigError(
            "launcher.time needs a value: submitit gives every job a time limit.",
            key="launcher.time",
            allowed=["minutes, HH:MM:SS, D-HH or D-HH:MM:SS"],
        )
    seconds = _seconds(time)
    if seconds is None:
        raise ConfigError(
            f"launcher.time={time} cannot be read.",
            key="launcher.time",
            value=time,
            allowed=["minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"],
        )
    return max(1, -(-seconds // 60))


def refuse_early_notice(launcher: SlurmConfig) -> None:
    """Refuse a time limit so short that the job would be told to save when it begins.

    Raises:
        ConfigError: naming both keys.
    """
    seconds = _seconds(launcher.time) if launcher.time is not None else None
    if seconds is None or seconds == 0 or seconds > launcher.signal_seconds:  # 0: no limit
        return
    raise ConfigError(
        f"launcher.time={launcher.time} ({seconds} s) leaves no time to train: launcher.signal_seconds="
        f"{launcher.signal_seconds} tells the job to save so long before its limit.",
        key="launcher.time",
        value=launcher.time,
        allowed=[f"more than {launcher.signal_seconds} s"],
        hint="Raise launcher.time or lower launcher.signal_seconds.",
    )
