"""What the page shows of a run, as plain data: matrices of statistics over operands and logged steps."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_fp8_recipes.report.effect import operand_order
from nemo_fp8_recipes.report.run import Run
from nemo_fp8_recipes.telemetry.series import FP8_MAX, STATS, WHATIF

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

__all__ = ["MAX_COLUMNS", "Matrices", "matrices", "run_data"]

MAX_COLUMNS = 400
"""Logged steps beyond which neighbouring ones share a column."""

_WINDOWED = {stat.name for stat in STATS.values() if stat.windowed}
_WORST_IS_SMALLEST = ("scale", "scale_next", "scale_inv_min", "headroom", "sqnr")
"""Statistics whose smallest value stands for steps that share a column; the largest does for the others."""

_LOGARITHMIC = ("amax", "scale", "headroom")
"""Beginnings of statistics that span binades: they are shown as powers of two."""


@dataclass(frozen=True)
class Matrices:
    """Statistics over operands and steps.

    Attributes:
        operands: (module, tensor), in the order of the model.
        steps: the last logged step of each column.
        steps_a_column: logged steps that share one, 1 for most runs.
        stats: statistic -> fp32 (operands, columns); NaN where nothing was logged.
        windows: operand index -> the last amax history window, oldest entry first.
        formats: element format of each operand when it was last logged.
        recipes: canonical name of the recipe that quantised it then.
    """

    operands: tuple[tuple[str, str], ...]
    steps: tuple[int, ...]
    steps_a_column: int
    stats: Mapping[str, NDArray[np.float32]]
    windows: Mapping[int, tuple[float, ...]]
    formats: tuple[str, ...]
    recipes: tuple[str, ...]


def matrices(table: pa.Table, order: Sequence[str] = (), *, max_columns: int = MAX_COLUMNS) -> Matrices:
    """The rows of a telemetry table as matrices.

    Args:
        table: from `store.read`.
        order: module paths in the order of the model.
        max_columns: see `MAX_COLUMNS`.
    """
    columns = {name: _codes(table, name) for name in ("module", "tensor", "stat", "recipe", "format")}
    modules, tensors = columns["module"], columns["tensor"]
    keys = modules.codes * max(len(tensors.names), 1) + tensors.codes
    found, operand_of_row = np.unique(keys, return_inverse=True)
    names = [
        (modules.names[key // len(tensors.names)], tensors.names[key % len(tensors.names)]) for key in found
    ]
    position = {module: index for index, module in enumerate(order)}
    ranked = sorted(
        range(len(names)),
        key=lambda index: (position.get(names[index][0], len(position)), operand_order(names[index])),
    )
    rank = np.empty(len(names), dtype=np.int64)
    rank[ranked] = np.arange(len(names))
    operand = rank[operand_of_row] if len(names) else operand_of_row

    steps, step_of_row = np.unique(table.column("step").to_numpy(), return_inverse=True)
    share = max(1, math.ceil(len(steps) / max_columns))
    column = step_of_row // share
    lasts = tuple(int(steps[min(start + share, len(steps)) - 1]) for start in range(0, len(steps), share))

    values = table.column("value").to_numpy()
    stats: dict[str, NDArray[np.float32]] = {}
    for code, stat in enumerate(columns["stat"].names):
        rows = np.flatnonzero(columns["stat"].codes == code)
        if stat.rpartition("/")[2] in _WINDOWED or not rows.size:
            continue
        matrix = np.full((len(names), len(lasts)), np.nan, dtype=np.float32)
        worst = np.fmin if stat.rpartition("/")[2] in _WORST_IS_SMALLEST else np.fmax
        worst.at(matrix, (operand[rows], column[rows]), values[rows].astype(np.float32))
        stats[stat] = matrix

    # A row of a what-if names the recipe that it asks about: it sorts before those of the recipe itself.
    asked = np.asarray([stat.startswith(f"{WHATIF}/") for stat in columns["stat"].names], dtype=bool)
    own = ~asked[columns["stat"].codes] if len(asked) else np.zeros(0, dtype=bool)
    last_row: dict[int, int] = {}
    for row in np.lexsort((step_of_row, own)):
        last_row[int(operand[row])] = int(row)
    return Matrices(
        operands=tuple(names[index] for index in ranked),
        steps=lasts,
        steps_a_column=share,
        stats=stats,
        windows=_windows(table, columns["stat"], operand),
        formats=tuple(columns["format"].at(last_row[index]) for index in range(len(names))),
        recipes=tuple(columns["recipe"].at(last_row[index]) for index in range(len(names))),
    )


@dataclass(frozen=True)
class _Codes:
    """A dictionary column: the code of each row, and what the codes mean."""

    codes: NDArray[np.int64]
    names: list[str]

    def at(self, row: int) -> str:
        return self.names[int(self.codes[row])]


def _codes(table: pa.Table, name: str) -> _Codes:
    column = table.column(name).combine_chunks()
    if not len(column):
        return _Codes(np.empty(0, dtype=np.int64), [])
    encoded = column if hasattr(column, "dictionary") else column.dictionary_encode()
    if hasattr(encoded, "chunk"):
        encoded = encoded.chunk(0)
    return _Codes(encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist())


def _windows(table: pa.Table, stat: _Codes, operand: NDArray[np.int64]) -> dict[int, tuple[float, ...]]:
    if "amax_history" not in stat.names:
        return {}
    newest: dict[int, tuple[int, int]] = {}
    steps = table.column("step").to_numpy()
    for row in np.flatnonzero(stat.codes == stat.names.index("amax_history")):
        index, step = int(operand[row]), int(steps[row])
        if index not in newest or newest[index][0] <= step:
            newest[index] = (step, int(row))
    values = table.column("values")
    return {index: tuple(values[row].as_py()) for index, (_, row) in newest.items()}


def run_data(run: Run) -> dict[str, Any]:
    """Everything the page says about a run; every number is one that JSON can hold."""
    order = [] if run.manifest is None else [row.module for row in run.manifest.rows]
    found = matrices(run.telemetry, order)
    stats = dict(found.stats)
    headroom = _headroom(found)
    if "headroom" not in stats and headroom is not None:
        stats["headroom"] = headroom
    record = run.record
    return {
        "name": run.path.resolve().name,
        "path": str(run.path),
        "status": str(record.get("status", "unknown")),
        "error": record.get("error"),
        "recipe": {key: _plain(value) for key, value in dict(record.get("recipe", {})).items()},
        "device": str(record.get("device", "unknown")),
        "versions": {key: value for key, value in dict(record.get("versions", {})).items() if value},
        "result": {key: _plain(value) for key, value in dict(record.get("result") or {}).items()},
        "loss": {"steps": [step for step, _ in run.losses], "values": [loss for _, loss in run.losses]},
        "alerts": [
            {
                "step": alert.step,
                "rule": alert.rule,
                "message": alert.message,
                "module": alert.module,
                "tensor": alert.tensor,
                "tensors": len(alert.tensors),
            }
            for alert in run.alerts
        ],
        "manifest": [] if run.manifest is None else [_manifest_row(row) for row in run.manifest.rows],
        "operands": [{"module": module, "tensor": tensor} for module, tensor in found.operands],
        "formats": list(found.formats),
        "recipes": list(found.recipes),
        "steps": list(found.steps),
        "stepsAColumn": found.steps_a_column,
        "stats": {
            name: {"data": _base64(matrix), "logarithmic": name.startswith(_LOGARITHMIC)}
            for name, matrix in sorted(stats.items(), key=lambda item: _stat_order(item[0]))
        },
        "windows": {str(index): _finite(window) for index, window in found.windows.items()},
    }


def _headroom(found: Matrices) -> NDArray[np.float32] | None:
    """fp8_max / (amax × scale), for a store that lacks it: the format's largest value over the largest scaled
    one. Where one scale serves the whole tensor.
    """
    if found.steps_a_column > 1 or not {"amax", "scale"} <= found.stats.keys():
        return None  # the amax and the scale of a shared column may be of different steps
    largest = np.asarray([FP8_MAX.get(name, np.nan) for name in found.formats], dtype=np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        headroom = largest[:, None] / (found.stats["amax"] * found.stats["scale"])
    return headroom.astype(np.float32)


def _stat_order(name: str) -> tuple[bool, int, str]:
    first = ("amax", "amax_bound", "headroom", "scale", "underflow", "saturation", "sqnr")
    return "/" in name, first.index(name) if name in first else len(first), name


def _manifest_row(row: Any) -> dict[str, Any]:
    return {
        "module": row.module,
        "recipe": row.recipe,
        "quantized": row.quantized,
        "operands": {tensor: str(operand) for tensor, operand in row.operands()},
        "primary": row.primary_weight_dtype,
        "reason": row.reason,
    }


def _base64(matrix: NDArray[np.float32]) -> str:
    """Little-endian fp32, row by row."""
    return base64.b64encode(np.ascontiguousarray(matrix, dtype="<f4").tobytes()).decode()


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _plain(value: Any) -> Any:
    """A value as the page prints it; a number that JSON lacks as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
