"""Counting what a GPU would launch."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Launches"]


class Launches(TorchDispatchMode):
    """Counts operations that a GPU would launch a kernel or a copy for: everything but views."""

    VIEWS = (
        "device",
        "view",
        "reshape",
        "detach",
        "slice",
        "select",
        "alias",
        "unsqueeze",
        "expand",
        "t",
        "transpose",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0].strip("_")
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
