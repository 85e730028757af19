"""A device that counts what a GPU would be asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.telemetry.launches import Launches

__all__ = ["CountingDevice", "CountingEvent"]


class CountingEvent:
    """Stands for `torch.cuda.Event`."""

    recorded = 0
    waited = 0

    def record(self) -> None:
        type(self).recorded += 1

    def synchronize(self) -> None:
        type(self).waited += 1


class CountingDevice(TorchDispatchMode):
    """While it is on, meta tensors stand for tensors on a GPU. They have no values, so whatever would wait
    for one (`item`, `nonzero`, a branch on a tensor, printing) raises.

    Attributes:
        launches: operations on the device that launch a kernel, in order.
        to_host: copies to the host: whether the caller does not wait, and whether the memory is pinned.
        to_device: copies the other way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.to_host: list[tuple[bool, bool]] = []
        self.to_device = 0
        self._pinned: list[Tensor] = []

    @property
    def idle(self) -> bool:
        """Nothing was launched or copied."""
        return not (self.launches or self.to_host or self.to_device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name().split("::")[1].split(".")[0].strip("_")
        pinned = kwargs.get("pin_memory")
        if pinned:
            kwargs["pin_memory"] = False  # which torch without CUDA has none of
        if name == "copy" and args[0].device.type == "cpu" and args[1].device.type == "meta":
            without_waiting = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            self.to_host.append(
                (without_waiting, any(args[0].data_ptr() == one.data_ptr() for one in self._pinned))
            )
            return args[0].zero_()
        before = [leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        after = [leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if pinned:
            self._pinned.append(result)
        if "meta" in after and "cpu" in before and "meta" not in before:
            self.to_device += 1
        elif "meta" in (*before, *after) and name not in Launches.VIEWS:
            self.launches.append(name)
        return result
