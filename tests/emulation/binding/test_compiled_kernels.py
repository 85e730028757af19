"""With and without the compiled kernels every quantised tensor has the same buffers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from nemo_fp8_recipes.emulation import kernels
from nemo_fp8_recipes.emulation.kernels import SlowKernelsWarning, build, compiled
from tests.emulation.binding.architecture import BLACKWELL, HOPPER
from tests.numerics.inputs import mixed

pytestmark = [
    pytest.mark.usefixtures("emulated"),
    pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler here"),
]

BUFFERS = (
    "_data",
    "_transpose",
    "_scale_inv",
    "_rowwise_data",
    "_columnwise_data",
    "_rowwise_scale_inv",
    "_columnwise_scale_inv",
    "_amax_rowwise",
    "_amax_columnwise",
)


@contextmanager
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_looked", False)
        patch.setattr(compiled, "_library", None)
        patch.setenv("PATH", "/nonexistent")
        patch.delenv("CXX", raising=False)
        yield


def quantizers(kind: str, fp8: Any, **usages: bool) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import (
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
    )
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    if kind == "delayed":
        return Float8Quantizer(torch.tensor([3.5]), torch.tensor([0.25]), fp8, **usages)
    if kind == "tensorwise":
        return Float8CurrentScalingQuantizer(fp8, torch.device("cuda"), **usages)
    if kind == "mxfp8":
        return MXFP8Quantizer(fp8, **usages)
    if kind == "blockwise 1d":
        return Float8BlockQuantizer(fp8, block_scaling_dim=1, **usages)
    if kind == "blockwise 2d":
        return Float8BlockQuantizer(fp8, block_scaling_dim=2, **usages)
    rht = kind == "nvfp4 rht"
    return NVFP4Quantizer(
        with_rht=rht,
        with_post_rht_amax=rht,
        with_2d_quantization=kind == "nvfp4 2d",
        stochastic_rounding=kind == "nvfp4 stochastic",
        **usages,
    )


@pytest.mark.parametrize("columnwise", [True, False], ids=["both", "rowwise"])
@pytest.mark.parametrize(
    "kind",
    [
        "delayed",
        "tensorwise",
        "mxfp8",
        "blockwise 1d",
        "blockwise 2d",
        "nvfp4 1d",
        "nvfp4 2d",
        "nvfp4 stochastic",
        "nvfp4 rht",
    ],
)
def test_buffers_and_values_are_the_same(
    kind: str,
    columnwise: bool,
    pose: Callable[[tuple[int, int]], None],
    tex: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pose(BLACKWELL if kind.startswith(("mxfp8", "nvfp4")) else HOPPER)
    for optimize_for_gemm in (False, True):
        # A view with strides of its own, as activations of attention are.
        x = mixed((192, 2, 128), torch.bfloat16, special=not kind.endswith("rht")).transpose(0, 1)
        found = []
        for eager in (False, True):
            quantizer = quantizers(kind, tex.DType.kFloat8E4M3, rowwise=True, columnwise=columnwise)
            quantizer.optimize_for_gemm = optimize_for_gemm
            torch.manual_seed(0)
            if eager:
                with no_compiler(monkeypatch), warnings.catch_warnings():
                    warnings.simplefilter("ignore", SlowKernelsWarning)
                    quantized = tex.quantize(x, quantizer)
                    assert kernels.library() is None
            else:
                quantized = tex.quantize(x, quantizer)
            found.append((quantized, getattr(quantizer, "amax", None)))
        (fused, fused_amax), (eager, eager_amax) = found
        for name in BUFFERS:
            mine, reference = getattr(fused, name, None), getattr(eager, name, None)
            assert (mine is None) == (reference is None), name
            if mine is not None:
                assert mine.shape == reference.shape
                assert torch.equal(mine, reference), name
        if isinstance(fused_amax, torch.Tensor):
            assert torch.equal(fused_amax, eager_amax)
        _same_operands(fused, monkeypatch)


def _same_operands(quantized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_fp8_recipes.emulation.binding import operands

    for columnwise in (False, True):
        has = getattr(quantized, "_columnwise_data" if columnwise else "_rowwise_data", None)
        if has is None and not (hasattr(quantized, "_data") and not columnwise):
            continue
        read = operands.operand("A", quantized, columnwise=columnwise)
        mine, _ = read.matrix()
        with no_compiler(monkeypatch), warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowKernelsWarning)
            reference, _ = read.matrix()
        assert torch.equal(mine.nan_to_num(nan=9e9), reference.nan_to_num(nan=9e9))


def test_one_warning_says_why_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(4)
    with no_compiler(monkeypatch):
        with pytest.warns(SlowKernelsWarning, match="slower. Reason: no C\\+\\+ compiler was found"):
            assert kernels.for_tensor(x) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.for_tensor(x) is None


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with no_compiler(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setenv("NEMO_FP8_KERNELS", "eager")
        assert kernels.library() is None


@pytest.mark.parametrize(
    "x", [torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int32)], ids=["float64", "int32"]
)
def test_what_they_cannot_read_goes_to_the_reference(x: torch.Tensor) -> None:
    assert kernels.for_tensor(x) is None
    assert kernels.for_tensor(x.float()) is not None
