"""Where telemetry looks into Transformer Engine: the functions of its binding that quantise.

Every quantised tensor comes out of a function of the binding module `transformer_engine_torch` that was
handed the quantizer of the operand it makes: `quantize`, the norms fused with quantisation (`layernorm_fwd`,
`rmsnorm_fwd`), the bias gradient fused with it (`bgrad_quantize`), activations, `split_quantize` and
`group_quantize` for experts.
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nemo_fp8_recipes.injection.cuda_graphs import capture_flags

__all__ = [
    "QUANTISING",
    "Asking",
    "BindingSeam",
    "grouped_kinds",
    "is_quantized",
    "is_quantizer",
    "quantized_kinds",
]

_ACTIVATIONS = ("gelu", "geglu", "qgelu", "qgeglu", "relu", "reglu", "srelu", "sreglu", "silu", "swiglu")
QUANTISING = (
    "quantize",
    "bgrad_quantize",
    "split_quantize",
    "multi_tensor_quantize",
    "group_quantize",
    "bgrad_group_quantize",
    "nvfp4_group_quantize_with_amax",
    "layernorm_fwd",
    "rmsnorm_fwd",
    "glu",
    "dglu",
    "clamped_swiglu",
    "clamped_dswiglu",
    "situglu",
    "dsituglu",
    *_ACTIVATIONS,
    *(f"d{name}" for name in _ACTIVATIONS),
    *(f"dbias_d{name}" for name in ("gelu", "silu", "relu", "qgelu", "srelu")),
)
"""Functions of the binding that take a quantizer and return what it made."""

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Asking:
    """A wrapper that asks by itself whether it is to do anything, and so does not ask for calls that it has
    nothing to do with. One function less around those that quantise, which are many.

    Attributes:
        wrap: what makes it of a function and of `BindingSeam.idle`, which it calls before it does anything.
    """

    wrap: Callable[[Callable[..., Any], Callable[[], bool]], Callable[..., Any]]


class _Places(NamedTuple):
    """The names in one namespace that are bound to the functions.

    Attributes:
        namespace: of a module.
        names: what they are.
        theirs: name -> function.
        ours: name -> what takes its place.
    """

    namespace: dict[str, Any]
    names: tuple[str, ...]
    theirs: dict[str, Any]
    ours: dict[str, Any]

    @classmethod
    def of(cls, namespace: dict[str, Any], pairs: Mapping[str, tuple[Any, Any]]) -> _Places:
        """Args: pairs: name -> function and what takes its place."""
        theirs = {name: function for name, (function, _) in pairs.items()}
        ours = {name: replacement for name, (_, replacement) in pairs.items()}
        return cls(namespace, tuple(pairs), theirs, ours)

    def bound_to(self, functions: dict[str, Any]) -> bool:
        """Whether the names are bound to `functions`, which are `theirs` or `ours`."""
        return list(map(self.namespace.get, self.names)) == list(functions.values())


class BindingSeam:
    """Puts wrappers around functions of Transformer Engine while open.

    Args:
        wrappers: function name in the binding -> what to put around it.
        python: function name in `transformer_engine.pytorch.quantization` -> what to put around it.
    """

    def __init__(
        self, wrappers: Mapping[str, Wrapper | Asking], python: Mapping[str, Wrapper | Asking]
    ) -> None:
        self._wrappers = dict(wrappers)
        self._python = dict(python)
        self._open = False
        self._capture_flags: tuple[Callable[[], bool], ...] = ()
        self._found: list[_Places] = []
        """Looked for once, and again when modules were imported or functions replaced."""
        self._modules = 0
        """How many were loaded then."""

    @property
    def is_open(self) -> bool:
        return self._open

    def open(self) -> None:
        """Put the wrappers in place, wherever Transformer Engine bound one of the functions to a name."""
        if self._open:
            return
        self._open = True
        self._capture_flags = capture_flags()
        if len(sys.modules) != self._modules or not all(
            found.bound_to(found.theirs) for found in self._found
        ):
            self._found = self._look()
            self._modules = len(sys.modules)
        for found in self._found:
            found.namespace.update(found.ours)

    def _look(self) -> list[_Places]:
        """Names that are bound to one of the functions: `from transformer_engine_torch import *` in
        cpp_extensions, and the like, made names of their own.
        """
        import transformer_engine.pytorch.quantization as quantization
        import transformer_engine_torch as binding

        of_binding = self._replacements(binding, self._wrappers)
        by_id = {id(pair[0]): pair for pair in of_binding.values()}
        found = [_Places.of(vars(quantization), self._replacements(quantization, self._python))]
        for name, module in list(sys.modules.items()):
            if module is not None and name.startswith("transformer_engine"):
                bound = {
                    key: by_id[id(value)] for key, value in list(vars(module).items()) if id(value) in by_id
                }
                found.append(_Places.of(vars(module), bound))
        return [places for places in found if places.ours]

    def _replacements(
        self, module: Any, wrappers: Mapping[str, Wrapper] | Mapping[str, Wrapper | Asking]
    ) -> dict[str, tuple[Any, Any]]:
        """Name of a function of `module` -> it and what takes its place; without those that this release
        lacks.
        """
        return {
            name: (original, self._guarded(original, wrapper))
            for name, wrapper in wrappers.items()
            if (original := vars(module).get(name)) is not None
        }

    def close(self) -> None:
        """Put every original back."""
        if not self._open:
            return
        self._open = False
        for found in self._found:
            if found.bound_to(found.ours):
                found.namespace.update(found.theirs)
                continue
            # Somebody replaced one of ours in the meantime, and may put it back: it does nothing any more.
            for name, replacement in found.ours.items():
                if found.namespace.get(name) is replacement:
                    found.namespace[name] = found.theirs[name]

    def idle(self) -> bool:
        """Whether what stands around a function is to do nothing: somebody kept it beyond the step, or a CUDA
        graph is captured. What is launched then would be replayed with the graph, and its warm-up passes are
        no part of the training step either.
        """
        if not self._open or torch.cuda.is_current_stream_capturing():
            return True
        for flag in self._capture_flags:  # noqa: SIM110 - a generator would be one frame more in every call
            if flag():
                return True
        return False

    def _guarded(self, original: Callable[..., Any], wrapper: Wrapper | Asking) -> Callable[..., Any]:
        """The wrapper, or the original where the seam is idle."""
        idle = self.idle
        if isinstance(wrapper, Asking):
            return functools.wraps(original)(wrapper.wrap(original, idle))
        wrapped = wrapper(original)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if idle() else wrapped(*args, **kwargs)

        return call


class _Kinds(dict[type, bool]):
    """Whether classes derive from one of Transformer Engine's, by its name; no Python runs for one that was
    asked about.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __missing__(self, kind: type) -> bool:
        found = self[kind] = any(
            base.__name__ == self._name and base.__module__.startswith("transformer_engine")
            for base in kind.__mro__
        )
        return found


quantizer_kinds: Mapping[type, bool] = _Kinds("Quantizer")
"""Whether a class is that of a quantizer, see `is_quantizer`."""

quantized_kinds: Mapping[type, bool] = _Kinds("QuantizedTensorStorage")
"""Whether a class is that of a quantised tensor, see `is_quantized`."""

grouped_kinds: Mapping[type, bool] = _Kinds("GroupedTensorStorage")
"""Whether a class is that of a grouped tensor, quantised or not."""


def is_quantizer(value: object) -> bool:
    """Whether `value` is one of Transformer Engine's quantizers."""
    return quantizer_kinds[type(value)]


def is_quantized(value: object) -> bool:
    """Whether `value` is one of Transformer Engine's quantised tensors, or the storage of one."""
    return quantized_kinds[type(value)]
