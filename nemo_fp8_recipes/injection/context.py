"""`inject`: Megatron-Core builds and runs with our Transformer Engine recipe object.

Megatron asks one function for the object each time it enters an FP8 context, `fp8_utils.get_fp8_recipe` (for
FP4 `fp4_utils.get_fp4_recipe`), and both `fp8_autocast` and `fp8_model_init` get what it returns. Injection
replaces these two functions, and answers for one MLP that asks nobody (`fused_mlp.py`), so Megatron's own
code keeps deciding when a context is entered, for which layers and with which amax reduction group.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection.config_check import check_config, compare_kind
from nemo_fp8_recipes.injection.fused_mlp import own_recipe_answered
from nemo_fp8_recipes.injection.state import inside_autocast
from nemo_fp8_recipes.injection.te_object import megatron_te_object
from nemo_fp8_recipes.targets.transformer_engine import CANNOT_BE_IMPORTED, first_line

if TYPE_CHECKING:
    from nemo_fp8_recipes.recipes import Recipe

__all__ = ["Injection", "inject", "require_no_injection"]

_LOCK = threading.Lock()
_ACTIVE: Injection | None = None


@dataclass
class Injection:
    """An injection in force.

    Attributes:
        recipe: the recipe injected.
        te_object: the one Transformer Engine object handed out; None for bf16. The same object as long as the
            recipe holds, because Transformer Engine keys the delayed-scaling buffers by its repr.
        calls: how often Megatron asked for it.
    """

    recipe: Recipe
    te_object: Any = field(init=False)
    calls: int = 0
    active: bool = field(default=True, repr=False)
    _fields: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.use(self.recipe)

    def use(self, recipe: Recipe) -> None:
        """Hand out another recipe from now on; `switch` also changes what else has to change with it."""
        self.te_object = None if recipe.precision == "bf16" else megatron_te_object(recipe)
        self._fields = recipe.megatron()
        self.recipe = recipe

    def answer(self, config: Any) -> Any:
        """What Megatron gets for a layer of this config; raises InjectionError where the two disagree."""
        compare_kind(self._fields, config, self.recipe.name)
        self.calls += 1
        return self.te_object

    def answer_own_context(self, config: Any) -> Any:
        """The same for an MLP that enters an FP8 context whatever the config says (`fused_mlp.py`)."""
        te_object = self.answer(config)
        if te_object is None:
            raise InjectionError(
                "Megatron's TEFusedMLPWithGroupedLinear quantises in every forward pass, "
                f"and the recipe is '{self.recipe.name}'.",
                key="use_grouped_gemm_for_dense_mlp",
                value=True,
                allowed=[False],
            )
        return te_object


@contextmanager
def inject(recipe: Recipe, *, config: Any = None) -> Iterator[Injection]:
    """While active, Megatron-Core uses `recipe`'s Transformer Engine object.

    Enter it before the model is built (primary FP8 weights are made then) and leave it after the last step.
    It holds for the whole process, as Transformer Engine's own FP8 state does: for every model and every
    thread, the autograd threads that recompute activations included.

    Args:
        recipe: what to inject; "bf16" makes any FP8 context an error.
        config: the TransformerConfig the model will be built from, to check it at once. Without it, kind and
            format are still checked every time Megatron asks.

    Yields:
        the `Injection`.

    Raises:
        InjectionError: Megatron-Core or Transformer Engine is missing, another injection is active, a
            Transformer Engine context is open, or `config` does not agree with the recipe. Inside, when
            Megatron enters an FP8 context of another kind or format than the recipe's.
    """
    seams = _seams()
    if config is not None:
        check_config(recipe, config)
    injection = Injection(recipe)
    _activate(injection)
    replaced: list[tuple[ModuleType, str, Any, Any]] = []
    try:
        for module, name in seams:
            original = getattr(module, name)
            ours = _replacement(injection, original)
            setattr(module, name, ours)
            replaced.append((module, name, original, ours))
        with own_recipe_answered(injection.answer_own_context):
            yield injection
    finally:
        for module, name, original, ours in reversed(replaced):
            _restore(module, name, original, ours)
        _deactivate(injection)


def _replacement(injection: Injection, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function Megatron calls instead of `original`; passes on to it once the injection is over."""

    def get_recipe(config: Any) -> Any:
        return injection.answer(config) if injection.active else original(config)

    get_recipe.__name__ = original.__name__
    get_recipe.__doc__ = f"{original.__name__} of Megatron-Core, answered by the injected recipe."
    return get_recipe


def _restore(module: ModuleType, name: str, original: Any, ours: Any) -> None:
    if getattr(module, name) is ours:
        setattr(module, name, original)
    else:
        # Theirs may call ours, which passes on to Megatron's own function from now on.
        warnings.warn(
            f"{module.__name__}.{name} was replaced by something else during injection; that was left in "
            f"place.",
            stacklevel=4,
        )


def require_no_injection(recipe: Recipe) -> None:
    """Raise `InjectionError` where another injection is in force already: `recipe` would be a second one."""
    if _ACTIVE is not None:
        raise InjectionError(
            f"The recipe '{_ACTIVE.recipe.name}' is injected already, and one injection holds for the "
            f"whole process.",
            key="fp8_recipe",
            value=recipe.name,
            hint="Leave the outer inject() first.",
        )


def _activate(injection: Injection) -> None:
    global _ACTIVE
    with _LOCK:
        require_no_injection(injection.recipe)
        if inside_autocast():
            raise InjectionError(
                "A Transformer Engine FP8 context is open: its recipe is fixed already, and amax histories "
                "are only updated when the outermost context is left.",
                hint="Call inject() outside of te.autocast().",
            )
        _ACTIVE = injection


def _deactivate(injection: Injection) -> None:
    global _ACTIVE
    with _LOCK:
        injection.active = False
        _ACTIVE = None


def _seams() -> tuple[tuple[ModuleType, str], ...]:
    """The functions to replace: (module, name), checked to be what this Megatron-Core calls."""
    try:
        from megatron.core import fp8_utils
    except CANNOT_BE_IMPORTED as error:
        raise InjectionError(
            f"inject() needs Megatron-Core, which cannot be imported: {first_line(error)}.",
            hint="Install megatron-core 0.15 or 0.16. For plain Transformer Engine modules use "
            "autocast(recipe).",
        ) from error
    if not fp8_utils.HAVE_TE:
        raise InjectionError(
            "Megatron-Core runs without Transformer Engine here: it would accept any FP8 setting and train "
            "in high precision without a word.",
            hint="Install Transformer Engine, or on a machine with no GPU start with device=emulated.",
        )
    seams: list[tuple[ModuleType, str]] = [(fp8_utils, "get_fp8_recipe")]
    try:
        from megatron.core import fp4_utils
    except ImportError:  # Megatron-Core before 0.15 has no FP4
        return tuple(seams)
    seams.append((fp4_utils, "get_fp4_recipe"))
    return tuple(seams)
