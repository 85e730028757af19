"""Where telemetry looks into Transformer Engine: the functions of its binding that quantise.

Every quantised tensor comes out of a function of the binding module `transformer_engine_torch` that was
handed the quantizer of the operand it makes: `quantize`, the norms fused with quantisation (`layernorm_fwd`,
`rmsnorm_fwd`), the bias gradient fused with it (`bgrad_quantize`), activations, `split_quantize` for experts.
Wrapping these sees each operand once, under the identity of its own quantizer, also where no Python method of
the quantizer is called. The alternatives fall short: methods of the quantizer instance are bypassed by the
fused functions; subclasses of it are refused by C++, which checks the exact type; operands at the GEMM do not
know their module, because a quantised tensor keeps a copy of its quantizer; module hooks do not see the
operand.

The wrappers are in place between `open` and `close` only, which is a logging step. Outside it nothing of ours
runs and every module attribute is the original again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch

from nemo_fp8_recipes.injection.cuda_graphs import capture_flags

__all__ = ["QUANTISING", "BindingSeam", "is_quantized", "is_quantizer", "quantized_type"]

_ACTIVATIONS = ("gelu", "geglu", "qgelu", "qgeglu", "relu", "reglu", "srelu", "sreglu", "silu", "swiglu")
QUANTISING = (
    "quantize",
    "bgrad_quantize",
    "split_quantize",
    "multi_tensor_quantize",
    "layernorm_fwd",
    "rmsnorm_fwd",
    "glu",
    "dglu",
    "clamped_swiglu",
    "clamped_dswiglu",
    *_ACTIVATIONS,
    *(f"d{name}" for name in _ACTIVATIONS),
    *(f"dbias_d{name}" for name in ("gelu", "silu", "relu", "qgelu", "srelu")),
)
"""Functions of the binding that take a quantizer and return what it made."""

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Places(NamedTuple):
    """Where the functions are bound. Looked for once, and again when modules were imported or functions
    replaced.

    Attributes:
        modules: number of loaded modules.
        originals: the functions; None for those that this release lacks.
        places: namespace of a module, name in it, the function, and what takes its place.
    """

    modules: int
    originals: list[Any]
    places: list[tuple[dict[str, Any], str, Any, Any]]

    def stale(self, originals: list[Any]) -> bool:
        return len(sys.modules) != self.modules or originals != self.originals


class BindingSeam:
    """Puts wrappers around functions of Transformer Engine while open.

    Args:
        wrappers: function name in the binding -> what to put around it.
        python: function name in `transformer_engine.pytorch.quantization` -> what to put around it.
    """

    def __init__(self, wrappers: Mapping[str, Wrapper], python: Mapping[str, Wrapper]) -> None:
        self._wrappers = dict(wrappers)
        self._python = dict(python)
        self._undo: list[tuple[dict[str, Any], str, Any]] = []
        self._open = False
        self._capture_flags: tuple[Callable[[], bool], ...] = ()
        self._found: _Places | None = None

    @property
    def is_open(self) -> bool:
        return self._open

    def open(self) -> None:
        """Put the wrappers in place, wherever Transformer Engine bound one of the functions to a name."""
        if self._open:
            return
        self._open = True
        self._capture_flags = capture_flags()
        import transformer_engine.pytorch.quantization as quantization
        import transformer_engine_torch as binding

        originals = [vars(binding).get(name) for name in self._wrappers]
        originals += [vars(quantization).get(name) for name in self._python]
        if self._found is None or self._found.stale(originals):
            self._found = self._look(binding, quantization, originals)
        for namespace, name, original, replacement in self._found.places:
            if namespace.get(name) is original:
                self._undo.append((namespace, name, original))
                namespace[name] = replacement

    def _look(self, binding: Any, quantization: Any, originals: list[Any]) -> _Places:
        """Names that are bound to one of the functions: `from transformer_engine_torch import *` in
        cpp_extensions, and the like, made names of their own.
        """
        replacements = {}
        for name, wrapper in self._wrappers.items():
            original = vars(binding).get(name)
            if original is not None:
                replacements[id(original)] = (original, self._guarded(original, wrapper))
        places = [
            (vars(module), attribute, *replacements[id(value)])
            for name, module in list(sys.modules.items())
            if module is not None and name.startswith("transformer_engine")
            for attribute, value in list(vars(module).items())
            if id(value) in replacements
        ]
        for name, wrapper in self._python.items():
            original = vars(quantization).get(name)
            if original is not None:
                places.append((vars(quantization), name, original, self._guarded(original, wrapper)))
        return _Places(len(sys.modules), originals, places)

    def close(self) -> None:
        """Put every original back."""
        self._open = False
        while self._undo:
            namespace, name, original = self._undo.pop()
            namespace[name] = original

    def _guarded(self, original: Callable[..., Any], wrapper: Wrapper) -> Callable[..., Any]:
        """The wrapper, or the original where somebody kept the wrapper beyond the step, and while a CUDA
        graph is captured: what is launched then would be replayed with the graph. Its warm-up passes are no
        part of the training step either.
        """
        wrapped = wrapper(original)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._open or torch.cuda.is_current_stream_capturing():
                return original(*args, **kwargs)
            for flag in self._capture_flags:
                if flag():
                    return original(*args, **kwargs)
            return wrapped(*args, **kwargs)

        return call


def is_quantizer(value: object) -> bool:
    """Whether `value` is one of Transformer Engine's quantizers."""
    kind: Any = type(value)
    return _is_quantizer(kind)


def is_quantized(value: object) -> bool:
    """Whether `value` is one of Transformer Engine's quantised tensors, or the storage of one."""
    kind: Any = type(value)
    return _is_quantized(kind)


@functools.lru_cache(maxsize=1024)
def _is_quantizer(kind: Hashable) -> bool:
    return _derives(kind, "Quantizer")


@functools.lru_cache(maxsize=1024)
def _is_quantized(kind: Hashable) -> bool:
    return _derives(kind, "QuantizedTensorStorage")


quantized_type: Callable[[Any], bool] = _is_quantized
"""Whether a class is that of a quantised tensor, see `is_quantized`; no Python runs for one that was seen."""


def _derives(kind: Hashable, name: str) -> bool:
    return any(
        base.__name__ == name and base.__module__.startswith("transformer_engine")
        for base in getattr(kind, "__mro__", ())
    )
