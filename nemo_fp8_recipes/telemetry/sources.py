"""The high-precision tensors behind the quantised ones, at the functions of the binding that made them.

A function that only quantises was handed the tensor. One that computes it first (a norm, an activation) and
quantises in the same kernel never writes it to memory: it is asked once more, without the quantizer, and
gives what it would have quantised, rounded to the output's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from nemo_fp8_recipes.telemetry.seam import is_quantized, is_quantizer

__all__ = ["sources"]

_GIVEN: dict[str, tuple[str, ...]] = {
    "quantize": ("tensor", "input"),
    "bgrad_quantize": ("input", "tensor"),
    "group_quantize": ("tensor",),
    "bgrad_group_quantize": ("tensor",),
    "nvfp4_group_quantize_with_amax": ("tensor",),
}
_GIVEN_MANY = {"multi_tensor_quantize": ("tensor_list",)}
_SPLIT = {"split_quantize": ("tensor",)}


def sources(
    name: str, original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], made: int
) -> list[Tensor] | None:
    """What a call of the binding quantised.

    Args:
        name: of the function in the binding.
        original: the function itself.
        args, kwargs: of the call.
        made: number of quantised tensors that the call gave.

    Returns:
        One tensor for each of them, in order; None where they cannot be had.
    """
    if name in _GIVEN:
        found = [_first(args, kwargs, _GIVEN[name])]
    elif name in _GIVEN_MANY:
        found = list(_first(args, kwargs, _GIVEN_MANY[name]) or ())
    elif name in _SPLIT:
        whole = _first(args, kwargs, _SPLIT[name])
        sections = args[1] if len(args) > 1 else kwargs.get("split_sections")
        if whole is None or sections is None:
            return None
        lengths = [int(section) for section in sections]
        found = list(whole[: sum(lengths)].split(lengths))
    else:
        found = _unfused(original, args, kwargs)
    if len(found) != made or not all(isinstance(tensor, Tensor) for tensor in found):
        return None
    return found


def _first(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> Any:
    if args:
        return args[0]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _unfused(original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The same computation without quantisation. A norm gives [output, statistics ...], an activation's
    gradient with the bias gradient [bias gradient, output]; everything else the output.
    """
    plain = [_without(argument) for argument in args]
    result = original(*plain, **{key: _without(value) for key, value in kwargs.items()})
    if not isinstance(result, (list, tuple)):
        return [result]
    wanted = args[0] if args else next(iter(kwargs.values()))
    return [item for item in result if isinstance(item, Tensor) and item.shape == wanted.shape][:1]


def _without(argument: Any) -> Any:
    return None if is_quantizer(argument) or is_quantized(argument) else argument
