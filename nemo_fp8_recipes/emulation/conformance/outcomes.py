"""What the plugin notes of the tests of a part, kept so that a run goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.emulation.conformance.report import STOPPED

__all__ = ["Entry", "Kept", "read_entries"]

Entry = dict[str, Any]
"""A line of the plugin's: what became of a test, or how many there are."""


def read_entries(path: Path) -> list[Entry]:
    """The lines of a file; none where there is no file. A line that was being written counts for nothing."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


@dataclass(frozen=True)
class Kept:
    """The outcomes of a part in a file of their own, which the plugin appends to.

    Attributes:
        path: JSON lines; the first says what the outcomes were made of.
        made_of: what decides them: those of anything else are not used.
        commit: of this package, as far as it is known: noted, not compared, since `made_of` has its sources.
    """

    path: Path
    made_of: Mapping[str, Any]
    commit: str

    def entries(self, *, of_any_sources: bool = False) -> list[Entry]:
        """The outcomes of the very same run, whole or not; or those of whatever was emulated by then."""
        first, *entries = read_entries(self.path) or [{}]
        made_of, now = dict(first.get("made_of", {})), dict(self.made_of)
        if of_any_sources:
            made_of.pop("sources", None)
            now.pop("sources", None)
        return entries if made_of == now else []

    def made_at(self) -> str:
        """The commit at which they were begun."""
        first, *_ = read_entries(self.path) or [{}]
        return str(first.get("commit", ""))

    def whole(self, *, of_any_sources: bool = False) -> bool:
        """Whether every test of the part has an outcome."""
        entries = self.entries(of_any_sources=of_any_sources)
        wanted = max((entry["run"] for entry in entries if "run" in entry), default=1)
        told = {entry["id"] for entry in entries if "id" in entry}
        return len(told) >= wanted and not _stopped(entries)

    def begin(self) -> None:
        """Make the file ready to be appended to: without the outcomes of another run, and without what was
        noted of the file as a whole.
        """
        entries = [entry for entry in self.entries() if "::" in entry.get("id", "::")]
        head = {"made_of": self.made_of, "commit": self.made_at() if entries else self.commit}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        fresh.write_text("".join(f"{json.dumps(entry)}\n" for entry in [head, *entries]), encoding="utf-8")
        fresh.replace(self.path)

    def add(self, entries: Sequence[Entry]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(entry)}\n" for entry in entries)


def _stopped(entries: Iterable[Mapping[str, Any]]) -> bool:
    return any(str(entry.get("message", "")).startswith(STOPPED) for entry in entries)
