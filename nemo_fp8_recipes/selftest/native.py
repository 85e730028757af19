"""What the device's kernels make of a case, through TE's own quantizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fp8_recipes.selftest.cases import Case

__all__ = ["native", "update", "why_not"]


def why_not(recipe: str) -> str | None:
    """Why this device cannot quantise for a recipe, in TE's words; None when it can."""
    from transformer_engine.pytorch import quantization

    check = {
        "mxfp8": quantization.check_mxfp8_support,
        "blockwise": quantization.check_fp8_block_scaling_support,
        "nvfp4": getattr(quantization, "check_nvfp4_support", None),
    }.get(recipe, quantization.check_fp8_support)
    if check is None:
        return "this release of Transformer Engine has no NVFP4"
    can, reason = check()
    return None if can else str(reason)


def native(case: Case, x: Tensor) -> dict[str, Tensor]:
    """Name of a buffer -> its content on the host, named and cropped as `expected` does."""
    quantizer = _quantizer(case)
    quantized = quantizer(x.to("cuda"))
    m, k = x.shape
    if case.recipe in ("delayed", "tensorwise"):
        found = {"data": quantized._data, "scale_inv": quantized._scale_inv}
        if case.recipe == "delayed":
            found["amax"] = quantizer.amax
        return {
            name: buffer.detach().cpu().reshape(-1) if name == "amax" else buffer.detach().cpu()
            for name, buffer in found.items()
        }
    found = {
        name: getattr(quantized, f"_{name}").detach().cpu()
        for name in ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
    }
    if case.recipe == "mxfp8":
        found["rowwise_scale_inv"] = found["rowwise_scale_inv"][:m, : k // 32]
        found["columnwise_scale_inv"] = found["columnwise_scale_inv"][: m // 32, :k]
    elif case.recipe == "nvfp4":
        found["rowwise_scale_inv"] = found["rowwise_scale_inv"].view(torch.uint8)[:m, : k // 16]
        found["columnwise_scale_inv"] = found["columnwise_scale_inv"].view(torch.uint8)[:k, : m // 16]
        for direction in ("rowwise", "columnwise"):
            found[f"amax_{direction}"] = getattr(quantized, f"_amax_{direction}").detach().cpu()
    else:
        one_d = case.options["dim"] == 1
        for direction, (rows, columns) in {"rowwise": (m, k), "columnwise": (k, m)}.items():
            scale, blocks = found[f"{direction}_scale_inv"], -(-columns // 128)
            found[f"{direction}_scale_inv"] = scale[:, :rows].t() if one_d else scale[:, :blocks]
    return {
        name: (buffer if buffer.dtype == torch.float32 else buffer.view(torch.uint8)).contiguous()
        for name, buffer in found.items()
    }


def update(
    histories: Sequence[Tensor], scales: Sequence[Tensor], reduced: Tensor, algorithm: str, margin: float
) -> None:
    """The fused amax and scale update of delayed scaling, in place, on the device's copies."""
    import transformer_engine_torch as tex

    on_device = [[tensor.to("cuda") for tensor in tensors] for tensors in (histories, scales)]
    tex.fused_amax_and_scale_update_after_reduction(
        reduced.to("cuda"), *on_device, algorithm, tex.DType.kFloat8E4M3, margin
    )
    for mine, theirs in zip((*histories, *scales), (*on_device[0], *on_device[1]), strict=True):
        mine.copy_(theirs)


def _quantizer(case: Case) -> Any:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor, mxfp8_tensor

    options = case.options
    formats = {"e4m3": tex.DType.kFloat8E4M3, "e5m2": tex.DType.kFloat8E5M2}
    fmt = formats[options.get("fmt", "e4m3")]
    if case.recipe == "delayed":
        scale, amax = (torch.tensor([value], device="cuda") for value in (options["scale"], 0.0))
        return float8_tensor.Float8Quantizer(scale, amax, fmt, rowwise=True, columnwise=False)
    if case.recipe == "tensorwise":
        return float8_tensor.Float8CurrentScalingQuantizer(
            fmt,
            torch.device("cuda"),
            rowwise=True,
            columnwise=False,
            force_pow_2_scales=options.get("power_of_two", False),
            amax_epsilon=options.get("epsilon", 0.0),
        )
    if case.recipe == "blockwise":
        return float8_blockwise_tensor.Float8BlockQuantizer(
            fmt,
            rowwise=True,
            columnwise=True,
            force_pow_2_scales=True,
            amax_epsilon=options["epsilon"],
            block_scaling_dim=options["dim"],
        )
    if case.recipe == "mxfp8":
        return mxfp8_tensor.MXFP8Quantizer(fmt, rowwise=True, columnwise=True)
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    hadamard = bool(options.get("hadamard"))
    return NVFP4Quantizer(
        rowwise=True,
        columnwise=True,
        with_2d_quantization=options["two_d"],
        with_rht=hadamard,
        with_post_rht_amax=hadamard,
        stochastic_rounding=bool(options.get("stochastic")),
    )
