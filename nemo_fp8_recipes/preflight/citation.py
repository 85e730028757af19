"""Where a rule comes from, to the line: tests look the lines up in the packages' own sources."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Citation", "core", "engine", "engine_cpp", "megatron_lm"]


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
