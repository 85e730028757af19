"""The callback for Bridge's `pretrain(…, callbacks=[…])`: proof, manifest, telemetry, resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext

from nemo_fp8_recipes import recipes, telemetry
from nemo_fp8_recipes.callbacks.bridge import active
from nemo_fp8_recipes.callbacks.bridge.loggers import BridgeLoggers
from nemo_fp8_recipes.callbacks.bridge.mixed_precision import Fp8MixedPrecision
from nemo_fp8_recipes.callbacks.bridge.way_in import BridgeRun
from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection import Manifest
from nemo_fp8_recipes.recipes import Recipe
from nemo_fp8_recipes.targets.bridge import PREFIX
from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from nemo_fp8_recipes.telemetry.alerts.schema import AlertsConfig
from nemo_fp8_recipes.telemetry.recorder import Recorder
from nemo_fp8_recipes.training.files import atomic_write_json

__all__ = ["Fp8Callback"]

_USER_STATE = "nemo_fp8_recipes"


class Fp8Callback(Callback):
    """Proves after the first step that the recipe arrived, writes the manifest, and logs telemetry.

    The recipe itself comes with `cfg.mixed_precision`; give it here only to have the two compared.

    Args:
        directory: where `manifest.json` and the telemetry store go.
        recipe: the recipe that `cfg.mixed_precision` must bring; None: whichever it brings.
        log_every: optimizer steps between two logging steps; step 1 is always one.
        sinks: any of "parquet", "tensorboard", "jsonl", below `directory`; none: no store. Bridge's own
            loggers are written to wherever they are configured.
        history: store delayed scaling's amax history windows.
        flush_every: logging steps between two flushes.
        device: what the records say of the device; None asks.
        stats_every: optimizer steps between two logging steps that read the tensors themselves (underflow,
            saturation, SQNR, …); step 1 is one. 0: none do.
        whatif: globs over `<module>/<tensor>` that those steps judge under every other recipe too.
        alerts: the rules that telemetry is watched by; None: those of conf/alerts/default.yaml.
        on_alert: called with the alerts of a logging step when the next step begins, on every rank.
        enabled: False proves and writes the manifest, and observes nothing.

    Attributes:
        manifest: after the first step, what every module does: of the whole job on rank 0, of this rank
            elsewhere.
        way: how the recipe got into Megatron, "config" or "get_fp8_recipe"; None before the training starts.
        recorder: the telemetry recorder, while training.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        recipe: str | Recipe | None = None,
        log_every: int = 10,
        sinks: Sequence[str] = ("parquet",),
        history: bool = True,
        flush_every: int = 10,
        device: str | None = None,
        stats_every: int = 100,
        whatif: Sequence[str] = (),
        alerts: AlertsConfig | None = None,
        on_alert: Callable[[tuple[Alert, ...]], None] | None = None,
        enabled: bool = True,
    ) -> None:
        self.directory = Path(directory)
        self.recipe = None if recipe is None else recipes.load(recipe)
        self.manifest: Manifest | None = None
        self.way: str | None = None
        self.recorder: Recorder | None = None
        self._options = {
            "log_every": log_every,
            "sinks": tuple(sinks),
            "history": history,
            "flush_every": flush_every,
            "device": device,
            "stats_every": stats_every,
            "whatif": tuple(whatif),
            "alerts": alerts,
            "on_alert": on_alert,
        }
        self._enabled = enabled
        self._last_event = "on_train_end"

    def on_train_start(self, context: CallbackContext) -> None:
        """The model is built and its checkpoint loaded.

        Raises:
            InjectionError: no recipe of ours was in force when the model was built, another one than this
                callback's, or one that cannot run in this model.
        """
        if context.user_state.setdefault(_USER_STATE, self) is not self:
            raise InjectionError(
                "Two Fp8Callbacks are registered, and a run has one recipe.", hint="Register one of them."
            )
        run = self._require_run(context)
        state = context.state
        self.way = run.way
        self._last_event = _last_event(state.train_state)
        attach = self._attach(run.recipe, state) if self._enabled else None
        run.model_built(context.model, telemetry=attach)
        if self.recorder is not None and state.train_state.step:
            self.recorder.truncate_after(state.train_state.step)

    def on_train_step_start(self, context: CallbackContext) -> None:
        self._run.begin_step(context.state.train_state.step + 1)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Raises `InjectionError` after the first step where the model does not do what the recipe says."""
        step = context.state.train_state.step + 1  # Bridge counts it after this event
        first = self.manifest is None
        metrics = self._metrics(context, step) if self.recorder is not None else {}
        self._run.end_step(step, metrics)
        if first:
            self.manifest = self._run.manifest
            self._write_manifest()

    def on_checkpoint_save(self, _context: CallbackContext) -> None:
        if self.recorder is not None:
            self.recorder.flush()

    def on_train_end(self, _context: CallbackContext) -> None:
        # After it the model only runs forward, and what that shows is not of any training step.
        if self.recorder is not None:
            self.recorder.close()
        self._ended("on_train_end")

    def on_eval_end(self, _context: CallbackContext) -> None:
        self._ended("on_eval_end")

    def on_test_end(self, _context: CallbackContext) -> None:
        self._ended("on_test_end")

    # ----------------------------------------------------------------------------------------------------

    @property
    def _run(self) -> BridgeRun:
        run = active.current()
        if run is None:
            raise InjectionError("The run of this callback has ended; give every pretrain() a new one.")
        return run

    def _require_run(self, context: CallbackContext) -> BridgeRun:
        """The run that `mixed_precision` began before the model was built."""
        configured = context.state.cfg.mixed_precision
        run = active.current()
        if run is None or not isinstance(configured, Fp8MixedPrecision):
            name = self.recipe.name if self.recipe is not None else "<recipe>"
            raise InjectionError(
                "The model was built before a recipe could be injected: cfg.mixed_precision is "
                f"{_named(configured)}, which is none of ours.",
                key="mixed_precision",
                value=_named(configured),
                hint=f"Set mixed_precision={PREFIX}{name}.",
            )
        if self.recipe is not None and self.recipe != run.recipe:
            raise InjectionError(
                f"The recipe is given twice: mixed_precision brings {run.recipe}, "
                f"the callback {self.recipe}.",
                key="mixed_precision",
                value=run.recipe.name,
                allowed=[self.recipe.name],
                hint="Leave it out of Fp8Callback(…).",
            )
        return run

    def _attach(self, recipe: Recipe, state: Any) -> Callable[[Any], Recorder]:
        def attach(model: Any) -> Recorder:
            loggers = BridgeLoggers(state)
            self.recorder = telemetry.attach(
                model,
                recipe,
                directory=self.directory,
                more_sinks=[loggers] if loggers else [],
                **self._options,  # type: ignore[arg-type]  # the constructor's, by their names
            )
            return self.recorder

        return attach

    def _metrics(self, context: CallbackContext, step: int) -> dict[str, float]:
        """Loss and gradient norm of a logging step: in every other one they stay on the device."""
        if self.recorder is None or not self.recorder.logs(step):
            return {}
        return train_metrics(context)

    def _write_manifest(self) -> None:
        import torch.distributed as dist

        if dist.get_rank() == 0 and self.manifest is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            atomic_write_json(
                self.directory / "manifest.json", {**self.manifest.to_dict(), "way_in": self.way}
            )

    def _ended(self, event: str) -> None:
        """`pretrain()` may evaluate after the training: the recipe is in force until its last event."""
        if event == self._last_event and (event == "on_train_end" or self._training_over):
            active.end()
        self._training_over = event == "on_train_end" or self._training_over

    _training_over = False


def train_metrics(context: CallbackContext) -> dict[str, float]:
    """Loss and gradient norm of the step that has just ended, as host numbers.

    Only the last pipeline stage has a loss. Waits for the device.
    """
    metrics: dict[str, float] = {}
    for name, value in (context.loss_dict or {}).items():
        numbers = value.detach().float().flatten().tolist()
        # [sum, count] where the loss is averaged over tokens later, else the mean.
        metrics["loss" if name == "lm loss" else name] = (
            numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0]
        )
    if context.grad_norm is not None:
        metrics["grad_norm"] = float(context.grad_norm)
    return metrics


def _last_event(train_state: Any) -> str:
    """The event after which `pretrain()` runs the model no more."""
    if train_state.do_test:
        return "on_test_end"
    return "on_eval_end" if train_state.do_valid else "on_train_end"


def _named(mixed_precision: Any) -> str:
    return mixed_precision if isinstance(mixed_precision, str) else type(mixed_precision).__name__
