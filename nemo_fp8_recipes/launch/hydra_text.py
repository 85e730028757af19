"""Values as Hydra's command-line grammar reads them."""

from __future__ import annotations

import re

__all__ = ["override"]

_PLAIN = re.compile(r"/[A-Za-z0-9_./-]*")  # an absolute path that needs no quotes
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_BACKSLASHES_BEFORE_QUOTE = re.compile(r"(\\*)(')")


def override(key: str, text: str) -> str:
    """`key=text` such that composing gives exactly `text`: quoted, `${` no interpolation."""
    if _PLAIN.fullmatch(text):
        return f"{key}={text}"
    # OmegaConf: an interpolation is escaped by a backslash, and backslashes right before it by another each.
    escaped = _INTERPOLATION.sub(lambda match: match.group(1) * 2 + r"\${", text)
    # Hydra: in a quoted value, backslashes matter only where a quote follows them, and at the end.
    escaped = _BACKSLASHES_BEFORE_QUOTE.sub(lambda match: match.group(1) * 2 + r"\'", escaped)
    tail = len(escaped) - len(escaped.rstrip("\\"))
    return f"{key}='{escaped}{chr(92) * tail}'"
