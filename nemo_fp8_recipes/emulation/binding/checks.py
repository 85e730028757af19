"""Errors as Transformer Engine's C++ raises them."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["not_emulated", "nvte_check", "nvte_error"]

MODULE = "transformer_engine_torch"


def nvte_error(source: str, message: str) -> NoReturn:
    """`NVTE_ERROR`: a RuntimeError with TE's own text, led by the TE source file that raises it on a GPU."""
    raise RuntimeError(f"{source}: {message}")


def nvte_check(condition: bool, source: str, message: str) -> None:
    """`NVTE_CHECK`: RuntimeError with TE's own text unless the condition holds."""
    if not condition:
        nvte_error(source, f"Assertion failed. {message}")


def not_emulated(what: str, hint: str = "") -> NoReturn:
    """What the real binding can do and the emulated one cannot.

    Raises:
        NotImplementedError: always; names the function and the option at fault.
    """
    raise NotImplementedError(
        f"{MODULE}.{what} is not emulated on a machine without a GPU.{' ' if hint else ''}{hint}"
    )
