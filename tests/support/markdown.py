"""The code of a documentation page, so that a test can run what a reader would copy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "blocks"]

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(
    r"(?:^<!-- test: (?P<tag>[\w-]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block; `tag` is what a comment `<!-- test: TAG -->` before it says, empty without one."""

    language: str
    tag: str
    code: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page below docs/, in order."""
    text = (ROOT / "docs" / page).read_text()
    found = [Block(match["language"], match["tag"] or "", match["code"]) for match in _FENCE.finditer(text)]
    assert text.count("\n```") == 2 * len(found), "every fence of the page was read"
    return found
