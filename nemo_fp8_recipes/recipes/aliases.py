"""The other tools' names for our recipes, and what becomes of what else those names imply.

Sources: Megatron-Core `fp8_recipe`, the performance command lines of NeMo 2 and Megatron-Bridge, the mixed
precision factories of both, TE's classes and debug prefixes, Automodel, torchao and torchtitan.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALIASES", "NO_EQUIVALENT", "Alias"]

_BLOCKWISE_FORMAT = (
    "There it means hybrid; fp8_format stays e4m3, TE's default, unless set. "
    "fp8_recipe=bf16_with_fp8_subchannel_scaling_mixed is the preset as it is there."
)


@dataclass(frozen=True)
class Alias:
    """A name of another tool: the recipe or preset it means, whose name it is, and what to know about it."""

    means: str
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
    # mixed precision factories of NeMo and Megatron-Bridge; those named as here are presets of that name
    "bf16_mixed": Alias("bf16", "NeMo and Megatron-Bridge"),
    "bf16_with_fp8_delayed_scaling_mixed": Alias("bf16_with_fp8_mixed", "Megatron-Bridge"),
    "nemotron_h_bf16_with_fp8_current_scaling_mixed": Alias("nemotron_h", "NeMo and Megatron-Bridge"),
    "nanov2_bf16_with_fp8_current_scaling_mixed": Alias(
        "nemotron_nano_v2",
        "NeMo and Megatron-Bridge",
        "Its name says current scaling, but it sets blockwise.",
    ),
    "nemotron_3_super_bf16_with_nvfp4_mixed": Alias("nemotron_3_super", "Megatron-Bridge"),
    "nemotron_3_ultra_bf16_with_nvfp4_mixed": Alias("nemotron_3_ultra", "Megatron-Bridge"),
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

_FP16 = "This package trains in BF16; the factory of the same name with bf16_ is a preset."
_NO_ROWWISE = "torchao scales whole rows; Transformer Engine has no such recipe. The nearest is blockwise."

# Names of recipes that Transformer Engine does not have: the nearest spelling would mislead.
NO_EQUIVALENT: dict[str, str] = {
    "rowwise": _NO_ROWWISE,
    "rowwise_with_gw_hp": _NO_ROWWISE,
    "mxfp8_floor": "Rounding the scale down can make training diverge; Transformer Engine rounds up (mxfp8).",
    "fp16_mixed": _FP16,
    "fp16_with_fp8_mixed": _FP16,
    "fp16_with_fp8_delayed_scaling_mixed": _FP16,
    "fp16_with_fp8_current_scaling_mixed": _FP16,
    "fp16_with_fp8_subchannel_scaling_mixed": _FP16,
    "fp16_with_mxfp8_mixed": _FP16,
    "custom": "A quantizer factory is not a recipe of ours; give it to Megatron as fp8_quantizer_factory.",
}
