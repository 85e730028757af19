"""The one run of this process that Bridge's `pretrain()` has begun: from `MixedPrecisionConfig.setup` to its
last event.

A module of its own because Bridge makes the mixed-precision object and the callback independently; what they
share is the process, as Transformer Engine's own state is.
"""

from __future__ import annotations

from typing import Any

from nemo_fp8_recipes.callbacks.bridge.way_in import BridgeRun, choose
from nemo_fp8_recipes.recipes import Recipe

__all__ = ["begin", "current", "end"]

_run: BridgeRun | None = None


def begin(recipe: Recipe, model_config: Any, optimizer_config: Any, ddp_config: Any) -> BridgeRun:
    """Start a run with the configs it will be built from; one that `pretrain()` left behind ends first.

    Raises:
        InjectionError: the configs contradict the recipe, or it cannot be injected.
    """
    global _run
    end()
    config = getattr(model_config, "transformer", model_config)
    run = BridgeRun(recipe, choose(recipe, config))
    # Bridge's optimizer config names a kind of recipe even where nothing is quantised.
    run.check(
        config,
        optimizer_config=optimizer_config if recipe.precision == "fp8" else None,
        ddp_config=ddp_config if recipe.precision == "fp8" else None,
    )
    run.__enter__()
    _run = run
    return run


def current() -> BridgeRun | None:
    """The run that has begun and not ended."""
    return _run


def end() -> None:
    """End the run: Megatron makes its own recipe objects again. Does nothing where none has begun."""
    global _run
    run, _run = _run, None
    if run is not None:
        run.__exit__(None, None, None)
