"""What the runs of a comparison left, as numbers that can stand side by side."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]  # comes with OmegaConf, without types

from nemo_fp8_recipes.comparison.plan import flat
from nemo_fp8_recipes.errors import ReportError
from nemo_fp8_recipes.injection.rows import Manifest
from nemo_fp8_recipes.report.run import Run, load
from nemo_fp8_recipes.training.run_directory import RUN_FILE

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SCHEMA_VERSION", "Comparison", "Outcome", "compare"]

SCHEMA_VERSION = 1
LAST_PART = 0.1
"""Share of the steps, the last ones, over which the loss is averaged."""
_DECIDING = ("model", "data", "training", "optimizer")
_HARMLESS = {
    *(f"{group}.name" for group in _DECIDING),
    *(
        f"training.{key}"
        for key in (
            "resume",
            "stop_at_step",
            "save_every",
            "keep_checkpoints",
            "log_every",
            "distributed_timeout_minutes",
        )
    ),
}
"""Keys of those groups that change no loss."""
GEMMS = 3
"""GEMMs of a linear layer in a training step: fprop, dgrad, wgrad."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run. A number is None where the run has none.

    Attributes:
        label: its name in the comparison.
        path: its run directory; None where it was never started.
        recipe: canonical name.
        status: "finished", "running", "interrupted", "failed", or "not started".
        error: why it failed.
        device: "emulated b200", or the name of the GPU.
        steps: the last step logged.
        loss: mean training loss of the last tenth of the steps.
        loss_difference: mean of the differences to the baseline, step by step, over the steps that `loss`
        averages
            and both have: both trained on the same batch in each.
        held_out_loss: loss on held-out data after the last step.
        held_out_difference: its difference to the baseline's.
        step_time_ms: median; the first tenth of the steps, at least one, is left out.
        step_time_ratio: to the baseline's; above 1 is slower.
        gemms, gemms_quantized: GEMMs of linear layers in a step, and those with quantised operands; under a
            recipe schedule the mean over the steps so far.
        recipes: under a recipe schedule, each recipe with the step it began in; empty otherwise.
        sqnr_db: signal to quantisation noise: median and lowest over tensors, in the last step that has it.
        underflow: fraction of elements that became zero: median and highest over tensors, likewise.
    """

    label: str
    path: Path | None
    recipe: str
    status: str
    error: str | None = None
    device: str | None = None
    steps: int | None = None
    loss: float | None = None
    loss_difference: float | None = None
    held_out_loss: float | None = None
    held_out_difference: float | None = None
    step_time_ms: float | None = None
    step_time_ratio: float | None = None
    gemms: float | None = None
    gemms_quantized: float | None = None
    sqnr_db: tuple[float, float] | None = None
    underflow: tuple[float, float] | None = None
    recipes: tuple[tuple[str, int], ...] = ()

    @property
    def quantized_share(self) -> float | None:
        """Share of the GEMMs that is quantised."""
        if not self.gemms or self.gemms_quantized is None:
            return None
        return self.gemms_quantized / self.gemms

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a number that is not finite is None."""
        values = {**dataclasses.asdict(self), "quantized_share": self.quantized_share}
        values["recipes"] = [{"recipe": recipe, "first_step": first} for recipe, first in self.recipes]
        values["path"] = None if self.path is None else str(self.path)
        for name, lowest_or_highest in (("sqnr_db", "lowest"), ("underflow", "highest")):
            found = values[name]
            values[name] = None if found is None else {"median": found[0], lowest_or_highest: found[1]}
        return {key: _finite(value) for key, value in values.items()}


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        outcomes: the baseline first.
        baseline: its label; None where there is none.
        unlike: keys of model, data, training and optimizer in which runs differ: what the table shows is then
            not the recipes' doing alone.
    """

    outcomes: tuple[Outcome, ...]
    baseline: str | None
    unlike: tuple[str, ...] = ()

    @property
    def emulated(self) -> bool:
        """Whether a run's device was emulated: its times then say nothing about a GPU."""
        return any((outcome.device or "").startswith("emulated") for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "baseline": self.baseline,
            "emulated": self.emulated,
            "unlike": list(self.unlike),
            "runs": [outcome.to_dict() for outcome in self.outcomes],
        }


def compare(runs: Mapping[str, tuple[str, Path]], baseline: str | None) -> Comparison:
    """Read runs and set them side by side.

    Args:
        runs: label -> recipe and run directory; one that is not there was never started.
        baseline: the label that the others are compared with.

    Raises:
        ReportError: a run directory that is damaged.
    """
    loaded = {label: load(path) if (path / RUN_FILE).exists() else None for label, (_, path) in runs.items()}
    base = loaded.get(baseline) if baseline is not None else None
    return Comparison(
        tuple(
            Outcome(label=label, path=None, recipe=recipe, status="not started")
            if (run := loaded[label]) is None
            else _outcome(label, run, base if label != baseline else None)
            for label, (recipe, _) in runs.items()
        ),
        baseline,
        _unlike([run.path for run in loaded.values() if run is not None]),
    )


def _unlike(paths: Sequence[Path]) -> tuple[str, ...]:
    """The keys that decide about the losses and differ between the runs' configurations, where both say."""
    configs = [_configuration(path / "config.yaml") for path in paths]
    found = set()
    for one, other in itertools.combinations(configs, 2):
        found |= {
            key
            for key in one.keys() & other.keys()
            if key.partition(".")[0] in _DECIDING and key not in _HARMLESS and one[key] != other[key]
        }
    return tuple(sorted(found))


def _configuration(path: Path) -> dict[str, Any]:
    """Dotted key -> value; empty where the run has none, as one of Megatron-LM's own script."""
    try:
        return flat(OmegaConf.load(path)) if path.exists() else {}
    except (OSError, ValueError, YAMLError) as error:
        raise ReportError(f"{path} cannot be read: {error}", value=str(path)) from error


def _outcome(label: str, run: Run, base: Run | None) -> Outcome:
    result: Mapping[str, Any] = run.record.get("result") or {}
    held_out = _number(result.get("held_out_loss"))
    step_time = _step_time(run)
    last = _last_losses(run)
    gemms, quantized = _mean_gemms(run)
    outcome = Outcome(
        label=label,
        path=run.path,
        recipe=run.recipe,
        status=str(run.record.get("status")),
        error=run.record.get("error"),
        device=run.record.get("device"),
        steps=int(run.metrics[-1]["step"]) if run.metrics else None,
        loss=statistics.fmean(last.values()) if last else None,
        held_out_loss=held_out,
        step_time_ms=step_time,
        gemms=gemms,
        gemms_quantized=quantized,
        sqnr_db=_over_tensors(run.telemetry, "sqnr", worst=min),
        underflow=_over_tensors(run.telemetry, "underflow", worst=max),
        recipes=tuple((manifest.asked or "unknown", first) for first, manifest in _in_force(run)),
    )
    return outcome if base is None else _beside(outcome, last, base)


def _beside(outcome: Outcome, last: Mapping[int, float], base: Run) -> Outcome:
    """The outcome with what it differs by from the baseline."""
    losses = dict(base.losses)
    differences = [loss - losses[step] for step, loss in last.items() if step in losses]
    held_out = _number((base.record.get("result") or {}).get("held_out_loss"))
    time = _step_time(base)
    return dataclasses.replace(
        outcome,
        loss_difference=statistics.fmean(differences) if differences else None,
        held_out_difference=None
        if outcome.held_out_loss is None or held_out is None
        else outcome.held_out_loss - held_out,
        step_time_ratio=None if outcome.step_time_ms is None or not time else outcome.step_time_ms / time,
    )


def _last_losses(run: Run) -> dict[int, float]:
    """Step -> loss of the last part of the steps."""
    losses = run.losses
    return dict(losses[-max(1, round(LAST_PART * len(losses))) :])


def _step_time(run: Run) -> float | None:
    times = [row["step_time_ms"] for row in run.metrics if row.get("step_time_ms") is not None]
    # What is done once, in the first steps, is not the time of a step.
    times = times[max(1, round(LAST_PART * len(times))) :]
    return statistics.median(times) if times else None


def _in_force(run: Run) -> list[tuple[int, Manifest]]:
    """The manifests of a recipe schedule that the run has reached, each with its first step. What a lost
    continuation left behind the last step counts for nothing.
    """
    last = int(run.metrics[-1]["step"]) if run.metrics else 0
    return [(first, manifest) for first, manifest in run.manifests if first <= last]


def _mean_gemms(run: Run) -> tuple[float | None, float | None]:
    """GEMMs of linear layers in a step, and how many are quantised, on average over the steps."""
    spans = _in_force(run)
    if len(spans) < 2:
        return _gemms(run.manifest)
    starts = [first for first, _ in spans]
    lengths = [
        later - first
        for first, later in zip(starts, [*starts[1:], int(run.metrics[-1]["step"]) + 1], strict=True)
    ]
    counts = [_gemms(manifest) for _, manifest in spans]
    gemms, quantized = (
        sum(length * (count[part] or 0) for length, count in zip(lengths, counts, strict=True)) / sum(lengths)
        for part in (0, 1)
    )
    return gemms, quantized


def _gemms(manifest: Manifest | None) -> tuple[int | None, int | None]:
    """GEMMs of linear layers in a step, and how many of them are quantised; attention's are not counted."""
    if manifest is None:
        return None, None
    gemms = quantized = 0
    for row in manifest.rows:
        if row.module_class.endswith("DotProductAttention"):
            continue
        gemms += GEMMS
        if row.quantized:
            # With a backward override dgrad and wgrad run in high precision.
            quantized += GEMMS if row.backward_override is None else 1
    return gemms, quantized


def _over_tensors(telemetry: pa.Table, stat: str, *, worst: Any) -> tuple[float, float] | None:
    """Median and worst value of a statistic over the tensors of the last step that has it."""
    rows = [
        (row["step"], row["value"])
        for row in telemetry.select(["step", "stat", "value"]).to_pylist()
        if row["stat"] == stat and row["value"] is not None and not math.isnan(row["value"])
    ]
    if not rows:
        return None
    last = max(step for step, _ in rows)
    values: Sequence[float] = [value for step, value in rows if step == last]
    return statistics.median(values), worst(values)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
