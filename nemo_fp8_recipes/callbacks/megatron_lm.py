"""The hook for Megatron-LM's training scripts: two lines before `pretrain(...)`.

    from nemo_fp8_recipes.callbacks import megatron_lm
    megatron_lm.install()

It takes the recipe from the environment that `nemo-fp8 args` writes, checks Megatron's arguments against it,
injects the recipe object (with `--fp8-recipe custom` our quantizer factory makes the quantizers, and nothing
is injected), proves on the built model what each module does, and logs telemetry into a run directory that
`nemo-fp8 report` reads.

Megatron-LM has no callbacks. `megatron.training.training` calls three functions of its own by name, and the
hook stands around them: `setup_model_and_optimizer`, `train_step` and `train`.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes import emulation, preflight, telemetry
from nemo_fp8_recipes.callbacks.megatron_core import Fp8Run
from nemo_fp8_recipes.errors import ConfigError, InjectionError
from nemo_fp8_recipes.injection import check_config
from nemo_fp8_recipes.targets import megatron_lm as target
from nemo_fp8_recipes.telemetry.alerts.schema import AlertsConfig, default_alerts
from nemo_fp8_recipes.telemetry.schema import TelemetryConfig

if TYPE_CHECKING:
    from nemo_fp8_recipes.recipes import Recipe
    from nemo_fp8_recipes.telemetry.alerts.alert import Alert
    from nemo_fp8_recipes.telemetry.recorder import Recorder
    from nemo_fp8_recipes.training.run_directory import RunDirectory

__all__ = ["Hook", "install"]

TRAINING = "megatron.training.training"
LOSS = "lm loss"


def install(
    *,
    directory: str | Path | None = None,
    log_every: int = 10,
    sinks: Iterable[str] = ("parquet", "tensorboard"),
    stats_every: int = 100,
    whatif: Iterable[str] = (),
    history: bool = True,
    flush_every: int = 10,
    alerts: AlertsConfig | Mapping[str, Any] | None = None,
    on_alert: Callable[[tuple[Alert, ...]], None] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Hook:
    """Put the hook around Megatron-LM's training functions. Call it on every rank, before `pretrain(...)`.

    Args:
        directory: where telemetry and manifest go; None: `fp8` in the directory of `--save`, without that in
            the one of `--tensorboard-dir`. A job that resumes goes on in it.
        log_every: optimizer steps between two logging steps.
        sinks: any of "parquet", "tensorboard", "jsonl", "wandb".
        stats_every: optimizer steps between two logging steps that read the tensors themselves (underflow,
            saturation, SQNR, …); step 1 is one. 0: none do.
        whatif: globs over `<module>/<tensor>` that those steps judge under every other recipe too.
        history: store delayed scaling's amax history windows.
        flush_every: logging steps between two flushes.
        alerts: the rules that telemetry is watched by: an AlertsConfig, or what differs from
            conf/alerts/default.yaml, `{"underflow": {"limit": 0.2}}` or `{"enabled": False}`.
        on_alert: called with the alerts of a logging step when the next step begins, on every rank with the
            same ones.
        environ: names the recipe: NEMO_FP8_RECIPE, as `nemo-fp8 args` writes it.

    Raises:
        RecipeError: the environment names no recipe.
        InjectionError: Megatron-LM is not importable, or not one that this hook knows; the hook is there
        already.
        ConfigError: no such sink or rule, or an interval out of range.
    """
    logging = {
        "log_every": log_every,
        "sinks": tuple(sinks),
        "stats_every": stats_every,
        "whatif": tuple(whatif),
        "history": history,
        "flush_every": flush_every,
        "alerts": _rules(alerts),
        "on_alert": on_alert,
    }
    TelemetryConfig(
        log_every=log_every,
        stats_every=stats_every,
        whatif=list(whatif),
        sinks=list(sinks),
        flush_every=flush_every,
    )
    hook = Hook(target.read(environ), directory, logging)
    hook.put(_training_module())
    return hook


class Hook:
    """Stands around Megatron-LM's training functions.

    Args:
        recipe: what the job trains with.
        directory: as `install` takes it.
        logging: what `telemetry.attach` is told beside model, recipe, directory and device.

    Attributes:
        recipe: what the job trains with.
        run: injection, manifest and telemetry, from before the model is built to the last step.
    """

    def __init__(
        self, recipe: Recipe, directory: str | Path | None, logging: Mapping[str, Any] | None = None
    ) -> None:
        self.recipe = recipe
        self.run: Fp8Run | None = None
        self._directory = directory
        self._logging = dict(logging or {})
        self._run_dir: RunDirectory | None = None  # on rank 0
        self._step = 0
        self._replaced: list[tuple[Any, str, Any]] = []

    # -- installing --------------------------------------------------------------------------------------

    def put(self, training: Any) -> None:
        """Replace the functions of `training`, Megatron-LM's module."""
        around = {
            "setup_model_and_optimizer": self._setup,
            "train_step": self._train_step,
            "train": self._train,
        }
        missing = [name for name in ("get_args", *around) if not callable(getattr(training, name, None))]
        if missing:
            raise InjectionError(
                f"{training.__name__} has no {', '.join(missing)}: this is no Megatron-LM that the hook "
                f"knows."
            )
        if any(getattr(getattr(training, name), "_nemo_fp8_hook", False) for name in around):
            raise InjectionError("The hook is installed already.", hint="Call megatron_lm.install() once.")
        self._get_args = training.get_args
        for name, wrapper in around.items():
            original = getattr(training, name)
            replacement = functools.wraps(original)(functools.partial(wrapper, original))
            replacement._nemo_fp8_hook = True  # type: ignore[attr-defined]  # a second install sees it
            setattr(training, name, replacement)
            self._replaced.append((training, name, original))

    def remove(self) -> None:
        """Give Megatron-LM its own functions back and end what is still open."""
        for training, name, original in reversed(self._replaced):
            setattr(training, name, original)
        self._replaced.clear()
        self._leave()

    # -- what stands around Megatron's functions ----------------------------------------------------------

    def _setup(self, original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """The model, checked before and after it is built."""
        args = self._get_args()
        injecting = self._check(args)
        self._directory = self._path(args)
        self.run = Fp8Run(self.recipe, telemetry=self._attach, injecting=injecting)
        self.run.__enter__()
        try:
            built = original(*given, **named)
            # Megatron loads its checkpoint here, and knows now where it goes on.
            self._step = int(args.iteration)
            self._open_run()
            self.run.model_built(built[0], steps_done=self._step)
            if self.recorder is not None:
                self.recorder.truncate_after(self._step)
        except BaseException as error:
            self._end(error)
            raise
        return built

    def _train_step(self, original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        assert self.run is not None
        args = self._get_args()
        # Megatron counts the steps behind it, telemetry counts from 1.
        step = self._step = int(getattr(args, "curr_iteration", self._step)) + 1
        self.run.begin_step(step)
        outcome = original(*given, **named)
        logs = self.recorder is not None and self.recorder.logs(step)
        # Reading the loss waits for the device, so it is read in logging steps alone; only the last pipeline
        # stage has it.
        metrics = {"loss": float(outcome[0][LOSS])} if logs and LOSS in outcome[0] else {}
        self.run.end_step(step, metrics)
        if self.run.proven_at == step:
            self._write_manifest()
        if metrics and self._run_dir is not None:
            self._log.append({"step": step, **metrics})
        return outcome

    def _train(self, original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        try:
            outcome = original(*given, **named)
            if self.recorder is not None:
                self.recorder.flush()
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)
        return outcome

    # -- pieces ------------------------------------------------------------------------------------------

    @property
    def recorder(self) -> Recorder | None:
        """The telemetry recorder, once the model is built."""
        recorder: Any = self.run.recorder if self.run is not None else None
        return recorder

    def _check(self, args: Any) -> bool:
        """Check Megatron's arguments against the recipe; whether the recipe object is to be injected.

        Raises:
            InjectionError: they say something else than the recipe.
        """
        precision = self.recipe.precision
        flag = "fp4_param_gather" if precision == "fp4" else "fp8_param_gather"
        gathered = bool(getattr(args, flag, False))
        fp8_param = bool(getattr(self.recipe, "fp8_param", False))
        if gathered != fp8_param:
            raise InjectionError(
                f"Megatron-LM was started {'with' if gathered else 'without'} --{precision}-param-gather, "
                f"and {target.RECIPE_VARIABLE} says fp8_param={str(fp8_param).lower()}.",
                key="fp8_param",
                value=gathered,
                hint="Take flags and environment over from one and the same `nemo-fp8 args`.",
            )
        if precision != "bf16" and getattr(args, f"{precision}_recipe", None) == "custom":
            factory = getattr(args, f"{precision}_quantizer_factory", None)
            expected = f"{target.FACTORY_MODULE}.{self.recipe.name}"
            if factory != expected:
                raise InjectionError(
                    f"--{precision}-quantizer-factory is {factory}, and {target.RECIPE_VARIABLE} names "
                    f"{self.recipe.name}.",
                    key=f"{precision}_quantizer_factory",
                    value=factory,
                    allowed=[expected],
                )
            return False
        check_config(self.recipe, args)
        emulated = emulation.active() is not None
        preflight.require(
            preflight.check_megatron(self.recipe, args, ddp=args, optimizer=args, emulated=emulated)
        )
        return True

    def _open_run(self) -> None:
        import torch.distributed as dist

        from nemo_fp8_recipes.training.distributed import agree
        from nemo_fp8_recipes.training.metrics import MetricsLog
        from nemo_fp8_recipes.training.run_directory import METRICS_FILE, RUN_FILE, RunDirectory
        from nemo_fp8_recipes.training.versions import installed_versions

        assert self._directory is not None
        path = Path(self._directory)

        def opened() -> None:
            reopened = (path / RUN_FILE).exists()
            run = RunDirectory.reopen(path) if reopened else RunDirectory.create(path, self.recipe.name)
            run.start(
                command=sys.argv,
                overrides=(),
                recipe=self.recipe.to_dict(),
                device=_device(),
                versions=installed_versions(),
                config_yaml="",
                resumed_at=self._step if reopened else None,
            )
            self._run_dir = run
            self._log = MetricsLog(run.path / METRICS_FILE)
            self._log.truncate_after(self._step)

        agree(opened)
        if dist.get_rank() == 0:
            print(f"nemo-fp8: {self.recipe.name} on {_device()}; nemo-fp8 report {path}")

    def _path(self, args: Any) -> Path:
        if self._directory is not None:
            return Path(self._directory)
        for directory in (getattr(args, "save", None), getattr(args, "tensorboard_dir", None)):
            if directory:
                return Path(directory) / "fp8"
        raise InjectionError(
            "There is no directory for telemetry: Megatron-LM has neither --save nor --tensorboard-dir.",
            key="directory",
            hint="Name one: megatron_lm.install(directory=PATH).",
        )

    def _attach(self, model: Any) -> Recorder:
        assert self._directory is not None
        return telemetry.attach(
            model,
            self.recipe,
            directory=self._directory,
            device=_device(),
            **self._logging,
        )

    def _write_manifest(self) -> None:
        from nemo_fp8_recipes.training.files import atomic_write_json
        from nemo_fp8_recipes.training.run_directory import MANIFEST_FILE

        if self._run_dir is not None and self.run is not None and self.run.manifest is not None:
            atomic_write_json(self._run_dir.path / MANIFEST_FILE, self.run.manifest.to_dict())

    def _end(self, error: BaseException | None) -> None:
        """Close telemetry and say in the run's record how it ended."""
        if self._run_dir is not None:
            if error is None:
                self._run_dir.finish({"steps": self._step})
            elif isinstance(error, SystemExit) and not error.code:
                # Megatron-LM leaves so at --exit-interval, --exit-duration-in-mins and on a signal.
                self._run_dir.interrupt(f"Megatron-LM exited after step {self._step}")
            else:
                self._run_dir.fail(error)
        self._leave()

    def _leave(self) -> None:
        if self.run is not None:
            self.run.__exit__(None, None, None)
            self.run = None
        if self._run_dir is not None:
            self._run_dir.close()
            self._run_dir = None


def _rules(alerts: AlertsConfig | Mapping[str, Any] | None) -> AlertsConfig | None:
    if not isinstance(alerts, Mapping):
        return alerts
    from nemo_fp8_recipes import typed

    return typed.read(AlertsConfig, dict(alerts), key="alerts", error=ConfigError, base=default_alerts())


def _training_module() -> Any:
    try:
        return importlib.import_module(TRAINING)
    except ImportError as error:
        raise InjectionError(
            f"megatron_lm.install() needs Megatron-LM, and {TRAINING} cannot be imported: {error}.",
            hint="Run it from Megatron-LM's checkout. A Megatron-Core loop of your own uses "
            "nemo_fp8_recipes.callbacks.megatron_core.Fp8Run.",
        ) from error


def _device() -> str:
    from nemo_fp8_recipes import emulation

    return emulation.label() or _gpu_name()


def _gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"
