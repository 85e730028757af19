"""Telemetry's compiled kernel on what Transformer Engine's quantizers store, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import run_emulated

QUANTIZERS = """
    import torch
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import (
        Float8BlockQuantizer, Float8CurrentScalingQuantizer, MXFP8Quantizer, NVFP4Quantizer)
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer
    from nemo_fp8_recipes.telemetry import host_kernels
    from nemo_fp8_recipes.telemetry.linears import Operand
    from nemo_fp8_recipes.telemetry.probes.elements import ElementProbe
    from nemo_fp8_recipes.telemetry.probes.index import IndexCache

    E4M3 = tex.DType.kFloat8E4M3
    make = {
        "delayed": lambda **usage: Float8Quantizer(
            torch.full((1,), 3.0), torch.zeros(1), E4M3, **usage),
        "tensorwise": lambda **usage: Float8CurrentScalingQuantizer(
            E4M3, device=torch.device("cuda"), **usage),
        "blockwise": lambda **usage: Float8BlockQuantizer(E4M3, **usage),
        "blockwise squares": lambda **usage: Float8BlockQuantizer(E4M3, block_scaling_dim=2, **usage),
        "mxfp8": lambda **usage: MXFP8Quantizer(E4M3, **usage),
        "nvfp4": lambda **usage: NVFP4Quantizer(**usage),
        "nvfp4 squares": lambda **usage: NVFP4Quantizer(with_2d_quantization=True, **usage),
    }
    x = torch.randn(256, 384) * torch.exp2(torch.randint(-12, 4, (256, 384)).float())
    x = x.bfloat16()
    x[3] = 0

    def read(quantizer, *tensors):
        probe = ElementProbe(IndexCache())
        for source in tensors:
            probe.quantised(Operand("m", "input"), quantizer, quantizer(source), source)
        reading = probe.end()
        if reading is None:
            return None
        return {spec.name: value for spec, value in zip(reading.specs, reading.values.tolist())}

    def by_torch(*arguments):
        kernel, host_kernels.measure = host_kernels.measure, None
        try:
            return read(*arguments)
        finally:
            host_kernels.measure = kernel

    def same(found, expected):
        assert found.keys() == expected.keys()
        for name in found:  # the torch operations sum in fp32
            assert abs(found[name] - expected[name]) <= 1e-3 * abs(expected[name]), (name, found, expected)
            if name in ("elements", "zero_elements", "underflows", "saturated", "nonfinite", "largest"):
                assert found[name] == expected[name], (name, found, expected)
"""


def test_the_kernel_reads_what_every_quantizer_stores() -> None:
    run_emulated(
        QUANTIZERS
        + """
    calls = []
    kernel = host_kernels.measure
    host_kernels.measure = lambda *given: calls.append(kernel(*given)) or calls[-1]
    for name, of in make.items():
        for optimised in (False, True):
            quantizer = of(rowwise=True, columnwise=True)
            quantizer.optimize_for_gemm = optimised
            before = len(calls)
            found = read(quantizer, x, x * 3, x.view(2, 128, 384))
            assert len(calls) == before + 3 and all(call is not None for call in calls), name
            same(found, by_torch(quantizer, x, x * 3, x.view(2, 128, 384)))
            assert found["elements"] == 3 * 256 * 384 and found["underflows"] > 0
    """,
        device="b200",
    )


def test_a_tensor_that_is_quantised_columnwise_only() -> None:
    """Its blocks are those of the transposed tensor's rows; what is read rowwise too counts once."""
    run_emulated(
        QUANTIZERS
        + """
    rows = x[:128]  # few enough elements that none is left out where the bulk is estimated
    for name in ("blockwise", "blockwise squares", "mxfp8"):
        for optimised in (False, True):
            quantizer = make[name](rowwise=False, columnwise=True)
            quantizer.optimize_for_gemm = optimised
            found = read(quantizer, rows)
            same(found, by_torch(quantizer, rows))
            same(found, read(make[name](rowwise=True, columnwise=False), rows.t().contiguous()))

            probe = ElementProbe(IndexCache())
            for usage in ({"rowwise": True, "columnwise": False}, {"rowwise": False, "columnwise": True}):
                one = make[name](**usage)
                probe.quantised(Operand("m", "grad_output"), one, one(rows), rows)
            reading = probe.end()
            assert reading.values[0] == rows.numel() and len(reading.specs) == len(found)
            assert probe.end() is None
    assert read(make["nvfp4"](rowwise=False, columnwise=True), rows) is None
    """,
        device="b200",
    )


@pytest.mark.parametrize("how", ["switched off", "no compiler"])
def test_without_compiled_kernels_the_torch_operations_do_it(how: str, tmp_path: Path) -> None:
    missing = {"CXX": "/nonexistent/c++", "XDG_CACHE_HOME": str(tmp_path)}
    run_emulated(
        QUANTIZERS
        + """
    from nemo_fp8_recipes.emulation.kernels import library
    assert library() is None and host_kernels.measure is not None
    quantizer = make["mxfp8"](rowwise=True, columnwise=True)
    assert read(quantizer, x) == by_torch(quantizer, x)
    """,
        device="b200",
        env={"NEMO_FP8_KERNELS": "eager"} if how == "switched off" else missing,
    )


def test_a_tensor_without_memory_is_left_to_torch() -> None:
    run_emulated("""
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from nemo_fp8_recipes.emulation.kernels import for_codes, for_tensor
        from nemo_fp8_recipes.telemetry import host_kernels
        from nemo_fp8_recipes.telemetry.coded import Coded

        real = torch.zeros(32, 64)
        with FakeTensorMode():
            source = torch.zeros(32, 64, dtype=torch.bfloat16, device="cuda")
            coded = Coded(torch.zeros(32, 64, dtype=torch.uint8), torch.zeros(1, 1), "e4m3", (32, 64))
        assert for_tensor(source) is None and for_codes(coded.codes) is None
        assert host_kernels.measure(source, coded) is None
        assert host_kernels.measure(real, coded) is None
    """)
