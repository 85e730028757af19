"""A job's run directory as its ranks see it: opened, said to run, ended. Whatever trainer runs the job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_fp8_recipes.errors import ReportError, RunDirectoryError
from nemo_fp8_recipes.report import text
from nemo_fp8_recipes.training import display
from nemo_fp8_recipes.training.data import Dataset
from nemo_fp8_recipes.training.distributed import agree
from nemo_fp8_recipes.training.invocation import Invocation
from nemo_fp8_recipes.training.memory import memory_said
from nemo_fp8_recipes.training.metrics import MetricsLog, read_metrics
from nemo_fp8_recipes.training.resume import open_run
from nemo_fp8_recipes.training.run_directory import METRICS_FILE, RunDirectory
from nemo_fp8_recipes.training.settings import Settings
from nemo_fp8_recipes.training.step import Step

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["End", "GoingOn", "JobRecord"]


@dataclass(frozen=True)
class GoingOn:
    """Where a run goes on.

    Attributes:
        step: completed optimizer steps; 0 where the run had saved nothing.
        checkpoint: what to load; None where the run had saved nothing.
    """

    step: int
    checkpoint: Path | None


@dataclass(frozen=True)
class End:
    """How the training ended.

    Attributes:
        step: completed optimizer steps.
        held_out: loss of the held-out batches; None: not evaluated.
        signal: the signal that stopped the job; 0: none did.
        rule: the alert rule that stopped it; None: none did.
        lost: values that a sink of telemetry could not write, by its name.
    """

    step: int
    held_out: float | None = None
    signal: int = 0
    rule: str | None = None
    lost: Mapping[str, int] | None = None

    @property
    def status(self) -> int:
        """The exit status: 0, or 128 + the signal that stopped the job."""
        return 128 + self.signal if self.signal else 0

    @property
    def reason(self) -> str:
        """Why it ended before its last step."""
        if self.signal:
            return f"by signal {self.signal}"
        return f"by the alert {self.rule}" if self.rule else "as asked (training.stop_at_step)"


class JobRecord:
    """The run directory of a job. Rank 0 alone writes it; every rank knows where it is.

    Attributes:
        path: the run directory.
        going_on: where the run goes on; None for a new one.
    """

    def __init__(
        self,
        settings: Settings,
        invocation: Invocation,
        console: Console,
        path: Path,
        going_on: GoingOn | None,
        directory: RunDirectory | None,
    ) -> None:
        self.path = path
        self.going_on = going_on
        self._settings = settings
        self._invocation = invocation
        self._console = console
        self._directory = directory  # on rank 0
        self._lost: str | None = None
        """What should have been logged before the point of resumption and is not there; on rank 0."""

    @classmethod
    def open(
        cls,
        stack: ExitStack,
        settings: Settings,
        invocation: Invocation,
        console: Console,
        *,
        newest: Callable[[Path], Path | None],
        look: Callable[[Path], int],
    ) -> JobRecord:
        """Open it on rank 0 until `stack` closes; every rank learns where it is. Collective.

        Args:
            newest: finds the newest complete checkpoint below a run's checkpoints.
            look: on rank 0, the step of the checkpoint that was found; may raise where it is not this job's.

        Raises:
            Fp8Error: what `open_run` or `look` raised, on rank 0.
            ReportedElsewhereError: on the other ranks then.
        """
        directory: RunDirectory | None = None

        def opened() -> tuple[str, bool, int, str | None]:
            nonlocal directory
            opening = open_run(settings.run_dir, settings.training.resume, settings.recipe.name, newest)
            directory = opening.run
            stack.callback(opening.run.close)
            step = look(opening.checkpoint) if opening.checkpoint is not None else 0
            checkpoint = str(opening.checkpoint) if opening.checkpoint is not None else None
            return str(opening.run.path), opening.goes_on, step, checkpoint

        path, goes_on, step, checkpoint = agree(opened)
        going_on = GoingOn(step, Path(checkpoint) if checkpoint is not None else None) if goes_on else None
        return cls(settings, invocation, console, Path(path), going_on, directory)

    @property
    def start(self) -> int:
        """Optimizer steps that lie behind this job."""
        return self.going_on.step if self.going_on is not None else 0

    @property
    def checkpoint(self) -> Path | None:
        """What to load before the first step; None: nothing."""
        return self.going_on.checkpoint if self.going_on is not None else None

    @contextmanager
    def failing(self) -> Iterator[None]:
        """An error in the block is recorded in `run.json`; if even that cannot be written, the error says so
        too."""
        try:
            with memory_said():
                yield
        except BaseException as error:
            if self._directory is not None:
                try:
                    self._directory.fail(error)
                except Exception as second:  # noqa: BLE001  # the first error is the one to report
                    error.add_note(f"{self._directory.path / 'run.json'} could not be updated: {second}")
            raise

    def begin(self) -> None:
        """On rank 0: `run.json` says running, and the metrics after the point of resumption are gone.
        Collective."""
        invocation = self._invocation

        def write() -> None:
            assert self._directory is not None
            self._directory.start(
                command=invocation.command,
                overrides=invocation.overrides,
                recipe=self._settings.recipe.to_dict(),
                device=invocation.device_label,
                versions=invocation.versions,
                config_yaml=invocation.config_yaml,
                resumed_at=self.start if self.going_on is not None else None,
            )
            kept = MetricsLog(self.path / METRICS_FILE).truncate_after(self.start)
            self._lost = _lost(kept, self.start, self._settings.training.log_every)

        agree(write)

    def log(self, step: Step) -> None:
        """Append a step to metrics.jsonl, on rank 0."""
        if self._directory is not None:
            MetricsLog(self.path / METRICS_FILE).append(step.metrics())

    def show_banner(
        self,
        dataset: Dataset,
        *,
        processes: int,
        framework: str | None = None,
        parameters: int | None = None,
    ) -> None:
        """What is about to be trained, on what, how; then what the user should know before the first step."""
        rows = _facts(self._settings, self._invocation, dataset, processes, framework, parameters)
        rows["run directory"] = str(self.path)
        if self.start:
            rows["resumed"] = f"after step {self.start} of {self._settings.training.steps}"
        display.banner(self._console, rows)
        for note in self._invocation.notes:
            self._console.print(note, style="yellow", markup=False)
        if self._lost is not None:
            self._console.print(self._lost, style="yellow", markup=False)
        if self.going_on is not None and self.checkpoint is None:
            self._console.print("The run had saved no checkpoint: it starts again from its first step.")

    def end(self, end: End) -> None:
        """On rank 0: `run.json` says how it ended; then the report, and where everything lies."""
        if self._directory is None:
            return
        training = self._settings.training
        finished = end.step >= training.steps
        if finished:
            try:
                rows = read_metrics(self.path / METRICS_FILE)
            except RunDirectoryError:  # damaged, as is said where the summary would be
                rows = []
            self._directory.finish(
                {
                    "steps": end.step,
                    "first_loss": rows[0]["loss"] if rows else None,
                    "last_loss": rows[-1]["loss"] if rows else None,
                    "held_out_loss": end.held_out,
                }
            )
        else:
            self._directory.interrupt(f"stopped after step {end.step} {end.reason}")
            self._console.print(f"Stopped after step {end.step} {end.reason}.")
        try:
            text.render(self.path, self._console)
        except ReportError as error:  # of a file that was damaged: the job itself went well
            self._console.print(f"There is no summary: {error}", style="yellow", markup=False)
        for sink, values in (end.lost or {}).items():
            self._console.print(f"[bold]Telemetry is incomplete:[/bold] {sink} lost {values} values.")
        display.farewell(
            self._console,
            self.path,
            held_out=end.held_out,
            tensorboard=(self.path / "tensorboard").is_dir(),
            resumable=not finished and (training.save_every > 0 or end.rule is not None),
        )


def _lost(steps: Sequence[int], start: int, log_every: int) -> str | None:
    """That metrics up to the step `start` are not there; None where all are, as far as it shows: how often
    was logged may have been changed.
    """
    apart = max((after - before for before, after in pairwise([0, *steps])), default=1)
    last = steps[-1] if steps else 0
    if start - last < max(log_every, apart):
        return None
    return (
        f"{METRICS_FILE} ends at step {last}, and the run goes on after {start}: what was logged between "
        "is gone, unless training.log_every was larger then."
    )


def _facts(
    settings: Settings,
    invocation: Invocation,
    dataset: Dataset,
    processes: int,
    framework: str | None,
    parameters: int | None,
) -> dict[str, str]:
    model, training, sizes = settings.model, settings.training, settings.parallel
    data_ranks = sizes.data_parallel(processes)
    micro_batches = training.global_batch_size // (training.micro_batch_size * data_ranks)
    facts = {"recipe": str(settings.schedule)}
    if settings.modules:
        facts["modules"] = ", ".join(f"{entry.pattern} in {entry.recipe}" for entry in settings.modules)
    if framework is not None:
        facts["framework"] = framework
    size = f", {parameters / 1e6:,.1f} M parameters" if parameters is not None else ""
    return facts | {
        "device": invocation.device_label,
        "model": f"{model.display_name}: {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_attention_heads} heads{size}",
        "data": f"{dataset.name}: {dataset.description}",
        "batch": f"{training.global_batch_size} x {model.seq_length} tokens a step in {micro_batches} "
        f"micro-batch(es) a rank",
        "parallelism": f"{processes} process(es): data {data_ranks}, tensor {sizes.tp}"
        f"{' with sequence' if sizes.sequence else ''}, pipeline {sizes.pp}, context {sizes.cp}",
        "versions": ", ".join(f"{name} {version or '-'}" for name, version in invocation.versions.items()),
    }
