"""Hand-written manifest rows."""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_fp8_recipes.injection import Manifest, ManifestRow, OperandRow

MXFP8 = OperandRow("e4m3", "block", block=(1, 32), scale_dtype="e8m0", power_of_two=True, columnwise=True)


def mxfp8_row(module: str, **changes: Any) -> ManifestRow:
    """A linear layer as fp8_recipe=mxfp8 quantises it."""
    row = ManifestRow(
        module=module,
        module_class="TEColumnParallelLinear",
        quantized=True,
        recipe="mxfp8",
        te_recipe="MXFP8BlockScaling",
        input=MXFP8,
        weight=MXFP8,
        grad_output=MXFP8,
        primary_weight_dtype="bfloat16",
        backward_override=None,
        reason_code=None,
        reason=None,
        device="emulated b200",
    )
    return dataclasses.replace(row, **changes)


def high_precision_row(module: str, code: str, reason: str = "for a reason") -> ManifestRow:
    """A linear layer that is not quantised."""
    return mxfp8_row(
        module,
        quantized=False,
        recipe="bf16",
        te_recipe=None,
        input=None,
        weight=None,
        grad_output=None,
        reason_code=code,
        reason=reason,
    )


def gpt_manifest(layers: int) -> Manifest:
    """All of a GPT model under fp8_recipe=mxfp8."""
    rows = []
    for layer in range(layers):
        prefix = f"decoder.layers.{layer}"
        rows.append(high_precision_row(f"{prefix}.self_attention.core_attention", "attention"))
        for name in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        ):
            rows.append(mxfp8_row(f"{prefix}.{name}"))
    rows.append(high_precision_row("output_layer", "output_layer"))
    return Manifest(tuple(rows), asked="mxfp8")
