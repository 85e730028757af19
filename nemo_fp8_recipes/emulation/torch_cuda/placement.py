"""Where tensors live: `device="cuda"` makes a host tensor, and a host tensor says that it is on the device.

Only the entry points that take a device are wrapped (torch's own list of tensor constructors, the `*_like`
and `new_*` families, `Tensor.to`, `Tensor.cuda`, …). A `TorchFunctionMode` would catch them all in one place,
but runs Python code around every torch operation of every step and holds only in the thread that entered it.

`tensor.device` stays the truth ("cpu"). `Tensor.is_cuda`, `Tensor.is_cpu` and `Tensor.type()` answer for the
posing device when they are asked by anything but torch itself, whose own decisions need the truth.
"""

# ruff: noqa: ARG001 -- the signatures are torch's

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.utils._device

from nemo_fp8_recipes.emulation.ledger import PatchLedger

__all__ = ["apply", "host"]

_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
_ALSO = ("normal",)  # takes a device, and is missing from torch's own list
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
_CPU = torch.device("cpu")


def host(device: Any) -> Any:
    """The device to use where `device` was asked for: the host for "cuda", "cuda:0", 0 or a cuda
    `torch.device`.
    """
    if device is None:
        return None
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU  # an index means an accelerator, and the posing one is the only one
    return device


def _redirected(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None:
                kwargs["device"] = host(device)
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return redirected


def apply(ledger: PatchLedger) -> None:
    """Redirect what asks for a CUDA tensor to the host."""
    constructors = torch.utils._device._device_constructors()  # torch caches it: it must see the originals
    reason = "a tensor asked for on the device is made on the host"
    for name in sorted({function.__name__ for function in constructors} | {*_LIKE, *_ALSO}):
        original = getattr(torch, name, None)
        if original is not None:
            ledger.set(torch, name, _redirected(original), reason)
    for name in _NEW:
        ledger.set(torch.Tensor, name, _redirected(getattr(torch.Tensor, name)), reason)
    ledger.set(
        torch.Tensor,
        "_make_wrapper_subclass",
        staticmethod(_redirected(torch.Tensor._make_wrapper_subclass)),
        reason,
    )
    _redirect_defaults(ledger)
    _redirect_moves(ledger)
    _redirect_loading(ledger)
    _answer_for_the_device(ledger)


def _redirect_defaults(ledger: PatchLedger) -> None:
    context = torch.utils._device.DeviceContext
    init = context.__init__
    reason = "a default device, or `with torch.device(…)`, makes tensors on the host"

    @functools.wraps(init)
    def redirected_init(self: Any, device: Any) -> None:
        init(self, host(device))

    ledger.set(context, "__init__", redirected_init, reason)


def _redirect_moves(ledger: PatchLedger) -> None:
    to = torch.Tensor.to
    reason = "moving to the device stays on the host"

    @functools.wraps(to)
    def redirected_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.device.type == "cpu" and _is_there_already(args, kwargs):
            return self
        if args:
            first = args[0]
            if isinstance(first, (str, torch.device, int)):
                args = (host(first), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = host(kwargs["device"])
        return to(self, *args, **kwargs)

    def cuda(
        self: torch.Tensor, device: Any = None, non_blocking: bool = False, **_kwargs: Any
    ) -> torch.Tensor:
        """Returns `self`, as it does on a GPU for a tensor that is there."""
        return self

    def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
        return self

    def record_stream(self: torch.Tensor, stream: Any) -> None:
        return None

    module_to = torch.nn.Module.to

    @functools.wraps(module_to)
    def redirected_module_to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        # torch resolves an index by itself and finds no device
        if args and isinstance(args[0], int):
            args = (_CPU, *args[1:])
        elif isinstance(kwargs.get("device"), int):
            kwargs["device"] = _CPU
        return module_to(self, *args, **kwargs)

    ledger.set(torch.nn.Module, "to", redirected_module_to, reason)
    ledger.set(torch.Tensor, "to", redirected_to, reason)
    ledger.set(torch.Tensor, "cuda", cuda, reason)
    ledger.set(torch.Tensor, "pin_memory", pin_memory, "there is no pinned memory without CUDA")
    ledger.set(torch.Tensor, "record_stream", record_stream, "there are no CUDA streams")


def _is_there_already(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `Tensor.to` is asked for the posing device and nothing else: every tensor is there."""
    if len(args) + ("device" in kwargs) != 1 or not kwargs.keys() <= {"device", "non_blocking"}:
        return False
    device = args[0] if args else kwargs["device"]
    return isinstance(device, (str, int, torch.device)) and device != _CPU and host(device) in (_CPU, "cpu")


def _redirect_loading(ledger: PatchLedger) -> None:
    load = torch.load
    reason = "storages saved on a GPU, or asked for on one, are loaded to the host"

    @functools.wraps(load)
    def redirected_load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return load(f, "cpu" if map_location is None else host(map_location), *args, **kwargs)

    def cuda(self: Any, device: Any = None, non_blocking: bool = False) -> Any:
        """Returns `self`: where a function given as `map_location` sends a storage."""
        return self

    ledger.set(torch, "load", redirected_load, reason)
    for storage in (torch.UntypedStorage, torch.TypedStorage):
        ledger.set(storage, "cuda", cuda, reason)


def _answer_for_the_device(ledger: PatchLedger) -> None:
    type_of = torch.Tensor.type

    def is_cuda(self: torch.Tensor) -> bool:
        return self.device.type == "cpu" and not _asked_by("torch")

    def is_cpu(self: torch.Tensor) -> bool:
        # What writes checkpoints has brought the tensor to the host, and makes sure of it.
        return self.device.type == "cpu" and _asked_by("torch", "megatron.core.dist_checkpointing")

    @functools.wraps(type_of)
    def redirected_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name: str = type_of(self)
            # Up to 2.14 the class of a quantised tensor passes the question on to this function once more.
            passed_on = name.startswith("torch.cuda.")
            if passed_on or self.device.type != "cpu" or _asked_by("torch"):
                return name
            return name.replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return type_of(self, dtype, *args, **kwargs)

    ledger.set(torch.Tensor, "is_cuda", property(is_cuda), "modules refuse inputs that are not on the device")
    ledger.set(
        torch.Tensor,
        "is_cpu",
        property(is_cpu),
        "Transformer Engine dequantizes tensors of a CPU in another way",
    )
    ledger.set(
        torch.Tensor, "type", redirected_type, "Megatron-Core recognises parameters by their CUDA type name"
    )


def _asked_by(*packages: str) -> bool:
    """Whether the code that called our caller belongs to one of these packages. A quantised tensor passes the
    question on to its data: what counts is who asked the quantised tensor.
    """
    frame = sys._getframe(2)
    while frame.f_code.co_name == "is_cpu" and _in(frame, ("transformer_engine",)) and frame.f_back:
        frame = frame.f_back
    return _in(frame, packages)


def _in(frame: FrameType, packages: tuple[str, ...]) -> bool:
    module = frame.f_globals.get("__name__", "") + "."
    return module.startswith(tuple(f"{package}." for package in packages))
