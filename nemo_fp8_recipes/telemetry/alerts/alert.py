"""What an alert is, and its JSON form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Alert"]


@dataclass(frozen=True)
class Alert:
    """One rule that some tensors began to violate in one logging step.

    Attributes:
        step: the logging step, completed optimizer steps counted from 1.
        rule: the rule's name, a key of the group `alerts`.
        action: what the rule asks for: "warn", "checkpoint" or "stop".
        message: what was seen and what to do, one line.
        module, tensor: the operand that shows it most.
        value: the number that the rule compared, of that operand.
        tensors: every operand that began to violate the rule in this step, (module, tensor), worst first.
    """

    step: int
    rule: str
    action: str
    message: str
    module: str
    tensor: str
    value: float
    tensors: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a value that is not finite is the string "NaN", "Infinity" or "-Infinity"."""
        return {**dataclasses.asdict(self), "value": _spelled(self.value)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Alert:
        """The alert that `to_dict` made this of; fields added later are ignored.

        Raises:
            KeyError, TypeError, ValueError: the data is no alert.
        """
        values = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        values["value"] = float(values["value"])
        values["tensors"] = tuple((str(module), str(tensor)) for module, tensor in values["tensors"])
        return cls(**values)


def _spelled(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
