"""File names of the store, and which files count.

A part is `steps-<first>-<last>.parquet`. Parts are written under another name and renamed, so a part is
always complete. A part whose range lies within that of another is superseded by it: compaction and truncation
write the new part first and remove the old ones after, and a crash in between leaves both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DIRECTORY", "Part", "all_parts", "part_name", "parts"]

DIRECTORY = "telemetry"

_NAME = re.compile(r"steps-(\d+)-(\d+)\.parquet")


@dataclass(frozen=True, order=True)
class Part:
    """One file: the steps from `first` to `last`, both included, ascending by range."""

    first: int
    last: int
    path: Path

    def within(self, other: Part) -> bool:
        """Whether `other` is a different part that covers all steps of this one."""
        return self != other and other.first <= self.first and self.last <= other.last


def part_name(first: int, last: int) -> str:
    return f"steps-{first:010d}-{last:010d}.parquet"


def all_parts(run_dir: str | Path) -> list[Part]:
    """Every part in the store of a run, superseded ones included. Empty where there is no store."""
    found = []
    for path in (Path(run_dir) / DIRECTORY).glob("steps-*.parquet"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append(Part(int(match[1]), int(match[2]), path))
    return sorted(found)


def parts(run_dir: str | Path) -> list[Part]:
    """The parts that count, in the order of their steps."""
    found = all_parts(run_dir)
    return [part for part in found if not any(part.within(other) for other in found)]
