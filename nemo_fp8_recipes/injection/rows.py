"""The manifest: what each quantisable module of a built model really does. Schema version 1.

These classes hold what was read and its JSON form; `read_back` fills them from a model, `verify` compares
them with a recipe, `table` prints them. Documented field by field in docs/schemas/manifest.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import ReportError
from nemo_fp8_recipes.recipes.options import OPERANDS, TensorName

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["SCHEMA", "SCHEMA_VERSION", "Difference", "Manifest", "ManifestRow", "OperandRow"]

SCHEMA = "nemo_fp8_recipes.manifest"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class OperandRow:
    """How one GEMM operand is quantised, as its quantizer says.

    Attributes:
        format: "e4m3", "e5m2" or "e2m1"; a torch dtype name ("bfloat16") when not quantised.
        scaling: "delayed", "tensorwise", "block", "custom" or "none".
        block: elements that share a scale, (1, 32) rowwise and (32, 1) columnwise for MXFP8; None: whole
            tensor.
        scale_dtype: "fp32", "e8m0" or "e4m3"; None when nothing is scaled.
        power_of_two: scales are powers of two.
        amax_epsilon: lower bound of amax; 0.0 where the quantizer has none.
        columnwise: the quantizer also makes the columnwise (transposed) copy.
        amax_history_len: rows of the amax history window, delayed scaling only.
        random_hadamard_transform: NVFP4 only.
        stochastic_rounding: NVFP4 only.
    """

    format: str
    scaling: str
    block: tuple[int, int] | None = None
    scale_dtype: str | None = None
    power_of_two: bool = False
    amax_epsilon: float = 0.0
    columnwise: bool = False
    amax_history_len: int | None = None
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False

    @property
    def quantized(self) -> bool:
        return self.scaling != "none"

    def __str__(self) -> str:
        if not self.quantized:
            return self.format
        return self.format if self.block is None else f"{self.format} {self.block[0]}x{self.block[1]}"


@dataclass(frozen=True)
class ManifestRow:
    """One quantisable module.

    Attributes:
        module: path in the whole model (see `module_names`).
        module_class: class name of the module.
        quantized: its last forward ran with quantised operands.
        recipe: canonical recipe name read from the quantizers; "bf16" when not quantised, "mixed" when the
            operands belong to different recipes, "custom" for quantizers of no known recipe.
        te_recipe: class name of the Transformer Engine recipe the module holds, None when it holds none.
        input, weight, grad_output: the operands; None when not quantised or, for attention, not applicable.
        primary_weight_dtype: dtype the parameter itself is stored in, None for a module without weight.
        backward_override: Transformer Engine's backward precision mode in effect, None for quantised
            backward.
        reason_code: why the module is in high precision, one of `read_back.REASONS`; None when quantised.
        reason: the same in a sentence.
        device: name of the device that ran it; it says "emulated" on the emulated one.
        cuda_graph: who captures the module in a CUDA graph, one of `cuda_graphs.CAPTURED_BY`; telemetry sees
            little of what a replayed graph quantises. None for a module that runs eagerly.
    """

    module: str
    module_class: str
    quantized: bool
    recipe: str
    te_recipe: str | None
    input: OperandRow | None
    weight: OperandRow | None
    grad_output: OperandRow | None
    primary_weight_dtype: str | None
    backward_override: str | None
    reason_code: str | None
    reason: str | None
    device: str
    cuda_graph: str | None = None

    def operands(self) -> Iterator[tuple[TensorName, OperandRow]]:
        """The operands that were read, input first."""
        for name in OPERANDS:
            operand = getattr(self, name)
            if operand is not None:
                yield name, operand


@dataclass(frozen=True)
class Difference:
    """One field in which two manifests differ; `module` alone on one side has field "module"."""

    module: str
    field: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.module}: {self.field} was {_show(self.before)}, is {_show(self.after)}"


@dataclass(frozen=True)
class Manifest:
    """What every quantisable module of a model was found doing.

    Attributes:
        rows: one a module, in the order of the model.
        asked: canonical name of the recipe that was asked for, when the reader was told.
    """

    rows: tuple[ManifestRow, ...]
    asked: str | None = None

    def quantized(self) -> tuple[ManifestRow, ...]:
        return tuple(row for row in self.rows if row.quantized)

    def row(self, module: str) -> ManifestRow:
        """The row of one module; KeyError when the model has no such module."""
        for row in self.rows:
            if row.module == module:
                return row
        raise KeyError(module)

    def diff(self, other: Manifest) -> tuple[Difference, ...]:
        """What changed from this manifest to `other`, module by module and field by field."""
        before = {row.module: row for row in self.rows}
        after = {row.module: row for row in other.rows}
        found: list[Difference] = []
        for module in [*before, *(name for name in after if name not in before)]:
            old, new = before.get(module), after.get(module)
            if old is None or new is None:
                found.append(Difference(module, "module", old and "present", new and "present"))
                continue
            for field in dataclasses.fields(ManifestRow):
                was, now = getattr(old, field.name), getattr(new, field.name)
                if was != now:
                    found.append(Difference(module, field.name, was, now))
        return tuple(found)

    def table(self) -> RenderableType:
        """A table for a terminal of 80 columns or more; equal layers share a line."""
        from nemo_fp8_recipes.injection.table import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document as plain data."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "asked": self.asked,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Manifest:
        """Read a document of schema version 1; fields added by later minor writers are ignored.

        Raises:
            ReportError: not a manifest, or of a schema version this package does not read.
        """
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            raise ReportError("This is not a manifest.", key="schema", allowed=[SCHEMA])
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ReportError(
                f"The manifest has schema version {version}.",
                key="schema_version",
                value=version,
                allowed=[SCHEMA_VERSION],
                hint="Read it with the version of nemo_fp8_recipes that wrote it.",
            )
        try:
            rows = tuple(_row(row) for row in document["rows"])
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"The manifest is damaged: {error!r}.", key="rows") from error
        return cls(rows, asked=document.get("asked"))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ReportError(f"The manifest is not JSON: {error}.") from error
        return cls.from_dict(document)


def _row(data: Mapping[str, Any]) -> ManifestRow:
    values = {
        field.name: data[field.name]
        for field in dataclasses.fields(ManifestRow)
        if field.name in data or field.default is dataclasses.MISSING  # one with a default came later
    }
    for tensor in OPERANDS:
        if values[tensor] is not None:
            values[tensor] = _operand(values[tensor])
    return ManifestRow(**values)


def _operand(data: Mapping[str, Any]) -> OperandRow:
    values = {field.name: data[field.name] for field in dataclasses.fields(OperandRow)}
    if values["block"] is not None:
        rows, columns = values["block"]
        values["block"] = (int(rows), int(columns))
    return OperandRow(**values)


def _show(value: object) -> str:
    return "absent" if value is None else str(value)
