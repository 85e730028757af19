"""`Fp8Run`: a recipe in a Megatron-Core training loop, from before the model is built to the last step.

with Fp8Run(recipe, telemetry=lambda model: telemetry.attach(model, recipe, ...)) as run:
    run.check(config, optimizer_config=..., ddp_config=...)
    model = build_model(config)
    run.model_built(model)
    for step in range(1, steps + 1):
        run.begin_step(step)
        ...                      # forward, backward, optimizer
        run.end_step(step, {"loss": loss})
    run.manifest
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nemo_fp8_recipes import emulation, preflight
from nemo_fp8_recipes.errors import Fp8Error, InjectionError
from nemo_fp8_recipes.injection import (
    Injection,
    Manifest,
    assign_module_recipes,
    check_config,
    check_model,
    check_switchable,
    frozen_delayed_modules,
    gather,
    inject,
    manifest,
    megatrons_module_recipes,
    require_quantized,
    set_fields,
    switch,
)
from nemo_fp8_recipes.injection.module_names import model_chunks
from nemo_fp8_recipes.recipes.modules import ModuleRecipe
from nemo_fp8_recipes.recipes.schedule import Schedule

if TYPE_CHECKING:
    from torch import nn

    from nemo_fp8_recipes.recipes import Recipe

    Model = nn.Module | Sequence[nn.Module]

__all__ = ["Fp8Run", "StepRecorder"]

T = TypeVar("T")


class StepRecorder(Protocol):
    """What is told about every step: `telemetry.Recorder` is one.

    Attributes:
        quantises: set before every `end_step`: whether the recipe of that step quantises anything.
    """

    quantises: bool

    def begin_step(self, step: int) -> None: ...

    def end_step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Fp8Run:
    """Puts a recipe into a training job, proves that it arrived, and reports every step to telemetry.

    Args:
        recipe: what to train with; "bf16" runs through the same code and proves that nothing is quantised.
        telemetry: attaches telemetry to the built model and returns its recorder, which is closed when the
            run is left; None for no telemetry.
        schedule: steps in which other recipes take `recipe`'s place, which must be its main one; None: none.
        modules: single modules that train with another recipe than `recipe`.
        injecting: False where Megatron makes the recipe object itself and the run only proves what it did.

    Attributes:
        recipe: the recipe in force.
        injection: what Megatron is given, while the run is entered.
        manifest: what every module was last found doing: of the whole job on rank 0, of this rank elsewhere.
        proven_at: the step after which the manifest was read: the first one, and the first one after every
            change of the recipe.
        recorder: the telemetry recorder, once the model is built.
    """

    def __init__(
        self,
        recipe: Recipe,
        telemetry: Callable[[Model], StepRecorder] | None = None,
        *,
        schedule: Schedule | None = None,
        modules: Sequence[ModuleRecipe] = (),
        injecting: bool = True,
    ) -> None:
        if schedule is not None and schedule.main != recipe:
            raise InjectionError(
                f"The schedule is one of '{schedule.main.name}' and the run's recipe '{recipe.name}'.",
                key="fp8_recipe",
                value=recipe.name,
                allowed=[schedule.main.name],
            )
        self.recipe = recipe
        self.schedule = schedule if schedule is not None else Schedule(recipe)
        self.modules = tuple(modules)
        self.proven_at: int | None = None
        self._scheduled = recipe
        self.injection: Injection | None = None
        self.manifest: Manifest | None = None
        self.recorder: StepRecorder | None = None
        self._telemetry = telemetry
        self._model: Model | None = None
        self._exit = ExitStack()
        self._injecting = injecting
        self._entered = False

    def __enter__(self) -> Fp8Run:
        if self._injecting:
            self.injection = self._exit.enter_context(inject(self.recipe))
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.injection = None
        self._entered = False
        self._model = None
        self._exit.__exit__(kind, error, trace)

    def check(self, config: Any, *, optimizer_config: Any = None, ddp_config: Any = None) -> None:
        """Check Megatron's configs before the model is built.

        Raises:
            InjectionError: they do not say what the recipe says, or combine it with something that breaks it.
            PreflightError: the job would fail for another reason that preflight knows.
        """
        check_config(self.recipe, config)
        if self.schedule.spans:
            check_switchable(config, self.schedule.recipes())
        fp8_param = bool(getattr(self.recipe, "fp8_param", False))
        copied = getattr(optimizer_config, "fp8_recipe", None)
        expected = self.recipe.megatron().get("fp8_recipe")
        if optimizer_config is not None and (copied is not None or fp8_param) and copied != expected:
            raise InjectionError(
                f"Megatron's OptimizerConfig holds its own fp8_recipe={copied} while the recipe is "
                f"'{expected}'.",
                key="optimizer.fp8_recipe",
                value=copied,
                allowed=[expected],
            )
        gathered = getattr(ddp_config, "fp8_param_gather", fp8_param)
        if ddp_config is not None and gathered != fp8_param:
            raise InjectionError(
                f"Megatron's DistributedDataParallelConfig says fp8_param_gather={gathered} while the recipe "
                f"says fp8_param={fp8_param}.",
                key="ddp.fp8_param_gather",
                value=gathered,
                allowed=[fp8_param],
            )
        for recipe in self.schedule.recipes():
            preflight.require(
                preflight.check_megatron(
                    recipe,
                    config,
                    ddp=ddp_config,
                    optimizer=optimizer_config,
                    emulated=emulation.active() is not None,
                    scheduled=bool(self.schedule.spans),
                )
            )

    def model_built(
        self,
        model: Model,
        *,
        steps_done: int = 0,
        telemetry: Callable[[Model], StepRecorder] | None = None,
    ) -> None:
        """Check the model, before its first step, and attach telemetry to it.

        Args:
            model: the model, wrapped or not, or Megatron's list of virtual-pipeline chunks.
            steps_done: the optimizer steps behind the checkpoint that the model was loaded from.
            telemetry: as in the constructor, where it is only known now.

        Raises:
            InjectionError: a recipe of the run cannot run in this model.
        """
        self._require_entered()
        for recipe in self.schedule.recipes():
            check_model(model, recipe)
        assign_module_recipes(model, self.recipe, self.modules)
        self._model = model
        if steps_done and (saved_with := self.schedule.at(steps_done)) != self.recipe:
            # The scaling state that came with the checkpoint is of this recipe: nothing is reset.
            set_fields(model, saved_with)
            self._require_injection().use(saved_with)
            self.recipe = self._scheduled = saved_with
        attach = telemetry or self._telemetry
        if attach is not None:
            self.recorder = attach(model)
            self._exit.callback(self.recorder.close)

    def begin_step(self, step: int) -> None:
        """Call before the forward pass of a step; steps count from 1. Changes the recipe where the schedule
        says so.
        """
        self._require_entered()
        if (scheduled := self.schedule.at(step)) != self._scheduled:
            if scheduled != self.recipe:
                self.switch(scheduled)
            self._scheduled = scheduled
        if self.recorder is not None:
            self.recorder.begin_step(step)

    def switch(self, recipe: Recipe) -> None:
        """Train with another recipe from the next step on; the manifest is read anew after it.

        Call it between steps, on every rank. A schedule changes it again only where its own recipe changes.

        Raises:
            InjectionError: the model is tied to the recipe that it was built with, or cannot run with this
            one. Nothing has changed then.
            PreflightError: the job would fail with this recipe for another reason that preflight knows.
        """
        injection = self._require_injection()
        if self._model is None:
            raise InjectionError("Fp8Run.model_built(model) must be called before the recipe can change.")
        if recipe.name == "delayed" != self.schedule.main.name:
            # Megatron builds layers for every other recipe with save_original_input, and Transformer Engine
            # refuses delayed scaling there (transformer_engine/pytorch/module/linear.py).
            raise InjectionError(
                f"The recipe can change to delayed only where the model was built for it, and this one was "
                f"built for {self.schedule.main.name}.",
                key="fp8_recipe",
                value=recipe.name,
                allowed=["a recipe other than delayed"],
            )
        for chunk in model_chunks(self._model):
            if hasattr(chunk, "config"):
                check_switchable(chunk.config, (recipe,))
                preflight.require(
                    preflight.check_megatron(
                        recipe, chunk.config, emulated=emulation.active() is not None, scheduled=True
                    )
                )
        check_model(self._model, recipe)
        switch(injection, self._model, recipe)
        self.recipe = recipe
        self.proven_at = None

    def end_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Call after the optimizer's step, on every rank: after the first step with a recipe the manifest is
        gathered.

        Raises:
            InjectionError: after that step, on every rank: the model does not do what the recipe says.
        """
        self._require_entered()
        if self.proven_at is None:
            self._prove()
            self.proven_at = step
        if self.recorder is not None:
            self.recorder.quantises = self.recipe.precision != "bf16"
            self.recorder.end_step(step, metrics)

    def _prove(self) -> None:
        if self._model is None:
            raise InjectionError("Fp8Run.model_built(model) must be called before the first step.")
        frozen = frozen_delayed_modules(self._model) if self.recipe.name == "delayed" else ()
        found = manifest(self._model, self.recipe)
        problem: str | None = None
        if frozen:
            problem = (
                f"Delayed scaling is frozen in {frozen[0]}: Transformer Engine never updates its amax "
                f"history. Call reset_quantization_state(model) when a model returns to delayed scaling."
            )
        merged: Manifest | None = None
        megatrons: dict[str, str] = {}
        for part in _of_all_ranks(megatrons_module_recipes(self._model)):
            megatrons.update(part)
        try:
            merged = gather(found)
            if merged is not None:
                require_quantized(
                    merged,
                    self.recipe,
                    modules=self.modules,
                    megatrons=megatrons,
                )
        except Fp8Error as error:
            problem = problem or str(error)
        problem = _first_problem(problem)
        if problem is not None:
            raise InjectionError(problem, key="fp8_recipe", value=self.recipe.name)
        self.manifest = found if merged is None else merged

    def _require_entered(self) -> None:
        if not self._entered:
            raise InjectionError("Fp8Run is a context manager: use it as `with Fp8Run(recipe) as run:`.")

    def _require_injection(self) -> Injection:
        self._require_entered()
        if self.injection is None:
            raise InjectionError(
                "The recipe cannot change in a run that injects none.",
                key="fp8_recipe",
                value=self.recipe.name,
            )
        return self.injection


def _first_problem(problem: str | None) -> str | None:
    """The problem of the lowest rank that has one, on every rank: all stop together, none waits for the
    others.
    """
    return next((found for found in _of_all_ranks(problem) if found is not None), None)


def _of_all_ranks(mine: T) -> list[T]:
    """What each rank has, in their order. Collective."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
