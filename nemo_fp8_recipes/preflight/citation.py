"""Where a rule comes from, to the line: tests look the lines up in the packages' own sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Citation", "core", "engine", "engine_cpp", "in_one_line", "megatron_lm"]


@dataclass(frozen=True)
class Citation:
    """A line of a peer's source.

    Attributes:
        package: distribution, or repository where the file is in none.
        version: the release that has `words` on this line.
        path: file in the package or repository.
        line: first line is 1.
        words: what stands on the line.
    """

    package: str
    version: str
    path: str
    line: int
    words: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} ({self.package} {self.version})"


def in_one_line(sources: Sequence[str | Citation]) -> str:
    """All of them in their order, lines of one file together: `path:3, 7 (package 1.0); a paper`."""
    lines: dict[str | tuple[str, str, str], list[int]] = {}
    for source in sources:
        if isinstance(source, Citation):
            lines.setdefault((source.path, source.package, source.version), []).append(source.line)
        else:
            lines.setdefault(source, [])
    parts = []
    for place, numbers in lines.items():
        if isinstance(place, str):
            parts.append(place)
        else:
            path, package, version = place
            parts.append(f"{path}:{', '.join(map(str, sorted(numbers)))} ({package} {version})")
    return "; ".join(parts)


def engine(path: str, line: int, words: str) -> Citation:
    """A line of Transformer Engine's Python part."""
    return Citation("transformer-engine", "2.20.2", f"transformer_engine/{path}", line, words)


def engine_cpp(path: str, line: int, words: str) -> Citation:
    """A line of Transformer Engine's C++ and CUDA sources, which its Python package does not hold."""
    return Citation("TransformerEngine", "v2.18", f"transformer_engine/{path}", line, words)


def core(path: str, line: int, words: str) -> Citation:
    """A line of Megatron-Core."""
    return Citation("megatron-core", "0.16.1", f"megatron/core/{path}", line, words)


def megatron_lm(path: str, line: int, words: str) -> Citation:
    """A line of Megatron-LM's training scripts, which megatron-core does not hold."""
    return Citation("Megatron-LM", "core_v0.16.1", path, line, words)
