"""The other tools' names for our recipes, and what becomes of what else those names imply.

Sources: Megatron-Core `fp8_recipe`, the performance command lines of NeMo 2 and Megatron-Bridge, the mixed
precision factories of both, TE's classes and debug prefixes, Automodel, torchao and torchtitan.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALIASES", "NO_EQUIVALENT", "Alias"]

_BLOCKWISE_FORMAT = "The preset's format is hybrid; fp8_format stays e4m3, TE's default, unless set."
_FIRST_LAST = (
    "The preset also keeps first and last layers in BF16: set num_layers_at_start_in_bf16 and "
    "num_layers_at_end_in_bf16 for that."
)


@dataclass(frozen=True)
class Alias:
    """A name of another tool: the canonical recipe, whose name it is, and what it does not carry over."""

    canonical: str
    vocabulary: str
    note: str = ""


ALIASES: dict[str, Alias] = {
    # NeMo 2 performance command line
    "ds": Alias("delayed", "NeMo 2"),
    "cs": Alias("tensorwise", "NeMo 2"),
    "ss": Alias("blockwise", "NeMo 2", _BLOCKWISE_FORMAT),
    # Megatron-Bridge performance command line
    "fp8_ds": Alias("delayed", "Megatron-Bridge"),
    "fp8_cs": Alias("tensorwise", "Megatron-Bridge"),
    "fp8_sc": Alias("blockwise", "Megatron-Bridge", _BLOCKWISE_FORMAT),
    "fp8_mx": Alias("mxfp8", "Megatron-Bridge"),
    # mixed precision factories of NeMo and Megatron-Bridge
    "bf16_mixed": Alias("bf16", "NeMo and Megatron-Bridge"),
    "bf16_with_fp8_mixed": Alias("delayed", "NeMo"),
    "bf16_with_fp8_delayed_scaling_mixed": Alias("delayed", "Megatron-Bridge"),
    "bf16_with_fp8_current_scaling_mixed": Alias("tensorwise", "NeMo and Megatron-Bridge", _FIRST_LAST),
    "bf16_with_fp8_subchannel_scaling_mixed": Alias(
        "blockwise", "NeMo and Megatron-Bridge", _BLOCKWISE_FORMAT
    ),
    "bf16_with_mxfp8_mixed": Alias(
        "mxfp8",
        "NeMo and Megatron-Bridge",
        "Older NeMo releases set hybrid here, which diverged on Nemotron; fp8_format stays e4m3 unless set.",
    ),
    "bf16_with_nvfp4_mixed": Alias("nvfp4", "Megatron-Bridge"),
    "nemotron_h_bf16_with_fp8_current_scaling_mixed": Alias(
        "tensorwise", "NeMo and Megatron-Bridge", _FIRST_LAST
    ),
    "nanov2_bf16_with_fp8_current_scaling_mixed": Alias(
        "blockwise",
        "NeMo and Megatron-Bridge",
        f"Its name says current scaling, but it sets blockwise. {_BLOCKWISE_FORMAT} {_FIRST_LAST}",
    ),
    # TE's classes
    "DelayedScaling": Alias("delayed", "Transformer Engine"),
    "Float8CurrentScaling": Alias("tensorwise", "Transformer Engine"),
    "Float8BlockScaling": Alias("blockwise", "Transformer Engine"),
    "MXFP8BlockScaling": Alias("mxfp8", "Transformer Engine"),
    "NVFP4BlockScaling": Alias("nvfp4", "Transformer Engine"),
    # TE's debug prefixes
    "fp8_delayed_scaling": Alias("delayed", "Transformer Engine's debug features"),
    "fp8_current_scaling": Alias("tensorwise", "Transformer Engine's debug features"),
    "fp8_block_scaling": Alias("blockwise", "Transformer Engine's debug features"),
    # Automodel
    "current": Alias("tensorwise", "Automodel"),
    "block": Alias("blockwise", "Automodel"),
    # torchao, torchtitan
    "mxfp8_rceil": Alias("mxfp8", "torchao"),
}

_NO_ROWWISE = "torchao scales whole rows; Transformer Engine has no such recipe. The nearest is blockwise."

# Names of recipes that Transformer Engine does not have: the nearest spelling would mislead.
NO_EQUIVALENT: dict[str, str] = {
    "rowwise": _NO_ROWWISE,
    "rowwise_with_gw_hp": _NO_ROWWISE,
    "mxfp8_floor": "Rounding the scale down can make training diverge; Transformer Engine rounds up (mxfp8).",
    "custom": "A quantizer factory is not a recipe of ours; give it to Megatron as fp8_quantizer_factory.",
}
