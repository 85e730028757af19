"""Reading the manifest back from a built model: what was found there, not what was planned.

The sources are the module's own state after a forward pass: `module.fp8` (the last forward ran quantised),
`module.quantizers` (the objects that made its operands), `module.fp8_meta` (the Transformer Engine recipe and
recipe state it holds) and the parameters. Transformer Engine lays quantizers out three a GEMM in the forward
direction (input, weight, output) and two in the backward one (grad_output, grad_input): `module/base.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.injection.cuda_graphs import graphed_modules
from nemo_fp8_recipes.injection.module_names import NamedModule, model_chunks, named_modules
from nemo_fp8_recipes.injection.operands import format_of, high_precision, read_quantizer, recipe_of
from nemo_fp8_recipes.injection.operations import OperationLinear, linear_path, operation_linears
from nemo_fp8_recipes.injection.peers import derives_from
from nemo_fp8_recipes.injection.rows import Manifest, ManifestRow, OperandRow

if TYPE_CHECKING:
    from torch import nn

    from nemo_fp8_recipes.recipes import Recipe

__all__ = ["REASONS", "manifest"]

REASONS = {
    "output_layer": "Megatron computes the logits outside Transformer Engine",
    "router": "Megatron keeps the router in high precision",
    "attention": "attention runs in high precision (fp8_dpa is off)",
    "bf16_layer": "among the first or last layers kept in BF16",
    "per_module_override": "switched off by a per-module quant_recipe",
    "not_transformer_engine": "not a Transformer Engine module",
    "no_forward": "has not run yet",
    "no_fp8_forward": "has not run in an FP8 context",
    "outside_context": "ran outside every FP8 context",
}
"""Why a module is in high precision: code, and the sentence of the row. The codes are part of the schema."""

_FORWARD_SLOTS = 3
_BACKWARD_SLOTS = 2


def manifest(model: nn.Module | Sequence[nn.Module], recipe: Recipe | None = None) -> Manifest:
    """Read what every quantisable module of a built model does.

    Quantizers exist only after a module's first forward pass: read the manifest after a training step.

    Args:
        model: a model, wrapped or not, or Megatron's list of virtual-pipeline chunks.
        recipe: the recipe asked for; only its name is kept, nothing is compared (see `require_quantized`).

    Returns:
        one row for each Transformer Engine linear and attention, and for each linear layer outside
        Transformer Engine (output layer, router, local layer specs). Embeddings and norms are no GEMMs and
        have no row.
    """
    device = _device_name()
    config = next((chunk.config for chunk in model_chunks(model) if hasattr(chunk, "config")), None)
    graphed = graphed_modules(model)
    modules = tuple(named_modules(model))
    operations = operation_linears(modules)
    rows = [
        dataclasses.replace(row, cuda_graph=graphed.get(id(named.module)))
        for named in modules
        for row in _rows(named, operations.get(id(named.module)), config, device)
    ]
    return Manifest(tuple(rows), asked=recipe.name if recipe is not None else None)


def _rows(
    named: NamedModule, operation: OperationLinear | None, config: Any, device: str
) -> Iterator[ManifestRow]:
    module = named.module
    if operation is not None:
        path = linear_path(named.path)
        yield from _linear_rows(dataclasses.replace(named, path=path, module=operation), config, device)
    elif derives_from(module, "transformer_engine", "TransformerEngineBaseModule"):
        if derives_from(module, "transformer_engine", "DotProductAttention"):
            yield _attention_row(named, config, device)
        else:
            yield from _linear_rows(named, config, device)
    elif (code := _outside_transformer_engine(named)) is not None:
        yield _high_precision_row(named, code, device)


def _outside_transformer_engine(named: NamedModule) -> str | None:
    """The reason code of a GEMM that is no Transformer Engine module, None for a module that is no GEMM."""
    module = named.module
    if derives_from(module, "megatron", "Router"):
        return "router"
    if derives_from(module, "megatron", "ColumnParallelLinear", "RowParallelLinear", "DotProductAttention"):
        return "output_layer" if named.path.rsplit(".", 1)[-1] == "output_layer" else "not_transformer_engine"
    if derives_from(module, "torch", "Linear"):
        return "not_transformer_engine"
    return None


def _linear_rows(named: NamedModule, config: Any, device: str) -> Iterator[ManifestRow]:
    """One row, or one for each GEMM of a module whose GEMMs are quantised differently."""
    module: Any = named.module
    forward = module.quantizers.get("scaling_fwd") or []
    if not module.fp8 or not forward:
        yield _high_precision_row(named, _why_not(named, config), device)
        return
    gemms = [_read_gemm(module, index) for index in range(len(forward) // _FORWARD_SLOTS)]
    different = any(gemm != gemms[0] for gemm in gemms)
    for index, (recipe, operands) in enumerate(gemms if different else gemms[:1]):
        yield ManifestRow(
            module=f"{named.path}.gemm{index}" if different else named.path,
            module_class=_class_name(module),
            quantized=True,
            recipe=recipe,
            te_recipe=_te_recipe(module),
            input=operands["input"],
            weight=operands["weight"],
            grad_output=operands["grad_output"],
            primary_weight_dtype=_primary_weight_dtype(module),
            backward_override=_backward_override(module),
            reason_code=None,
            reason=None,
            device=device,
        )


def _read_gemm(module: Any, index: int) -> tuple[str, dict[str, OperandRow]]:
    """Recipe and operands of one GEMM of a module."""
    forward = module.quantizers["scaling_fwd"][index * _FORWARD_SLOTS :]
    backward = module.quantizers["scaling_bwd"][index * _BACKWARD_SLOTS :]
    quantizers = {"input": forward[0], "weight": forward[1], "grad_output": backward[0]}
    operands = {
        tensor: read_quantizer(quantizer, amax_history_len=_history_length(module, tensor))
        for tensor, quantizer in quantizers.items()
    }
    recipes = {recipe_of(quantizer) for quantizer in quantizers.values()}
    if _backward_override(module) is not None:
        # Transformer Engine then drops the gradient's quantizer in backward: linear.py, `_linear_setup_ctx`.
        operands["grad_output"] = high_precision(module.activation_dtype)
    return (recipes.pop() if len(recipes) == 1 else "mixed"), operands


def _attention_row(named: NamedModule, config: Any, device: str) -> ManifestRow:
    module: Any = named.module
    te_recipe = module.fp8_meta.get("recipe")
    if not (module.fp8 and te_recipe is not None and (te_recipe.fp8_dpa or te_recipe.fp8_mha)):
        code = _why_not(named, config)
        return _high_precision_row(named, "attention" if code == "outside_context" else code, device)
    recipes = {recipe_of(quantizer) for quantizer in module.quantizers["scaling_fwd"]}
    return ManifestRow(
        module=named.path,
        module_class=type(module).__name__,
        quantized=True,
        recipe=recipes.pop() if len(recipes) == 1 else "mixed",
        te_recipe=_te_recipe(module),
        input=None,
        weight=None,
        grad_output=None,
        primary_weight_dtype=None,
        backward_override=_backward_override(module),
        reason_code=None,
        reason=None,
        device=device,
    )


def _high_precision_row(named: NamedModule, code: str, device: str) -> ManifestRow:
    return ManifestRow(
        module=named.path,
        module_class=_class_name(named.module),
        quantized=False,
        recipe="bf16",
        te_recipe=None,
        input=None,
        weight=None,
        grad_output=None,
        primary_weight_dtype=_primary_weight_dtype(named.module),
        backward_override=None,
        reason_code=code,
        reason=REASONS[code],
        device=device,
    )


def _class_name(module: Any) -> str:
    """What ran, which may be an operation."""
    runs = (module.operation or module.module) if isinstance(module, OperationLinear) else module
    return type(runs).__name__


def _why_not(named: NamedModule, config: Any) -> str:
    """Why a Transformer Engine module did not run quantised."""
    module: Any = named.module
    if not getattr(module, "forwarded_at_least_once", module.activation_dtype is not None):
        return "no_fp8_forward" if getattr(module, "operation", None) is not None else "no_forward"
    if getattr(module, "te_quant_params", None) is not None:
        return "per_module_override"
    if named.layer is not None and _in_bf16(config, named.layer):
        return "bf16_layer"
    return "outside_context"


def _in_bf16(config: Any, layer: int) -> bool:
    """Megatron's rule for a 0-based layer of the whole model: `fp8_utils.is_first_last_bf16_layer`."""
    if not getattr(config, "first_last_layers_bf16", False):
        return False
    return bool(
        layer < config.num_layers_at_start_in_bf16
        or layer >= config.num_layers - config.num_layers_at_end_in_bf16
    )


def _history_length(module: Any, tensor: str) -> int | None:
    state = module.fp8_meta.get("scaling_bwd" if tensor == "grad_output" else "scaling_fwd")
    history = getattr(state, "amax_history", None)
    return None if history is None else int(history.shape[0])


def _backward_override(module: Any) -> str | None:
    # The option exists since Transformer Engine 2.15; a recipe of an older one always quantises backward.
    return getattr(module.fp8_meta.get("recipe"), "backward_override", None)


def _te_recipe(module: Any) -> str | None:
    recipe = module.fp8_meta.get("recipe")
    return None if recipe is None else type(recipe).__name__


def _primary_weight_dtype(module: nn.Module) -> str | None:
    """Storage dtype of the weight parameter: a torch name, or the format of a quantised primary weight."""
    weight: Any = next(
        (p for n, p in module.named_parameters(recurse=False) if "weight" in n and "norm" not in n), None
    )
    if weight is None:
        return None
    if derives_from(weight, "transformer_engine", "QuantizedTensor", "QuantizedTensorStorage"):
        dtype = getattr(weight, "_fp8_dtype", None) or getattr(weight, "_fp4_dtype", None)
        return type(weight).__name__ if dtype is None else format_of(dtype)
    return str(weight.dtype).removeprefix("torch.")


def _device_name() -> str:
    """The name that torch gives the device; the emulated device says in it that it is emulated."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"
