"""What is logged: the statistics, the series they form over the steps, and the values of one step.

A series is one statistic of one operand of one GEMM, `fp8/<module>/<tensor>/<stat>`. What each statistic
means under each recipe is the schema in docs/schemas/telemetry.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from nemo_fp8_recipes.telemetry.alerts.alert import Alert

__all__ = ["FP8_MAX", "STATS", "TENSORS", "WHATIF", "Series", "Stat", "StepValues"]

TENSORS = ("input", "weight", "grad_output")

FP8_MAX = {"e4m3": 448.0, "e5m2": 57344.0}
"""Largest finite magnitude of an FP8 format: what an amax is mapped to."""


@dataclass(frozen=True)
class Stat:
    """One statistic.

    Attributes:
        name: last part of the series' name.
        recipes: canonical names of the recipes that have it.
        meaning: one line for tables and help.
        windowed: the value is a window (a list), not a number.
    """

    name: str
    recipes: tuple[str, ...]
    meaning: str
    windowed: bool = False


_ALL = ("delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4")
_BLOCK_SCALES = ("blockwise", "mxfp8", "nvfp4")

STATS = {
    stat.name: stat
    for stat in (
        Stat("amax", _ALL, "largest magnitude of the tensor in this step"),
        Stat(
            "amax_bound",
            ("blockwise", "mxfp8"),
            "upper bound of the largest magnitude, from the block scales",
        ),
        Stat("amax_history", ("delayed",), "window of amax values behind the next scale", windowed=True),
        Stat("scale", ("delayed", "tensorwise"), "factor the tensor was multiplied with before the cast"),
        Stat("scale_max", ("delayed",), "largest scale of the ranks, where it is not `scale`"),
        Stat("scale_next", ("delayed",), "factor of the next cast, after the update"),
        Stat("headroom", _ALL[:-1], "fp8_max / (amax x scale): below 1 the largest values are clipped"),
        Stat("scale_inv", ("tensorwise",), "inverse scale stored with the FP8 tensor"),
        Stat("scale_inv_min", _BLOCK_SCALES, "smallest inverse block scale"),
        Stat("scale_inv_max", _BLOCK_SCALES, "largest inverse block scale"),
        Stat("scale_inv_mean", _BLOCK_SCALES, "mean inverse block scale"),
        Stat("scale_inv_std", _BLOCK_SCALES, "standard deviation of the inverse block scales"),
        Stat("scale_inv_p01", _BLOCK_SCALES, "1st percentile of the inverse block scales"),
        Stat("scale_inv_p50", _BLOCK_SCALES, "median inverse block scale"),
        Stat("scale_inv_p99", _BLOCK_SCALES, "99th percentile of the inverse block scales"),
        Stat("scale_inv_at_min", _BLOCK_SCALES, "fraction of blocks whose scale is the format's smallest"),
        Stat("scale_inv_at_max", _BLOCK_SCALES, "fraction of blocks whose scale is the format's largest"),
        Stat("blocks", _BLOCK_SCALES, "blocks of one quantised tensor on one rank"),
        Stat("underflow", _ALL, "fraction of elements that are not zero and became zero"),
        Stat("saturation", _ALL, "fraction of elements that were clipped at the largest magnitude"),
        Stat("zeros", _ALL, "fraction of elements that are zero in high precision"),
        Stat("nonfinite", _ALL, "elements that are NaN or Inf in high precision"),
        Stat("sqnr", _ALL, "signal to quantisation noise in dB"),
        Stat("bulk_error", _ALL, "relative error of all elements but the largest 1 %"),
        Stat(
            "amax_by_rank",
            ("delayed",),
            "what-if: amax of each rank, behind the scale that delayed scaling would have",
            windowed=True,
        ),
        Stat("graphed", _ALL, "1: the module ran as a CUDA graph in this step, which was not looked into"),
        Stat("unobserved", _ALL, "1: nothing of the tensor was seen in this step"),
    )
}

WHATIF = "whatif"
"""First part of the name of a statistic under a recipe that did not quantise the tensor,
`whatif/<recipe>/<stat>`.
"""


@dataclass(frozen=True, order=True)
class Series:
    """One statistic of one operand over the steps.

    Attributes:
        module: module path in the whole model, "decoder.layers.0.mlp.linear_fc1".
        tensor: "input", "weight" or "grad_output".
        stat: a key of `STATS`, or `whatif/<recipe>/` and one.
        recipe: canonical name of the recipe that quantised the tensor.
        format: element format, "e4m3", "e5m2" or "e2m1".
    """

    module: str
    tensor: str
    stat: str
    recipe: str
    format: str

    @property
    def tag(self) -> str:
        """The name in TensorBoard and other sinks."""
        return f"fp8/{self.module}/{self.tensor}/{self.stat}"


@dataclass(frozen=True)
class StepValues:
    """All values of one logging step, reduced over micro-batches and ranks.

    Attributes:
        step: completed optimizer steps, counted from 1.
        series: the series that have a number in this step.
        values: fp32 (len(series),), in the order of `series`; NaN and Inf are kept.
        windows: fp32 (window length,) of each windowed series, oldest entry first; mostly `Rows`.
        alerts: what the rules say about this step; see `alerts`.
    """

    step: int
    series: tuple[Series, ...]
    values: np.ndarray
    windows: Mapping[Series, np.ndarray] = field(default_factory=dict)
    alerts: tuple[Alert, ...] = ()

    def __len__(self) -> int:
        return len(self.series) + len(self.windows)
