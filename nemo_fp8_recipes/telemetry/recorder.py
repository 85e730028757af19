"""The recorder: what the training loop calls, and when each thing happens.

    begin_step(step)            logging step: the seam opens; otherwise nothing
      forward and backward      probes keep references to scales
      optimizer step
    end_step(step, metrics)     logging step: the seam closes, a few kernels over all modules, one collective,
                                one copy to pinned memory is started; metrics go to the sinks
    begin_step(step + 1)        the copy has long arrived: the rules look at the values, and they go to the
                                sinks, one call each, with what the rules say

Outside logging steps `begin_step` and `end_step` launch nothing, copy nothing and wait for nothing.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from nemo_fp8_recipes.telemetry.alerts.watch import Watch
from nemo_fp8_recipes.telemetry.derive import derive
from nemo_fp8_recipes.telemetry.exchange import Exchange, InFlight
from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.observer import Observer
from nemo_fp8_recipes.telemetry.series import WHATIF
from nemo_fp8_recipes.telemetry.sinks.base import Sink
from nemo_fp8_recipes.telemetry.sinks.guard import GuardedSink
from nemo_fp8_recipes.telemetry.whatif import RECORDED, Recorded

if TYPE_CHECKING:
    from torch import nn

    from nemo_fp8_recipes.telemetry.found import Found
    from nemo_fp8_recipes.telemetry.series import StepValues

__all__ = ["Recorder"]

logger = logging.getLogger(__name__)


class Recorder:
    """Logs amax, scale and history of every quantised tensor. Made by `attach`.

    Every rank calls every method, with the same steps.

    Args:
        model: the model, or Megatron's list of virtual-pipeline chunks; None observes nothing.
        exchange: combines the ranks' values.
        sinks: where values and metrics go; none on ranks that do not write.
        log_every: optimizer steps between two logging steps.
        flush_every: logging steps between two flushes of the sinks.
        history: whether to read delayed scaling's windows.
        stats_every: optimizer steps between two logging steps that read the tensors themselves; 0: none do.
        whatif: globs over `<module>/<tensor>` of the operands to judge under the other recipes in those.
        watch: the alert rules, where the values are; None for none.
        on_alert: called with the alerts of a step, on every rank with the same ones, before the next step;
            it may use collectives. None asks the ranks for no agreement on them.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module] | None,
        exchange: Exchange,
        sinks: Sequence[Sink],
        *,
        log_every: int,
        flush_every: int,
        history: bool,
        stats_every: int = 0,
        whatif: Sequence[str] = (),
        watch: Watch | None = None,
        on_alert: Callable[[tuple[Alert, ...]], None] | None = None,
    ) -> None:
        self.directory: Path | None = None
        """The run directory that is written; None on a rank that writes none."""
        self._watch = watch
        self._on_alert = on_alert
        self._observer = (
            Observer(model, history=history, whatif=whatif, rank=exchange.rank, ranks=exchange.world_size)
            if model is not None
            else None
        )
        self._device = _device_of(model)
        self._exchange = exchange
        self._sinks = [GuardedSink(sink) for sink in sinks]
        self._log_every = log_every
        self._flush_every = flush_every
        self._stats_every = stats_every
        self._judges = bool(whatif)
        self._recording: int | None = None
        self._in_flight: tuple[int, InFlight] | None = None
        self._since_flush = 0
        self.quantises = True
        """Whether the recipe of the step that ends quantises anything; where not, seeing nothing is
        expected.
        """
        self._nothing_expected = False
        self._warned_empty = False

    @property
    def lost(self) -> dict[str, int]:
        """Values that each sink that failed did not write."""
        return {sink.name: sink.lost for sink in self._sinks if sink.error is not None}

    def logs(self, step: int) -> bool:
        """Whether `step`, counted from 1, is a logging step: the first one, every `log_every`th, and every
        one that reads the tensors.
        """
        due = step == 1 or step % self._log_every == 0
        return self._observer is not None and (due or self.reads_tensors(step))

    def reads_tensors(self, step: int) -> bool:
        """Whether the tensors themselves are read in `step`: the first one and every `stats_every`th."""
        return self._stats_every > 0 and (step == 1 or step % self._stats_every == 0)

    def begin_step(self, step: int) -> None:
        """Before the first forward pass of optimizer step `step`, counted from 1. Does nothing while the step
        itself is captured in a CUDA graph: what is launched then would be replayed with it.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        self._deliver()
        if self._observer is not None and self.logs(step):
            self._recording = step
            self._observer.begin(stats=self.reads_tensors(step))

    def end_step(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """After the optimizer step and before anything else runs the model.

        Args:
            step: the same as in `begin_step`.
            metrics: training metrics of the step, host numbers.
        """
        if self._observer is not None and self._recording == step:
            self._recording = None
            self._nothing_expected = not self.quantises
            reading = self._observer.end()
            kind = "stats" if self.reads_tensors(step) else ""
            self._in_flight = (step, self._exchange.start(reading, self._device, kind=kind))
        if metrics:
            for sink in self._sinks:
                sink.metrics(step, metrics)

    def flush(self) -> None:
        """Hand over what is on its way and make it readable by others."""
        self._deliver()
        self._since_flush = 0
        for sink in self._sinks:
            sink.flush()

    def truncate_after(self, step: int) -> None:
        """Training resumes after `step`: forget everything logged later. No gap and no duplicate follows, and
        what delayed scaling would have done (`whatif`) goes on from what was logged up to it.
        """
        self._deliver()
        if self._watch is not None:
            self._watch.forget()
        for sink in self._sinks:
            sink.truncate_after(step)
        if self._observer is not None and self._judges:
            self._observer.whatif.restore(self._recorded(), self._device)

    def _recorded(self) -> list[Recorded]:
        """What all ranks recorded in the logging steps so far, from a sink that can read it. Collective."""
        assert self._observer is not None
        modules = set().union(*self._exchange.of_all_ranks(self._observer.chosen_modules()))
        stat = f"{WHATIF}/delayed/{RECORDED}"
        rows = next((rows for sink in self._sinks if (rows := sink.read(stat, modules))), [])
        mine = [
            Recorded(row["step"], Operand(row["module"], row["tensor"]), row["values"])
            for row in sorted(rows, key=lambda row: int(row["step"]))
        ]
        return next((found for found in self._exchange.of_all_ranks(mine) if found), [])

    def close(self) -> None:
        """Flush and release everything; Transformer Engine is left as it was. Safe after a failure of this
        rank alone: nothing here waits for another one.
        """
        if self._observer is not None:
            self._observer.abandon()
        self._recording = None
        self._deliver(collective=False)
        if self._watch is not None:
            self._watch.report_blind()
        for sink in self._sinks:
            sink.flush()
            sink.close()
        self._sinks = []

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _deliver(self, *, collective: bool = True) -> None:
        """Give the values of the last logging step to the sinks."""
        if self._in_flight is None:
            return
        step, in_flight = self._in_flight
        self._in_flight = None
        complete = collective or self._exchange.alone
        found = in_flight.result(collective=complete)
        values = self._watched(step, found) if self._sinks or self._watch is not None else None
        if self._on_alert is not None and complete:
            mine = values.alerts if values is not None else ()
            alerts = self._exchange.same_everywhere(mine, self._device)
            if alerts:
                self._on_alert(alerts)
        if values is None:
            return
        if not found and complete and not self._nothing_expected and not self._warned_empty:
            self._warned_empty = True
            logger.warning(
                "Telemetry saw no quantised tensor in step %d. Modules in high precision have none; what a "
                "replayed CUDA graph quantises cannot be observed.",
                step,
            )
        for sink in self._sinks:
            sink.values(values)
        self._since_flush += 1
        if self._since_flush >= self._flush_every:
            self._since_flush = 0
            for sink in self._sinks:
                sink.flush()

    def _watched(self, step: int, found: Found) -> StepValues:
        """The values of a step with what the rules say about them, which the log shows at once."""
        values = derive(step, found)
        if self._watch is None:
            return values
        alerts = self._watch.look(values)
        for alert in alerts:
            logger.warning("Alert %s in step %d: %s", alert.rule, step, alert.message)
        return dataclasses.replace(values, alerts=alerts) if alerts else values


def _device_of(model: Any) -> torch.device:
    if model is None:
        return torch.device("cpu")
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    for chunk in chunks:
        for parameter in chunk.parameters():
            return torch.device(parameter.device)
    return torch.device("cpu")
