"""Importing Transformer Engine's Python modules where its compiled libraries are not installed.

TE looks for CUDA libraries and its own shared objects at import, unless NVTE_PROJECT_BUILDING is set. The
variable is set in this process for the duration of the import only: a process that may use a GPU must never
inherit it.

TE also imports triton, onnx and onnxscript at module level, for kernels and an export that never run here.
Where they are missing, placeholders stand in during the import and are gone after it, so that nobody who asks
later whether triton is installed is told that it is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

from nemo_fp8_recipes.emulation import binding, grouped_linear, triton_kernels
from nemo_fp8_recipes.emulation.binding.te_classes import te_classes
from nemo_fp8_recipes.emulation.devices import EmulatedDevice
from nemo_fp8_recipes.emulation.import_hook import after_import
from nemo_fp8_recipes.emulation.ledger import PatchLedger
from nemo_fp8_recipes.emulation.placeholders import placeholders
from nemo_fp8_recipes.errors import EmulationError

__all__ = ["import_transformer_engine", "transformer_engine_version"]

_OPTIONAL = ("triton", "onnx", "onnxscript")

_ENVIRONMENT = {
    "NVTE_PROJECT_BUILDING": "1",
    # TE's jit_fuser would compile small functions with a C++ compiler that a machine need not have.
    "NVTE_TORCH_COMPILE": "0",
}


def transformer_engine_version() -> str:
    """Version of the installed `transformer-engine`. Raises `EmulationError` when there is none."""
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        raise EmulationError(
            "Transformer Engine is not installed; the emulated device needs its Python part.",
            hint="Install it with: pip install 'nemo-fp8-recipes[cpu]'",
        ) from None


def import_transformer_engine(ledger: PatchLedger, device: EmulatedDevice) -> None:
    """Import `transformer_engine.pytorch` on top of the emulated binding.

    Raises:
        EmulationError: TE is not installed, of a release that is not emulated, or does not import.
    """
    module = binding.build(transformer_engine_version(), device)
    ledger.put(
        sys.modules,
        binding.MODULE,
        module,
        "Transformer Engine's compiled module needs CUDA",
        called="sys.modules",
    )
    after_import(
        ledger,
        "transformer_engine.common",
        lambda common: setattr(common, "load_framework_extension", _load_framework_extension),
        "the emulated binding is loaded already",
    )
    after_import(
        ledger,
        "transformer_engine.pytorch.utils",
        lambda utils: setattr(utils, "canonicalize_device", _canonicalize_device),
        "torch.device(0), where Megatron-Core passes the index, needs a device; modules compare it to "
        "tensors'",
    )
    triton_kernels.apply(ledger)
    grouped_linear.apply(ledger)
    for format_, storage in (("mxfp8", "MXFP8TensorStorage"), ("nvfp4", "NVFP4TensorStorage")):
        after_import(
            ledger,
            f"transformer_engine.pytorch.tensor.storage.{format_}_tensor_storage",
            functools.partial(_let_storages_stay, name=storage),
            "dequantize moves a tensor of another device to CUDA; internal storages have no `to`",
        )
    before = set(sys.modules)
    _remember_what_te_changes(ledger)
    _settle_triton(ledger)
    try:
        with _environment(), placeholders(_OPTIONAL), warnings.catch_warnings():
            # TE's docstrings of optional parts warn about what is not installed.
            warnings.filterwarnings("ignore", module=r"transformer_engine(\.|$)")
            importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError, AttributeError) as error:
        _forget_modules(before)
        raise EmulationError(
            f"Transformer Engine {transformer_engine_version()} does not import on the emulated device: "
            f"{type(error).__name__}: {error}",
            hint="Reinstall the tested set with: pip install 'nemo-fp8-recipes[cpu]'",
        ) from error
    _no_advice_on_flash_attention(ledger)
    ledger.add(
        "sys.modules['transformer_engine*']",
        "a later import on a real device must start afresh",
        lambda: _forget_modules(before),
    )


def _remember_what_te_changes(ledger: PatchLedger) -> None:
    """TE itself changes torch when it is imported (`pytorch/__init__.py`, `pytorch/tensor/__init__.py`)."""
    import torch
    from torch import serialization

    reason = "Transformer Engine wraps it at import"
    for name in ("float", "half", "bfloat16"):
        ledger.set(torch.nn.Module, name, vars(torch.nn.Module)[name], reason)
    marked = list(serialization.get_safe_globals())

    def unmark() -> None:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(marked)

    ledger.add(
        "torch.serialization.add_safe_globals", "Transformer Engine marks its classes as safe to load", unmark
    )


def _no_advice_on_flash_attention(ledger: PatchLedger) -> None:
    """TE advises once to install flash-attn, which does not run here."""
    utilities = importlib.import_module(
        "transformer_engine.pytorch.attention.dot_product_attention.utils"
    ).FlashAttentionUtils
    for name in ("warning_printed", "v3_warning_printed", "v4_warning_printed"):
        if hasattr(utilities, name):
            ledger.set(
                utilities, name, True, "flash-attn needs a GPU; the advice to install it does not help"
            )


def _load_framework_extension(framework: str) -> None:
    """In place of TE's own, which opens the shared object `transformer_engine_<framework>`."""
    if framework != "torch":
        raise ImportError(f"transformer_engine_{framework} is not emulated")


def _canonicalize_device(device: Any) -> Any:
    """In place of `transformer_engine.pytorch.utils.canonicalize_device`: the host for every CUDA device."""
    import torch

    from nemo_fp8_recipes.emulation.torch_cuda.placement import host

    where = host(torch.get_default_device() if device is None else device)
    return where if isinstance(where, torch.device) else torch.device(where)


def _let_storages_stay(module: types.ModuleType, *, name: str) -> None:
    """Give a storage class the `to` that its dequantize calls; tensors keep torch's own."""
    import torch

    storage: Any = getattr(module, name)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        return super(storage, self).to(*args, **kwargs) if isinstance(self, torch.Tensor) else self

    storage.to = to


def _forget_modules(before: set[str]) -> None:
    te_classes.cache_clear()
    for name in [name for name in sys.modules if name not in before and _is_te(name)]:
        del sys.modules[name]


def _is_te(name: str) -> bool:
    return name.split(".", 1)[0] == "transformer_engine"


def _settle_triton(ledger: PatchLedger) -> None:
    """Let torch find out, and remember, whether triton is really there before a placeholder is; where it is,
    it has no GPU to compile for.
    """
    import torch.utils._triton

    torch.utils._triton.has_triton_package()

    @functools.cache
    def has_triton() -> bool:
        return False

    ledger.set(
        torch.utils._triton,
        "has_triton",
        has_triton,
        "torch.compile would ask Triton for the driver of a GPU that torch.cuda says is there",
    )


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    added = [name for name in _ENVIRONMENT if name not in os.environ]
    os.environ.update({name: _ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
