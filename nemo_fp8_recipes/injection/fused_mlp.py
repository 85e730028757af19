"""An MLP of Megatron-Core 0.19 that asks nobody for its recipe.

`TEFusedMLPWithGroupedLinear` (`use_grouped_gemm_for_dense_mlp` with `use_transformer_engine_op_fuser`) enters
an FP8 context of its own in every forward pass, with an MXFP8 or NVFP4 object that it makes once and keeps as
`_recipe` (`megatron/core/extensions/transformer_engine.py`): whatever the config says, and in the layers that
it keeps in BF16 too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["own_recipe_answered"]

_NAME = "_recipe"


@contextmanager
def own_recipe_answered(answer: Callable[[Any], Any]) -> Iterator[None]:
    """In the block, such an MLP uses what `answer(config)` returns; an MLP that ran before keeps its own.

    Nothing happens where Megatron-Core has no such class.
    """
    from megatron.core.extensions import transformer_engine

    mlp = getattr(transformer_engine, "TEFusedMLPWithGroupedLinear", None)
    if mlp is None or _NAME in vars(mlp):
        yield
        return
    setattr(mlp, _NAME, _Answered(answer))
    try:
        yield
    finally:
        if isinstance(vars(mlp).get(_NAME), _Answered):
            delattr(mlp, _NAME)


class _Answered:
    """An attribute that is found out when it is read; one of the MLP itself comes first."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self._answer = answer

    def __get__(self, mlp: Any, owner: type | None = None) -> Any:
        return self if mlp is None else self._answer(mlp.config)
