"""The stand-in for Transformer Engine's compiled module `transformer_engine_torch`.

TE's Python modules run unchanged on top of it, on CPU tensors. Every kernel family is one file that names the
TE source it follows; the quantisers themselves are in `nemo_fp8_recipes.numerics`.

    releases.py       the tested Transformer Engine releases, and in what their bindings differ
    surface.py        every name of the real module, emulated or not
    introduced.py     since which release each of them exists
    enums.py          its enums
    quantize.py       quantise, dequantise, bias gradient
    per_tensor.py     storage of delayed and tensorwise scaling
    mxfp8.py          storage of MXFP8
    blockwise.py      storage of block scaling
    nvfp4.py          storage of NVFP4
    operands.py       what a GEMM reads
    gemm.py           matrix multiplication
    …                 activation, normalization, softmax, amax_update, partial_cast, multi_tensor, transpose,
    …

What is emulated follows TE's arithmetic; codes and scales are meant to be equal bit for bit. What is not
emulated raises NotImplementedError with its own name; what the real module does not have raises
AttributeError.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import types
from collections.abc import Callable
from typing import Any

from nemo_fp8_recipes.emulation.binding import releases, surface
from nemo_fp8_recipes.emulation.binding.checks import MODULE, not_emulated
from nemo_fp8_recipes.emulation.binding.device import PosingDevice, pose_as
from nemo_fp8_recipes.emulation.binding.enums import enums_of
from nemo_fp8_recipes.emulation.binding.introduced import exists

__all__ = ["MODULE", "PosingDevice", "build"]


def build(te_version: str, device: PosingDevice) -> types.ModuleType:
    """Make the module to be put into `sys.modules["transformer_engine_torch"]` before TE is imported.

    Args:
        te_version: version of the installed `transformer_engine`.
        device: the GPU to pose as; its compute capability decides layouts and what is refused.

    Raises:
        EmulationError: a Transformer Engine release that is not one of `releases.RELEASES`.
    """
    chosen = releases.release_of(te_version)
    releases.use(chosen)
    pose_as(device)
    module = types.ModuleType(MODULE, "Emulated on CPU tensors by nemo_fp8_recipes.")
    module.__spec__ = importlib.machinery.ModuleSpec(MODULE, None)
    contents: dict[str, Any] = dict(enums_of(chosen.name))
    for name, family in surface.EMULATED.items():
        if exists(name, chosen.name):
            contents[name] = _emulated(name, family)
    for name in surface.NOT_EMULATED:
        if exists(name, chosen.name):
            contents[name] = _refusing_function(name)
    for name, bases in surface.CLASSES.items():
        contents[name] = _refusing_class(name, tuple(contents[base] for base in bases))
    contents["FP8TensorMeta"] = FP8TensorMeta
    for name, functions in surface.SUBMODULES.items():
        if not exists(name, chosen.name):
            continue
        submodule = types.ModuleType(f"{MODULE}.{name}")
        for function, family in functions.items():
            setattr(submodule, function, _emulated(function, family))
        contents[name] = submodule
    for name, value in contents.items():
        setattr(module, name, value)
    return module


class FP8TensorMeta:
    """Scales and amax history of TE's older interface; a plain record in C++ too."""

    scale: Any = None
    scale_inv: Any = None
    amax_history: Any = None


def _emulated(name: str, family: str) -> Callable[..., Any]:
    module = importlib.import_module(f"{__name__}.{family}")
    generated: dict[str, Callable[..., Any]] = getattr(module, "GENERATED", {})
    function: Callable[..., Any] = generated[name] if name in generated else getattr(module, name)
    return function


def _refusing_function(name: str) -> Callable[..., Any]:
    def refuse(*_args: object, **_kwargs: object) -> Any:
        not_emulated(name)

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__module__ = MODULE
    return refuse


def _refusing_class(name: str, bases: tuple[type, ...]) -> type:
    def refuse(_self: object, *_args: object, **_kwargs: object) -> None:
        not_emulated(name)

    return type(name, bases, {"__init__": refuse, "__module__": MODULE})
