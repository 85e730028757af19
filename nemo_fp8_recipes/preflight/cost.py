"""What a recipe costs on one rank: bytes held by the linear layers, and the work of their GEMMs.

Formulas and what they leave out are in docs/doctor.md. M tokens, N output and K input features on the rank.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_fp8_recipes.preflight.hardware import Capability, any_gemm_layout
from nemo_fp8_recipes.preflight.shapes import Linear, ModelShape, Parallel, linears
from nemo_fp8_recipes.recipes import OperandPlan, Recipe
from nemo_fp8_recipes.recipes.modules import ModuleRecipe, recipe_of_module

__all__ = ["Cost", "cost", "quantised_bytes"]

BF16, FP32 = 2, 4  # bytes
# Its input is attention's output, which attention itself saves in BF16: Megatron lets it keep that one
# (megatron/core/transformer/attention.py: set_save_original_input), except with delayed scaling.
ATTENTION_OUTPUT = "self_attention.linear_proj"
_KINDS: dict[str, Literal["*", "-", "M", "E"]] = {
    "self_attention": "*",
    "mlp.linear": "-",
    "mixer": "M",
    "mlp": "E",
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One rank of the first pipeline stage, one micro-batch. Bytes and floating-point operations.

    Attributes:
        weights: the linear layers' weights as parameters and as the GEMMs read them.
        saved_inputs: inputs of the linear layers that wait for the backward pass.
        gemm_flops: forward and backward GEMMs of linear layers, attention and output layer.
        quantised_flops: those of them that run in FP8 or FP4.
        gemm_bytes: what the linear layers' GEMMs read and write.
    """

    weights: int
    saved_inputs: int
    gemm_flops: int
    quantised_flops: int
    gemm_bytes: int

    @property
    def held(self) -> int:
        """Bytes of weights and saved inputs together."""
        return self.weights + self.saved_inputs

    @property
    def quantised_share(self) -> float:
        """Share of the GEMM work that is quantised, 0 to 1."""
        return self.quantised_flops / self.gemm_flops if self.gemm_flops else 0.0

    def to_dict(self) -> dict[str, float]:
        """A mapping that JSON can hold."""
        names = ("weights", "saved_inputs", "gemm_flops", "quantised_flops", "gemm_bytes")
        return {**{name: getattr(self, name) for name in names}, "quantised_share": self.quantised_share}


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def quantised_bytes(plan: OperandPlan, rows: int, columns: int, *, columnwise: bool) -> int:
    """Data and scales of a [rows, columns] operand in one direction, as TE's tensors lay them out.

    Sources: `get_scale_shape` in TE's pytorch/tensor/float8_blockwise_tensor.py, mxfp8_tensor.py and
    nvfp4_tensor.py; a per-tensor scale is one FP32.
    """
    elements = rows * columns
    if plan.block is None:
        return elements + FP32
    outer, inner = (columns, rows) if columnwise else (rows, columns)
    block_outer, block = plan.block
    if plan.scale_dtype == "fp32":
        if block_outer == 1:
            return elements + -(-inner // block) * _up(outer, 4) * FP32
        return elements + -(-outer // block) * _up(-(-inner // block), 4) * FP32
    scales = _up(outer, 128) * _up(-(-inner // block), 4)
    if plan.format == "e2m1":
        return elements // 2 + scales + FP32  # and the tensor's amax
    return elements + scales


@functools.lru_cache(maxsize=512)
def cost(
    recipe: Recipe,
    capability: Capability | None,
    model: ModelShape,
    parallel: Parallel,
    modules: tuple[ModuleRecipe, ...] = (),
) -> Cost:
    """What `recipe` costs for this model on one rank; of an unknown device, as on Hopper.

    Args:
        modules: single modules with another recipe, `recipe_modules`.
    """
    totals = {"weights": 0, "saved_inputs": 0, "gemm_flops": 0, "quantised_flops": 0, "gemm_bytes": 0}
    for linear in linears(model, parallel):
        for theirs, layers in _layers(linear, recipe, model, modules).items():
            for name, amount in _of_one(linear, theirs, capability).items():
                totals[name] += amount * layers * linear.copies // parallel.pp
    tokens = model.seq_length * model.micro_batch_size // parallel.cp
    attention = model.num_attention_heads * model.head_size // parallel.tp
    totals["gemm_flops"] += (
        3 * 2 * 2 * tokens * model.seq_length * attention * model.layers("*") // parallel.pp
    )
    totals["gemm_flops"] += (
        3 * 2 * tokens * model.hidden_size * model.padded_vocabulary(parallel.tp) // parallel.tp
    )
    return Cost(**totals)


def _layers(
    linear: Linear, recipe: Recipe, model: ModelShape, modules: Sequence[ModuleRecipe]
) -> Counter[Recipe | None]:
    """How many of the layers with `linear` have it in which recipe; None: in BF16."""
    found: Counter[Recipe | None] = Counter()
    for layer in _layers_with(linear, model):
        theirs = recipe_of_module(f"decoder.layers.{layer}.{linear.name}", recipe, modules)
        # A module quantised on its own is so in a layer that stays in BF16 too.
        high = theirs.precision == "bf16" or (theirs is recipe and _stays_in_bf16(layer, recipe, model))
        found[None if high else theirs] += 1
    return found


def _layers_with(linear: Linear, model: ModelShape) -> Sequence[int]:
    """The numbers of the layers that have `linear`, counted from 0 in the whole model."""
    if model.hybrid is None:
        return range(linear.layers)
    kind = next(kind for prefix, kind in _KINDS.items() if linear.name.startswith(prefix))
    return [layer for layer, sign in enumerate(model.hybrid.layer_pattern) if sign == kind]


def _stays_in_bf16(layer: int, recipe: Recipe, model: ModelShape) -> bool:
    start, end = recipe.num_layers_at_start_in_bf16, recipe.num_layers_at_end_in_bf16  # type: ignore[attr-defined]  # every recipe has them
    return bool(layer < start or layer >= model.num_layers - end)


def _of_one(linear: Linear, recipe: Recipe | None, capability: Capability | None) -> dict[str, int]:
    """One layer's `linear`; `recipe` None: in BF16."""
    m, local, n, k = linear.tokens, linear.local_tokens, linear.output_features, linear.input_features
    flops = 3 * 2 * m * n * k
    x, w, dy = BF16 * m * k, BF16 * n * k, BF16 * m * n
    weights, saved = w, BF16 * local * k
    plans = recipe.operands() if recipe is not None else {}
    if recipe is None or not plans:
        return {
            "weights": weights,
            "saved_inputs": saved,
            "gemm_flops": flops,
            "quantised_flops": 0,
            "gemm_bytes": 2 * x + 2 * w + 2 * dy + x + FP32 * n * k,
        }
    backward = "grad_output" in plans
    one_copy = plans["weight"].block is None and capability is not None and any_gemm_layout(capability)
    qw = quantised_bytes(plans["weight"], n, k, columnwise=False)
    qw_back = quantised_bytes(plans["weight"], n, k, columnwise=True)
    qx = quantised_bytes(plans["input"], m, k, columnwise=False)
    if plans["weight"].block is None:
        qw_back = n * k  # both directions share the tensor's one scale
    weights = qw if one_copy else qw + qw_back
    if not backward:
        weights = qw + w
    elif not recipe.fp8_param:  # type: ignore[attr-defined]  # every recipe has it
        weights += w
    if backward:
        kept_unquantised = linear.name == ATTENTION_OUTPUT and recipe.name != "delayed"
        saved = quantised_bytes(plans["input"], local, k, columnwise=not one_copy)
        if kept_unquantised:
            saved = BF16 * local * k
        qx_back = quantised_bytes(plans["input"], m, k, columnwise=True)
        qdy = quantised_bytes(plans["grad_output"], m, n, columnwise=False)
        qdy_back = quantised_bytes(plans["grad_output"], m, n, columnwise=True)
        rest = qdy + qw_back + x + qdy_back + qx_back + FP32 * n * k
    else:
        rest = dy + w + x + dy + x + FP32 * n * k
    return {
        "weights": weights,
        "saved_inputs": saved,
        "gemm_flops": flops,
        "quantised_flops": flops if backward else flops // 3,
        "gemm_bytes": qx + qw + dy + rest,
    }
