"""`Fp8RecipeCallback`: a recipe in a NeMo 2 job, for `nl.Trainer`, `llm.train` and `llm.pretrain`.

    trainer = nl.Trainer(..., plugins=precision_plugin("mxfp8"), callbacks=[Fp8RecipeCallback("mxfp8")])

When Lightning calls what, and what happens then:

    strategy.connect       the plugin and the user's own settings are checked; NeMo copies the plugin's fields
    setup                  what arrived is checked; the recipe is injected; NeMo builds the model after this
    on_fit_start           the built model is checked, telemetry attached
    load_model_state_dict  amax histories and scales of delayed scaling are restored
    on_train_start         the telemetry store forgets what a lost continuation logged
    on_train_batch_start   begin of a step
    on_train_batch_end     end of a step; after the first one the manifest is read back and written
    on_save_checkpoint     what was logged up to here is on disk too
    teardown               everything is left as it was
"""

# ruff: noqa: ARG002 -- the signatures are Lightning's

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes import recipes, telemetry
from nemo_fp8_recipes.callbacks import nemo_agreement
from nemo_fp8_recipes.callbacks.megatron_core import Fp8Run
from nemo_fp8_recipes.callbacks.nemo_delayed_state import put_back, take_out
from nemo_fp8_recipes.errors import CheckpointError, InjectionError
from nemo_fp8_recipes.targets.nemo import precision_plugin
from nemo_fp8_recipes.training.files import atomic_write_json
from nemo_fp8_recipes.training.frameworks import FRAMEWORKS
from nemo_fp8_recipes.training.metrics import MetricsLog
from nemo_fp8_recipes.training.run_directory import MANIFEST_FILE, METRICS_FILE

FRAMEWORKS["nemo"].require_installed()

from lightning.pytorch.callbacks import Callback  # noqa: E402 -- a clear error first

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

    from nemo_fp8_recipes.injection import Manifest
    from nemo_fp8_recipes.recipes import Recipe
    from nemo_fp8_recipes.telemetry.alerts.alert import Alert
    from nemo_fp8_recipes.telemetry.alerts.schema import AlertsConfig
    from nemo_fp8_recipes.telemetry.recorder import Recorder

__all__ = ["Fp8RecipeCallback", "precision_plugin"]


CHECKPOINT_KEY = "nemo_fp8_recipes"


class Fp8RecipeCallback(Callback):
    """Trains with a recipe, proves that it arrived, and logs amax, scales and histories.

    A plugin that says nothing of FP8 is given the recipe's fields; one that says FP8 must say the same.

    Args:
        fp8_recipe: a recipe's name or alias, a preset, a mapping as `recipes.load` takes it, or a recipe.
        options: options of the recipe that differ from its defaults, `{"fp8_format": "hybrid"}`.
        run_dir: where manifest.json, metrics.jsonl and telemetry/ go; None: `fp8/` in the trainer's log
            directory. Give the same one to go on after an interruption.
        telemetry: whether amax and scales are observed; manifest and checks come anyway.
        log_every: optimizer steps between two logging steps; step 1 is always one.
        sinks: where telemetry goes beside the trainer's loggers: "parquet", "tensorboard", "jsonl", ….
        loggers: whether the trainer's own loggers get the scalars too.
        history: store delayed scaling's amax history windows.
        flush_every: logging steps between two flushes.
        stats_every: optimizer steps between two logging steps that read the tensors themselves (underflow,
            saturation, SQNR, …); step 1 is one. 0: none do.
        whatif: globs over `<module>/<tensor>` that those steps judge under every other recipe too.

    Attributes:
        recipe: the recipe.
        manifest: what every module did in the first step; None before.
        run_dir: the directory in use, once the trainer has started.
        alerts: the rules that telemetry is watched by; None: those of conf/alerts/default.yaml.
        on_alert: called with the alerts of a logging step when the next step begins, on every rank.
        lost: values that a sink could not write, by its name.
        keeps_metrics: whether metrics.jsonl is written here; False where the job keeps its own.

    Raises:
        RecipeError: there is no such recipe, or it cannot take its options.
        ConfigError: NeMo 2 is not installed.
    """

    def __init__(
        self,
        fp8_recipe: str | Recipe | Mapping[str, Any] = "mxfp8",
        options: Mapping[str, Any] | None = None,
        run_dir: str | Path | None = None,
        telemetry: bool = True,
        log_every: int = 10,
        sinks: Sequence[str] = ("parquet", "tensorboard"),
        loggers: bool = True,
        history: bool = True,
        flush_every: int = 10,
        stats_every: int = 100,
        whatif: Sequence[str] = (),
    ) -> None:
        self.recipe = recipes.load(fp8_recipe, **dict(options or {}))
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self._telemetry = telemetry
        self._log_every = log_every
        self._sinks = tuple(sinks)
        self._loggers = loggers
        self._history = history
        self._flush_every = flush_every
        self._stats_every = stats_every
        self._whatif = tuple(whatif)
        self._run: Fp8Run | None = None
        self.keeps_metrics = True
        self.alerts: AlertsConfig | None = None
        self.on_alert: Callable[[tuple[Alert, ...]], None] | None = None
        self.lost: Mapping[str, int] = {}
        self._undo: list[Callable[[], None]] = []
        self._written = False
        _announce_connections()

    @property
    def manifest(self) -> Manifest | None:
        return self._manifest if self._run is None else self._run.manifest

    _manifest: Manifest | None = None

    # -- before the model is built -----------------------------------------------------------------------

    def before_connect(self, trainer: Trainer, model: LightningModule) -> None:
        """NeMo is about to copy the plugin's fields onto the configs."""
        _require_only_one(trainer)
        strategy = trainer.strategy
        dtype_config = getattr(strategy.precision_plugin, "dtype_config", None)
        nemo_agreement.check_plugin(self.recipe, dtype_config)
        config = getattr(model, "config", None)
        if config is not None:
            nemo_agreement.check_model_config(self.recipe, config)
            given = self.recipe.megatron()
            if hasattr(config, "tp_only_amax_red") and "tp_only_amax_red" in given:
                config.tp_only_amax_red = given["tp_only_amax_red"]  # no plugin carries it
        optimizer_config = getattr(getattr(model, "optim", None), "config", None)
        if optimizer_config is not None:
            nemo_agreement.check_model_config(self.recipe, optimizer_config, called="optimizer config")
        nemo_agreement.set_plugin(self.recipe, dtype_config)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what NeMo copied and inject the recipe; the model is built after this."""
        if getattr(pl_module, "module", None) is not None:
            raise InjectionError(
                "The model was built before Fp8RecipeCallback could inject the recipe.",
                key="callbacks",
                hint="Let the trainer build it: do not call configure_model() yourself, and give every fit() "
                "a new model.",
            )
        strategy = trainer.strategy
        config = pl_module.config
        optimizer_config = getattr(getattr(pl_module, "optim", None), "config", None)
        run = Fp8Run(self.recipe, telemetry=self._attach(trainer) if stage == "fit" else None)
        nemo_agreement.check_after_copy(self.recipe, config)
        if optimizer_config is not None:
            nemo_agreement.follow_copy(optimizer_config)
        run.check(config, optimizer_config=optimizer_config, ddp_config=getattr(strategy, "ddp_config", None))
        if self.run_dir is None:
            self.run_dir = Path(trainer.log_dir or trainer.default_root_dir) / "fp8"
        run.__enter__()
        self._run = run
        self._written = False
        self._restore_histories_when_loading(strategy)

    def _attach(self, trainer: Trainer) -> Callable[[Any], Recorder] | None:
        if not self._telemetry:
            return None

        def attach(model: Any) -> Recorder:
            from nemo_fp8_recipes import emulation

            assert self.run_dir is not None
            return telemetry.attach(
                model,
                self.recipe,
                directory=self.run_dir,
                log_every=self._log_every,
                sinks=(*self._sinks, *(trainer.loggers if self._loggers else ())),
                history=self._history,
                flush_every=self._flush_every,
                device=emulation.label(),
                alerts=self.alerts,
                on_alert=self.on_alert,
                stats_every=self._stats_every,
                whatif=self._whatif,
            )

        return attach

    def _restore_histories_when_loading(self, strategy: Any) -> None:
        """Put ourselves between a checkpoint and the model: see `nemo_delayed_state`."""
        load = strategy.load_model_state_dict

        @functools.wraps(load)
        def load_with_histories(checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            state = checkpoint.get("state_dict", checkpoint)
            chunks = list(strategy.megatron_parallel)
            parts = [state] if len(chunks) == 1 else [state[f"model_{i}"] for i in range(len(chunks))]
            taken = [take_out(part) for part in parts]
            # Before the weights: loading FP8 weights quantises, with the scales that must be in place by
            # then. And after them: that has added to the live amax.
            self._put_back(chunks, taken)
            result = load(checkpoint, *args, **kwargs)
            self._put_back(chunks, taken)
            return result

        strategy.load_model_state_dict = load_with_histories
        self._undo.append(lambda: strategy.__dict__.pop("load_model_state_dict", None))

    def _put_back(self, chunks: Sequence[nn.Module], taken: Sequence[Mapping[str, Any]]) -> None:
        for chunk, state in zip(chunks, taken, strict=True):
            if state and self.recipe.name == "delayed":
                put_back(chunk, self.recipe, state)

    # -- the steps ---------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is built and wrapped: check it, attach telemetry."""
        self._entered().model_built(list(trainer.strategy.megatron_parallel))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A checkpoint, if any, is loaded: forget what was logged after it."""
        step = int(trainer.global_step)
        recorder = self._entered().recorder
        if recorder is not None and step:
            recorder.truncate_after(step)  # type: ignore[attr-defined]  # ours is telemetry's own
        if trainer.is_global_zero and self.run_dir is not None and self.keeps_metrics:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            MetricsLog(self.run_dir / METRICS_FILE).truncate_after(step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """NeMo runs all micro-batches of an optimizer step in one batch of Lightning's."""
        self._entered().begin_step(int(trainer.global_step) + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The optimizer has stepped."""
        run = self._entered()
        step = int(trainer.global_step)
        logs = self.keeps_metrics and (step == 1 or step % self._log_every == 0)
        metrics = self._metrics(trainer) if logs else {}
        run.end_step(step, metrics)
        if not trainer.is_global_zero or self.run_dir is None:
            return
        if metrics:
            MetricsLog(self.run_dir / METRICS_FILE).append({"step": step, **metrics})
        if not self._written and run.manifest is not None:
            atomic_write_json(self.run_dir / MANIFEST_FILE, run.manifest.to_dict())
            self._written = True

    @staticmethod
    def _metrics(trainer: Trainer) -> dict[str, float]:
        """Host numbers of this step. Only on logging steps: reading a loss waits for the device."""
        found = trainer.callback_metrics
        metrics = {}
        for ours, theirs in (("loss", "reduced_train_loss"), ("grad_norm", "grad_norm")):
            if theirs in found:
                metrics[ours] = float(found[theirs])
        for optimizer in trainer.strategy.optimizers:
            metrics["learning_rate"] = float(optimizer.param_groups[0]["lr"])
        return metrics

    # -- checkpoints -------------------------------------------------------------------------------------

    # Not state_dict: Lightning refuses two callbacks that have one before we can say why there must be one.

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The checkpoint names its recipe, and what was logged up to it is readable when it is."""
        checkpoint[CHECKPOINT_KEY] = {"fp8_recipe": self.recipe.to_dict()}
        if self._run is not None and self._run.recorder is not None:
            self._run.recorder.flush()  # type: ignore[attr-defined]  # ours is telemetry's own

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to go on with another recipe than the one the checkpoint was trained with."""
        if CHECKPOINT_KEY not in checkpoint:
            return  # saved without us: there is nothing to compare with
        saved = recipes.load(checkpoint[CHECKPOINT_KEY]["fp8_recipe"])
        if saved == self.recipe:
            return
        before, now = saved.to_dict(), self.recipe.to_dict()
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        raise CheckpointError(
            f"The checkpoint was trained with fp8_recipe={saved.name}, this run has {self.recipe.name}; they "
            f"differ in {key}: {before.get(key)} and {now.get(key)}.",
            key="fp8_recipe" if key == "name" else f"fp8_recipe.{key}",
            value=now.get(key),
            allowed=[before.get(key)],
            hint="Resume with the recipe of the checkpoint. To change it on purpose, start from the weights: "
            "AutoResume(restore_config=RestoreConfig(path)).",
        )

    # -- the end -----------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no teardown then."""
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        while self._undo:
            self._undo.pop()()
        if self._run is not None:
            self._manifest = self._run.manifest
            run, self._run = self._run, None
            run.__exit__(None, None, None)
            if run.recorder is not None:
                self.lost = dict(run.recorder.lost)  # type: ignore[attr-defined]  # ours is telemetry's own

    def _entered(self) -> Fp8Run:
        if self._run is None:
            raise InjectionError(
                "Fp8RecipeCallback was added after the trainer had set up: the recipe was not injected.",
                key="callbacks",
                hint="Give it to nl.Trainer(callbacks=[...]).",
            )
        return self._run


def _require_only_one(trainer: Trainer) -> None:
    ours = [callback for callback in trainer.callbacks if isinstance(callback, Fp8RecipeCallback)]
    if len(ours) > 1:
        named = ", ".join(callback.recipe.name for callback in ours)
        raise InjectionError(
            f"The trainer has {len(ours)} Fp8RecipeCallbacks ({named}), and a job has one recipe.",
            key="callbacks",
            value=named,
            allowed=["one Fp8RecipeCallback"],
        )


def _announce_connections() -> None:
    """Have `MegatronStrategy.connect` tell our callbacks before it copies.

    Lightning has no hook there, and afterwards nobody can see what the user had said: the copy goes over it.
    Without one of our callbacks in the trainer the method does what it always did.
    """
    from nemo.lightning.pytorch.strategies import MegatronStrategy

    original = MegatronStrategy.connect
    if getattr(original, "announces", False):
        return

    @functools.wraps(original)
    def connect(self: Any, model: LightningModule) -> Any:
        trainer = getattr(model, "_trainer", None)
        for callback in getattr(trainer, "callbacks", ()):
            if isinstance(callback, Fp8RecipeCallback):
                callback.before_connect(trainer, model)
        return original(self, model)

    connect.announces = True  # type: ignore[attr-defined]  # a mark on our own function
    MegatronStrategy.connect = connect
