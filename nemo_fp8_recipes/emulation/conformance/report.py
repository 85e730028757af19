"""The conformance table: what became of TE's tests, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_fp8_recipes.emulation.conformance.causes import cause, reason
from nemo_fp8_recipes.emulation.conformance.suite import LEFT_OUT, SUITE, Part

__all__ = ["STOPPED", "Outcome", "PartResult", "left_out", "markdown", "read"]

STOPPED = "stopped after"
"""How the note of a file begins that ran out of time: the rest of its tests did not run."""


@dataclass(frozen=True)
class Outcome:
    """One test.

    Attributes:
        id: pytest's node id.
        kind: "passed", "failed", "skipped" (by the test itself), "needs a real GPU", or "stopped" of a whole
            file.
        detail: the error, the reason, or why it skipped.
    """

    id: str
    kind: str
    detail: str


@dataclass(frozen=True)
class PartResult:
    """What became of one file."""

    part: Part
    collected: int
    outcomes: tuple[Outcome, ...]

    def count(self, kind: str) -> int:
        return sum(outcome.kind == kind for outcome in self.outcomes)


def read(part: Part, entries: Sequence[Mapping[str, Any]]) -> PartResult:
    """From the plugin's notes."""
    collected = max((int(entry["collected"]) for entry in entries if "collected" in entry), default=0)
    outcomes: dict[str, Outcome] = {}
    for entry in entries:
        if "id" not in entry:
            continue
        kind, detail = entry["outcome"], " ".join(entry["message"].split())
        if kind == "failed":
            excuse = reason(entry["message"])
            if excuse is not None:
                kind, detail = "needs a real GPU", excuse
            elif entry["message"].startswith(STOPPED):
                kind = "stopped"
        before = outcomes.get(entry["id"])
        if before is None or before.kind == "passed":  # an error in teardown counts
            outcomes[entry["id"]] = Outcome(entry["id"], kind, detail)
    return PartResult(part, collected, tuple(outcomes.values()))


def markdown(
    results: Sequence[PartResult], *, title: str, notes: Sequence[str], more: Sequence[str] = ()
) -> str:
    """The table, what became of the rest test by test, and the sections in `more`."""
    lines = [f"# {title}", "", *notes, ""]
    lines += [
        "| file | tests | run | passed | failed | needs a real GPU | skipped by the test |",
        "|---|" + "---:|" * 6,
    ]
    total: Counter[str] = Counter()
    for result in results:
        kinds = Counter(outcome.kind for outcome in result.outcomes)
        total += kinds
        total["collected"] += result.collected
        lines.append(_row(f"`{result.part.label}`", result.collected, kinds))
    lines.append(_row("**all**", total.pop("collected", 0), total))
    judged = total["passed"] + total["failed"]
    if judged:
        lines += ["", f"Passed of those that need no real GPU: {total['passed'] / judged:.1%}."]
    lines += _section(results, "failed", "Failed")
    lines += _section(results, "stopped", "Ran out of time: the rest of the file did not run")
    lines += _excluded(results)
    lines += ["", "## Skipped by the tests themselves", ""]
    why = Counter(o.detail for result in results for o in result.outcomes if o.kind == "skipped")
    lines += [f"- {number} times: {_cell(text)}" for text, number in why.most_common()]
    lines += more
    return "\n".join(lines) + "\n"


def left_out(tests: Path) -> list[str]:
    """The test files of a source tree that the suite does not run, with the reasons: a section."""
    here = sorted(path.relative_to(tests).as_posix() for path in tests.rglob("test_*.py"))
    known = {part.file for part in SUITE}
    lines = ["", "## Not in the suite", ""]
    why = [(file, LEFT_OUT.get(file, "not looked at yet")) for file in here if file not in known]
    return [*lines, *(f"- `{file}`: {verdict}" for file, verdict in why)]


def _row(name: str, collected: int, kinds: Mapping[str, int]) -> str:
    numbers = [collected, sum(number for kind, number in kinds.items() if kind != "stopped")]
    numbers += [kinds.get(kind, 0) for kind in ("passed", "failed", "needs a real GPU", "skipped")]
    return f"| {name} | " + " | ".join(str(number) for number in numbers) + " |"


def _excluded(results: Sequence[PartResult]) -> list[str]:
    """Reason -> test functions, with the number of their parameter sets that were run and need a GPU."""
    by_reason: dict[str, Counter[str]] = {}
    for result in results:
        for outcome in result.outcomes:
            if outcome.kind == "needs a real GPU":
                by_reason.setdefault(outcome.detail, Counter())[outcome.id.split("[")[0]] += 1
    lines = ["", "## Needs a real GPU", ""]
    if not by_reason:
        return [*lines, "None."]
    for why, functions in sorted(by_reason.items(), key=lambda pair: -pair[1].total()):
        lines += [f"**{_cell(why)}** ({functions.total()})", ""]
        lines += [f"- `{name}`, {number} times" for name, number in functions.items()]
        lines += [""]
    return lines[:-1]


def _section(results: Sequence[PartResult], kind: str, heading: str) -> list[str]:
    by_detail: dict[str, list[str]] = {}
    for result in results:
        for outcome in result.outcomes:
            if outcome.kind == kind:
                known = cause(outcome.id, outcome.detail) if kind == "failed" else ""
                by_detail.setdefault(known or outcome.detail, []).append(outcome.id)
    lines = ["", f"## {heading}", ""]
    if not by_detail:
        return [*lines, "None."]
    for detail, ids in sorted(by_detail.items(), key=lambda pair: -len(pair[1])):
        lines += [f"**{_cell(detail)}**", "", *(f"- `{one}`" for one in ids), ""]
    return lines[:-1]


def _cell(text: str) -> str:
    short = text if len(text) <= 220 else text[:217] + "..."
    return short.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
