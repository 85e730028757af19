"""When a recipe holds: spans of optimizer steps in which another one takes its place.

`recipe_schedule=[{recipe: bf16, to_step: 500}, {recipe: bf16, from_step: 85%}]` trains 500 steps in BF16,
then with `fp8_recipe`, and the last 15 % in BF16 again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.recipes.base import Recipe
from nemo_fp8_recipes.recipes.registry import load, load_at

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["KEY", "Schedule", "Span", "SpanConfig", "read_schedule", "schedule_of"]

KEY = "recipe_schedule"
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class SpanConfig:
    """One entry of `recipe_schedule` as it is written.

    `from_step` is the first step of the span and `to_step` its last one, counted from 1. As percentages of
    training.steps, `to_step: 10%` and `from_step: 10%` meet: the second starts one step after the first ends.
    Left out, the span reaches to the first or last step of the job.
    """

    recipe: Any
    """A name, or a mapping with `name` and options."""
    from_step: int | str | None = None
    to_step: int | str | None = None


@dataclass(frozen=True)
class Span:
    """Steps `first` to `last`, both included, counted from 1, with their recipe."""

    recipe: Recipe
    first: int
    last: int


@dataclass(frozen=True)
class Schedule:
    """Which recipe each optimizer step trains with.

    Attributes:
        main: the recipe of every step that no span covers.
        spans: ascending and disjoint.
    """

    main: Recipe
    spans: tuple[Span, ...] = field(default=())

    def __post_init__(self) -> None:
        for before, after in zip(self.spans, self.spans[1:], strict=False):
            if after.first <= before.last:
                raise RecipeError(
                    f"{KEY} names two recipes for step {after.first}: {before.recipe.name} for steps "
                    f"{before.first} to {before.last} and {after.recipe.name} for steps {after.first} to "
                    f"{after.last}.",
                    key=KEY,
                )
        if self.spans and self.main.precision == "bf16":
            raise RecipeError(
                f"{KEY} needs a quantised fp8_recipe, which the model is built for: BF16 is for its spans.",
                key="fp8_recipe",
                value=self.main.name,
                hint="Give the quantised recipe as fp8_recipe, and the steps in BF16 as spans.",
            )
        if self.main.name != "delayed" and any(span.recipe.name == "delayed" for span in self.spans):
            # Megatron builds layers for every other recipe with save_original_input, and TE refuses delayed
            # scaling there (transformer_engine/pytorch/module/linear.py).
            raise RecipeError(
                f"{KEY} can return to delayed scaling only where the model is built for it: fp8_recipe is "
                f"{self.main.name}.",
                key="fp8_recipe",
                value=self.main.name,
                allowed=["delayed"],
                hint="Give delayed as fp8_recipe, and the steps of the other recipe as spans.",
            )
        if self.spans and getattr(self.main, "fp8_param", False):
            raise RecipeError(
                f"{KEY} cannot change the recipe of weights that are stored quantised.",
                key="fp8_recipe.fp8_param",
                value=True,
                allowed=[False],
            )

    def at(self, step: int) -> Recipe:
        """The recipe of optimizer step `step`, counted from 1."""
        return next((span.recipe for span in self.spans if span.first <= step <= span.last), self.main)

    def recipes(self) -> tuple[Recipe, ...]:
        """Every recipe that is trained with, `main` first, each once."""
        return tuple(dict.fromkeys((self.main, *(span.recipe for span in self.spans))))

    def __str__(self) -> str:
        if not self.spans:
            return self.main.name
        spans = ", ".join(f"{span.recipe.name} in steps {span.first} to {span.last}" for span in self.spans)
        return f"{self.main.name}; {spans}"


def read_schedule(entries: Sequence[SpanConfig | Mapping[str, Any]], main: Recipe, steps: int) -> Schedule:
    """The schedule of a job of `steps` optimizer steps.

    Raises:
        RecipeError: a recipe that does not exist, weights stored quantised, steps outside the job, or two
            recipes for one step.
    """
    spans = []
    for index, entry in enumerate(entries):
        written = entry if isinstance(entry, SpanConfig) else SpanConfig(**entry)
        spans.append(_span(written, f"{KEY}[{index}]", steps))
    return Schedule(main, tuple(sorted(spans, key=lambda span: span.first)))


def schedule_of(config: DictConfig) -> Schedule:
    """The schedule of a composed configuration: its `fp8_recipe`, `recipe_schedule` and `training.steps`.

    Raises:
        RecipeError: as `read_schedule`.
    """
    from omegaconf import OmegaConf

    spans: Any = OmegaConf.to_container(config.recipe_schedule, resolve=True)
    return read_schedule(spans, load(config.fp8_recipe), int(config.training.steps))


def _span(written: SpanConfig, key: str, steps: int) -> Span:
    recipe = load_at(f"{key}.recipe", written.recipe)
    if getattr(recipe, "fp8_param", False):
        raise RecipeError(
            f"{key} stores weights quantised, which is decided once, when the model is built.",
            key=f"{key}.recipe.fp8_param",
            value=True,
            allowed=[False],
        )
    if written.from_step is None and written.to_step is None:
        raise RecipeError(
            f"{key} says neither from_step nor to_step: a recipe for every step is fp8_recipe={recipe.name}.",
            key=key,
        )
    first = 1 if written.from_step is None else _step(written.from_step, f"{key}.from_step", steps, after=1)
    last = steps if written.to_step is None else _step(written.to_step, f"{key}.to_step", steps, after=0)
    if not 1 <= first <= last <= steps:
        raise RecipeError(
            f"{key} covers steps {first} to {last} of a job of training.steps={steps}.",
            key=key,
            allowed=[f"1 <= from_step <= to_step <= {steps}"],
        )
    return Span(recipe, first, last)


def _step(value: int | str, key: str, steps: int, *, after: int) -> int:
    """A step as a number; `after` is added to a share of the job, which names the step before a border."""
    if isinstance(value, int):
        return value
    found = _PERCENT.fullmatch(value.strip())
    if found is None or not 0 <= (percent := Fraction(found.group(1))) <= 100:
        raise RecipeError(
            f"{key}={value} is neither a step nor a share of training.steps.",
            key=key,
            value=value,
            allowed=["a step, counted from 1", "a percentage such as 85%"],
        )
    return int(steps * percent / 100) + after
