"""Codes, scales and layouts of quantised tensors, per format, against `oracle`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.emulation.binding import oracle
from tests.support.te_release import RELEASE, since

DTYPES = [torch.float32, torch.bfloat16]
FORMATS = ["e4m3", "e5m2"]


def dtype_tag(te, fmt):
    return {"e4m3": te.DType.kFloat8E4M3, "e5m2": te.DType.kFloat8E5M2}[fmt]


def delayed(te, fmt="e4m3", scale=3.5, **usages):
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    quantizer = Float8Quantizer(
        scale=torch.tensor([scale]), amax=torch.zeros(1), fp8_dtype=dtype_tag(te, fmt)
    )
    quantizer.set_usage(**usages)
    return quantizer


def tensorwise(te, fmt="e4m3", **options):
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    return Float8CurrentScalingQuantizer(dtype_tag(te, fmt), device=torch.device("cuda"), **options)


def mxfp8(te, fmt="e4m3", **options):
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    return MXFP8Quantizer(dtype_tag(te, fmt), **options)


def blockwise(te, fmt="e4m3", dim=1, **options):
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    return Float8BlockQuantizer(
        dtype_tag(te, fmt), rowwise=True, columnwise=True, block_scaling_dim=dim, **options
    )


def equal(buffer: torch.Tensor, expected: np.ndarray) -> None:
    found = buffer.numpy()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_delayed_casts_with_the_given_scale_and_keeps_the_maximum(te, tex, hopper, dtype, fmt):
    x = torch.randn(16, 48, dtype=dtype) * 40
    quantizer = delayed(te, fmt)
    quantizer.amax.fill_(1e-3)
    tensor = tex.quantize(x, quantizer)
    expected = oracle.per_tensor(x, fmt, 3.5)
    equal(tensor._data, expected.codes)
    equal(tensor._transpose, expected.codes.T)
    assert tensor._scale_inv.shape == (1,)
    assert tensor._scale_inv.item() == expected.scale_inv
    assert quantizer.amax.item() == np.abs(oracle.array(x)).max()
    tex.quantize(x * 0.5, quantizer)
    assert quantizer.amax.item() == np.abs(oracle.array(x)).max()
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, (16, 48))


def test_delayed_writes_the_amax_into_the_history_it_is_a_view_of(te, tex):
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    history = torch.zeros(4, 3)
    quantizer = Float8Quantizer(torch.ones(()), history[0][1], te.DType.kFloat8E4M3)
    assert quantizer.amax.dim() == 0
    tex.quantize(torch.tensor([[1.0, -9.0] * 8]), quantizer)
    assert history[0].tolist() == [0.0, 9.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_tensorwise_scales_by_its_own_amax(te, tex, hopper, dtype, fmt):
    x = torch.randn(32, 64, dtype=dtype) * 7
    tensor = tex.quantize(x, tensorwise(te, fmt))
    expected = oracle.per_tensor(x, fmt)
    equal(tensor._data, expected.codes)
    equal(tensor._transpose, expected.codes.T)
    assert tensor._scale_inv.item() == expected.scale_inv


def test_tensorwise_options_reach_the_scale(te, tex):
    x = torch.randn(16, 16)
    floored = tex.quantize(x, tensorwise(te, amax_epsilon=1000.0))
    assert floored._scale_inv.item() == pytest.approx(1000.0 / 448.0, rel=1e-6)
    rounded = tex.quantize(x, tensorwise(te, force_pow_2_scales=True))
    scale = 1.0 / rounded._scale_inv.item()
    assert np.log2(scale) == np.floor(np.log2(448.0 / x.abs().max().item()))


def test_tensorwise_amax_is_reduced_over_the_group(te, tex, monkeypatch):
    x = torch.randn(16, 16)
    group = object()
    seen = []

    def all_reduce(tensor, op, group):
        seen.append((tensor.clone(), op, group))
        tensor.fill_(100.0)

    quantizer = tensorwise(te, with_amax_reduction=True)
    monkeypatch.setattr(type(quantizer), "_canonicalized_amax_reduction_group", lambda self: group)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    tensor = tex.quantize(x, quantizer)
    assert seen[0][0].item() == x.abs().max().item()
    assert seen[0][1:] == (torch.distributed.ReduceOp.MAX, group)
    assert tensor._scale_inv.item() == np.float32(1.0) / (np.float32(448.0) / np.float32(100.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_mxfp8_against_torchao(te, tex, dtype, fmt):
    x = torch.randn(96, 160, dtype=dtype) * torch.exp2(torch.randint(-20, 20, (96, 160))).to(dtype)
    tensor = tex.quantize(x, mxfp8(te, fmt))
    rowwise, columnwise = oracle.mx(x, fmt), oracle.mx(x, fmt, columnwise=True)
    equal(tensor._rowwise_data, rowwise.codes)
    equal(tensor._columnwise_data, columnwise.codes)
    assert tensor._rowwise_scale_inv.shape == (128, 8)
    assert tensor._columnwise_scale_inv.shape == (4, 256)
    equal(tensor._rowwise_scale_inv[:96, :5], rowwise.scale_inv)
    equal(tensor._columnwise_scale_inv[:3, :160], columnwise.scale_inv)
    assert not tensor._rowwise_scale_inv[96:].any()
    assert not tensor._rowwise_scale_inv[:, 5:].any()


@since("2.14")
def test_mxfp8_scales_are_swizzled_for_the_gemm_on_demand(te, tex):
    x = torch.randn(256, 512)
    natural = tex.quantize(x, mxfp8(te))
    optimised = mxfp8(te)
    optimised.optimize_for_gemm = True
    swizzled = tex.quantize(x, optimised)
    assert not natural._with_gemm_swizzled_scales
    assert swizzled._with_gemm_swizzled_scales
    # cuBLAS documentation, "1D block scaling factors layout": offset of (row, block) in 128 x 4 tiles.
    flat = swizzled._rowwise_scale_inv.reshape(-1)
    flat_columns = swizzled._columnwise_scale_inv.reshape(-1)
    for row, block in [(0, 0), (1, 0), (31, 3), (32, 1), (127, 2), (128, 4), (200, 15), (255, 9)]:
        tile = (row // 128) * (16 // 4) + block // 4
        offset = tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4
        assert flat[offset] == natural._rowwise_scale_inv[row, block]
    for column, block in [(0, 0), (33, 1), (130, 7), (511, 5)]:
        tile = (column // 128) * (8 // 4) + block // 4
        offset = tile * 512 + (column % 32) * 16 + (column % 128) // 32 * 4 + block % 4
        assert flat_columns[offset] == natural._columnwise_scale_inv[block, column]
    torch.testing.assert_close(swizzled.dequantize(), natural.dequantize(), rtol=0, atol=0)
    tex.swizzle_scales_for_gemm_(natural)
    assert torch.equal(natural._rowwise_scale_inv, swizzled._rowwise_scale_inv)
    assert torch.equal(natural._columnwise_scale_inv, swizzled._columnwise_scale_inv)


@since("2.20")
def test_mxfp8_square_blocks_share_codes(te, tex):
    x = torch.randn(64, 64)
    tensor = tex.quantize(x, mxfp8(te, with_2d_quantization=True))
    assert torch.equal(tensor._rowwise_data, tensor._columnwise_data)
    assert tensor._rowwise_data.data_ptr() != tensor._columnwise_data.data_ptr()
    rows, columns = tensor._rowwise_scale_inv[:64, :2], tensor._columnwise_scale_inv[:2, :64]
    assert (rows[:32, 0] == columns[0, :32]).all()
    assert torch.unique(rows[:32, 1]).numel() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_blockwise_1d_layouts(te, tex, hopper, dtype, fmt, power_of_two):
    x = torch.randn(150, 272, dtype=dtype) * torch.exp2(torch.randint(-9, 9, (150, 272))).to(dtype)
    tensor = tex.quantize(x, blockwise(te, fmt, force_pow_2_scales=power_of_two))
    rowwise = oracle.blocks(x, fmt, (1, 128), power_of_two=power_of_two)
    columnwise = oracle.blocks(x, fmt, (128, 1), power_of_two=power_of_two)
    equal(tensor._rowwise_data, rowwise.codes)
    equal(tensor._columnwise_data, columnwise.codes.T)
    assert tensor._rowwise_scale_inv.shape == (3, 152)
    assert tensor._columnwise_scale_inv.shape == (2, 272)
    equal(tensor._rowwise_scale_inv[:, :150], rowwise.scale_inv.T)
    equal(tensor._columnwise_scale_inv, columnwise.scale_inv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blockwise_2d_layouts(te, tex, dtype):
    x = torch.randn(150, 272, dtype=dtype) * 3
    tensor = tex.quantize(x, blockwise(te, dim=2))
    expected = oracle.blocks(x, "e4m3", (128, 128))
    equal(tensor._rowwise_data, expected.codes)
    equal(tensor._columnwise_data, expected.codes.T)
    assert tensor._rowwise_scale_inv.shape == (2, 4)
    assert tensor._columnwise_scale_inv.shape == (3, 4)
    equal(tensor._rowwise_scale_inv[:, :3], expected.scale_inv)
    equal(tensor._columnwise_scale_inv[:, :2], expected.scale_inv.T)


def test_blackwell_refuses_fp32_block_scales(te, tex, blackwell):
    with pytest.raises(RuntimeError, match="requires using power of two scaling factors"):
        tex.quantize(torch.randn(128, 128), blockwise(te, force_pow_2_scales=False))


def test_blackwell_keeps_no_transposed_copy_per_tensor(te, tex, blackwell):
    tensor = tex.quantize(torch.randn(32, 32), tensorwise(te))
    assert tensor._transpose is None
    assert tensor._transpose_invalid
    columnwise_only = tensorwise(te)
    columnwise_only.set_usage(rowwise=False, columnwise=True)
    assert tex.quantize(torch.randn(32, 32), columnwise_only)._data is not None


def test_hopper_cannot_quantise_per_tensor_along_columns_only(te, tex, hopper):
    with pytest.raises(NotImplementedError, match="Columnwise-only per-tensor FP8 quantization"):
        tex.quantize(torch.randn(32, 32), delayed(te, rowwise=False, columnwise=True))


MAKERS = {
    "delayed": delayed,
    "tensorwise": tensorwise,
    "mxfp8": mxfp8,
    "block_1d": blockwise,
    "block_2d": lambda te: blockwise(te, dim=2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_n_d_tensors_are_their_flattened_matrix(te, tex, hopper, name):
    x = torch.randn(4, 32, 64)
    deep, flat = tex.quantize(x, MAKERS[name](te)), tex.quantize(x.view(128, 64), MAKERS[name](te))
    assert tuple(deep.shape) == (4, 32, 64)
    for attribute in ("_data", "_transpose", "_rowwise_data", "_columnwise_data"):
        buffer, expected = getattr(deep, attribute, None), getattr(flat, attribute, None)
        assert (buffer is None) == (expected is None)
        if buffer is None:
            continue
        transposed = attribute == "_transpose" or (attribute == "_columnwise_data" and "block" in name)
        assert tuple(buffer.shape) == ((64, 4, 32) if transposed else (4, 32, 64))
        assert torch.equal(buffer.flatten(), expected.flatten())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("internal", [True, False])
def test_internal_tensors_are_storages(te, tex, name, internal):
    quantizer = MAKERS[name](te)
    quantizer.internal = internal
    tensor = tex.quantize(torch.randn(64, 64, dtype=torch.bfloat16), quantizer)
    assert isinstance(tensor, torch.Tensor) is not internal
    if RELEASE != "2.11":  # whose storages do not say
        assert tensor._dtype == torch.bfloat16
    assert type(tensor._fp8_dtype) is te.DType


@pytest.mark.parametrize("name", MAKERS)
def test_output_is_written_in_place(te, tex, hopper, name):
    quantizer = MAKERS[name](te)
    first, second = torch.randn(64, 64), torch.randn(64, 64) * 9
    tensor = tex.quantize(first, quantizer)
    names = [
        n
        for n in (
            "_data",
            "_transpose",
            "_scale_inv",
            "_rowwise_data",
            "_columnwise_data",
            "_rowwise_scale_inv",
            "_columnwise_scale_inv",
        )
        if getattr(tensor, n, None) is not None
    ]
    pointers = {n: getattr(tensor, n).data_ptr() for n in names}
    shard = (tensor._data if hasattr(tensor, "_data") else tensor._rowwise_data).view(-1)[:100]
    assert tex.quantize(second, quantizer, tensor) is tensor
    fresh = tex.quantize(second, quantizer)
    for n in names:
        assert getattr(tensor, n).data_ptr() == pointers[n]
        assert torch.equal(getattr(tensor, n), getattr(fresh, n))
    rowwise = fresh._data if hasattr(fresh, "_data") else fresh._rowwise_data
    assert torch.equal(shard, rowwise.view(-1)[:100])


@pytest.mark.parametrize("name", MAKERS)
def test_noop_flag_leaves_everything(te, tex, name):
    quantizer = MAKERS[name](te)
    tensor = tex.quantize(torch.randn(64, 64), quantizer)
    before = tensor.dequantize().clone()
    amax = quantizer.amax.clone() if name == "delayed" else None
    tex.quantize(torch.randn(64, 64) * 50, quantizer, tensor, torch.ones(1))
    assert torch.equal(tensor.dequantize(), before)
    if amax is not None:
        assert torch.equal(quantizer.amax, amax)
    tex.quantize(torch.randn(64, 64) * 50, quantizer, tensor, torch.zeros(1))
    assert not torch.equal(tensor.dequantize(), before)


def test_output_gets_the_buffers_of_the_quantizer(te, tex):
    rowwise_only = mxfp8(te)
    rowwise_only.set_usage(rowwise=True, columnwise=False)
    x = torch.randn(32, 64)
    tensor = tex.quantize(x, rowwise_only)
    assert tensor._columnwise_data is None
    tex.quantize(x, mxfp8(te), tensor)
    equal(tensor._columnwise_data, oracle.mx(x, "e4m3", columnwise=True).codes)
    columnwise_only = mxfp8(te)
    columnwise_only.set_usage(rowwise=False, columnwise=True)
    tex.quantize(x, columnwise_only, tensor)
    assert tensor._rowwise_data is None


def test_output_of_another_shape_is_refused(te, tex):
    tensor = tex.quantize(torch.randn(32, 64), tensorwise(te))
    with pytest.raises(RuntimeError, match="shapes need to match"):
        tex.quantize(torch.randn(64, 64), tensorwise(te), tensor)


@pytest.mark.parametrize("name", MAKERS)
def test_empty_tensors(te, tex, name):
    tensor = tex.quantize(torch.empty(0, 64, dtype=torch.bfloat16), MAKERS[name](te))
    assert tuple(tensor.shape) == (0, 64)
    assert tuple(tensor.dequantize(dtype=torch.float32).shape) == (0, 64)


def test_scalars(te, tex, hopper):
    tensor = tex.quantize(torch.tensor(-2.0), tensorwise(te))
    assert tensor._data.shape == tensor._transpose.shape == ()
    assert tex.dequantize(tensor, te.DType.kFloat32).item() == -2.0


def test_strided_input(te, tex):
    x = torch.randn(64, 96).t()
    tensor = tex.quantize(x, tensorwise(te))
    equal(tensor._data, oracle.per_tensor(x.contiguous(), "e4m3").codes)


def test_mxfp8_dimensions(te, tex):
    with pytest.raises(RuntimeError, match=r"divisible by 32 \(got shape=\(48, 64\)\)"):
        tex.quantize(torch.randn(48, 64), mxfp8(te))
    if RELEASE in ("2.11", "2.14"):
        return
    with pytest.raises(RuntimeError, match="divisible by 32"):
        tex.create_empty_quantized_tensor(mxfp8(te), [64, 40], torch.float32, torch.device("cpu"), False)


@pytest.mark.parametrize("otype", ["kFloat32", "kFloat16", "kBFloat16"])
def test_dequantize_honours_the_dtype(te, tex, otype):
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    wanted = {"kFloat32": torch.float32, "kFloat16": torch.float16, "kBFloat16": torch.bfloat16}[otype]
    for tensor, expected in [
        (tex.quantize(x, tensorwise(te)), oracle.per_tensor(x, "e4m3")),
        (tex.quantize(x, mxfp8(te)), oracle.mx(x, "e4m3")),
    ]:
        found = tex.dequantize(tensor, getattr(te.DType, otype))
        assert found.dtype == wanted
        torch.testing.assert_close(found, torch.from_numpy(expected.values).to(wanted), rtol=0, atol=0)


def test_dequantize_refuses_what_the_kernel_refuses(te, tex):
    tensor = tex.quantize(torch.randn(128, 128), blockwise(te))
    with pytest.raises(RuntimeError, match="Not implemented scaling mode: NVTE_BLOCK_SCALING_1D"):
        tex.dequantize(tensor, te.DType.kFloat32)


def test_mxfp8_cannot_be_dequantised_before_blackwell(te, tex, hopper):
    tensor = tex.quantize(torch.randn(32, 32), mxfp8(te))
    with pytest.raises(RuntimeError, match="NOT supported by architectures < 10"):
        tex.dequantize(tensor, te.DType.kFloat32)


def test_unknown_quantizers(te, tex):
    with pytest.raises(RuntimeError, match="Unexpected type for quantizer: object"):
        tex.quantize(torch.ones(4, 4), object())


@pytest.mark.parametrize("name", MAKERS)
def test_bgrad_quantize(te, tex, name):
    grad = torch.randn(2, 64, 96, dtype=torch.bfloat16)
    bias_grad, quantized = tex.bgrad_quantize(grad, MAKERS[name](te))
    expected = oracle.array(grad).reshape(-1, 96).astype(np.float64).sum(0)
    np.testing.assert_allclose(oracle.array(bias_grad), expected, rtol=2**-8, atol=1e-5)
    assert bias_grad.dtype == torch.bfloat16
    assert torch.equal(quantized.dequantize(), tex.quantize(grad, MAKERS[name](te)).dequantize())


def test_split_quantize_uses_each_quantizer(te, tex):
    x = torch.randn(96, 64)
    parts = tex.split_quantize(x, [32, 0, 64], [mxfp8(te), mxfp8(te), mxfp8(te, "e5m2")])
    assert [tuple(part.shape) for part in parts] == [(32, 64), (0, 64), (64, 64)]
    equal(parts[2]._rowwise_data, oracle.mx(x[32:], "e5m2").codes)
    with pytest.raises(RuntimeError, match="Expected 2 quantizers, but got 1"):
        tex.split_quantize(x, [32, 64], [mxfp8(te)])


def test_compute_amax_ignores_nan(tex):
    amax = torch.zeros(1)
    tex.compute_amax(torch.tensor([1.0, float("nan"), -3.0], dtype=torch.bfloat16), amax)
    assert amax.item() == 3.0
    with pytest.raises(RuntimeError, match="exactly one element"):
        tex.compute_amax(torch.ones(2), torch.zeros(2))
