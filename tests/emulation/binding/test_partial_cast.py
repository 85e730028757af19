"""FP8 primary weights: shards, cast one by one, make the weight that is quantised whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.emulation.binding import oracle
from tests.emulation.binding.test_quantize import blockwise, delayed, mxfp8, tensorwise
from tests.support.te_release import since

H, W = 160, 224
CUTS = [0, 1000, 20000, 20001, H * W]


@pytest.mark.parametrize("cuts", [CUTS, [0, H * W]])
def test_blockwise_shards(te, tex, cuts):
    weight = torch.randn(H, W)
    amax, out = torch.zeros(2, 2), torch.zeros(H * W, dtype=torch.uint8)
    for start, end in pairwise(cuts):
        partial = torch.full((2, 2), -1.0)
        tex.fp8_block_scaling_compute_partial_amax(weight.view(-1)[start:end], partial, H, W, start, 128)
        amax = torch.maximum(amax, partial)
    expected = oracle.blocks(weight, "e4m3", (128, 128))
    scale = 1.0 / torch.from_numpy(expected.scale_inv)
    np.testing.assert_array_equal(
        amax.numpy(),
        [[weight[i : i + 128, j : j + 128].abs().max().item() for j in (0, 128)] for i in (0, 128)],
    )
    for start, end in pairwise(cuts):
        tex.fp8_block_scaling_partial_cast(
            weight.view(-1)[start:end], out[start:end], scale, H, W, start, 128, te.DType.kFloat8E4M3
        )
    np.testing.assert_array_equal(out.view(H, W).numpy(), expected.codes)


def test_mxfp8_shards(te, tex):
    weight = torch.randn(H, W, dtype=torch.bfloat16)
    rowwise, columnwise = torch.zeros(256, 8), torch.zeros(8, 256)
    for start, end in pairwise(CUTS):
        parts = torch.zeros(256, 8, dtype=torch.bfloat16), torch.zeros(8, 256, dtype=torch.bfloat16)
        tex.mxfp8_scaling_compute_partial_amax(weight.view(-1)[start:end], *parts, H, W, start)
        rowwise, columnwise = torch.maximum(rowwise, parts[0]), torch.maximum(columnwise, parts[1])
    scales = [torch.zeros(256, 8, dtype=torch.uint8), torch.zeros(8, 256, dtype=torch.uint8)]
    amaxes = [rowwise.to(torch.bfloat16), columnwise.to(torch.bfloat16)]
    tex.multi_tensor_compute_scale_inv_e8m0(1, None, [amaxes, scales])
    outputs = [torch.zeros(H * W, dtype=torch.uint8) for _ in range(2)]
    for start, end in pairwise(CUTS):
        tex.mxfp8_scaling_partial_cast(
            weight.view(-1)[start:end], outputs[0][start:end], outputs[1][start:end], *scales, H, W, start
        )
    for output, expected in zip(
        outputs, [oracle.mx(weight, "e4m3"), oracle.mx(weight, "e4m3", columnwise=True)], strict=True
    ):
        np.testing.assert_array_equal(output.view(H, W).numpy(), expected.codes)


def test_mxfp8_dimensions(tex):
    with pytest.raises(RuntimeError, match="rows must be divisible by 32"):
        tex.mxfp8_scaling_compute_partial_amax(torch.ones(40), torch.ones(1), torch.ones(1), 40, 32, 0)


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    if torch.distributed.is_initialized():
        yield torch.distributed.new_group([torch.distributed.get_rank()])
        return
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("maker", [delayed, tensorwise, mxfp8, lambda te: blockwise(te, dim=2)])
def test_te_casts_master_weights(te, tex, maker, group):
    """TE's own `quantize_master_weights` (`cast_master_weights_to_fp8` in 2.11), which the distributed
    optimizer calls, writes the parameter in place. It rounds the master weight to the parameter's dtype
    first."""
    from transformer_engine.pytorch.tensor import utils

    newer, older = "quantize_master_weights", "cast_master_weights_to_fp8"
    quantize_master_weights = getattr(utils, newer if hasattr(utils, newer) else older)

    weight = torch.randn(256, 128)
    parameter = tex.quantize(torch.zeros(256, 128, dtype=torch.bfloat16), maker(te))
    codes = parameter._data if hasattr(parameter, "_data") else parameter._rowwise_data
    shard = codes.view(-1)[500:600]
    quantize_master_weights([parameter], [weight.view(-1)], [0], group)
    expected = tex.quantize(weight.to(torch.bfloat16), maker(te))
    assert torch.equal(parameter.dequantize(), expected.dequantize())
    assert torch.equal(shard, codes.view(-1)[500:600])


def square_nvfp4(te):
    return te.NVFP4Quantizer(
        fp4_dtype=te.DType.kFloat4E2M1, with_2d_quantization=True, with_amax_reduction=False
    )


@since("2.14")
def test_nvfp4_shards(te, tex):
    """Cut at even offsets, as TE's callers do: a byte holds two codes."""
    weight = torch.randn(H, W)
    cuts = [0, 1000, 20002, H * W]
    amax, whole = torch.zeros(H // 16, W // 16), torch.zeros(1)
    for start, end in pairwise(cuts):
        partial, largest = torch.zeros_like(amax), torch.zeros(1)
        tex.nvfp4_multi_tensor_compute_partial_amax(
            [weight.view(-1)[start:end]], [partial], [largest], [H], [W], [start]
        )
        amax, whole = torch.maximum(amax, partial), torch.maximum(whole, largest)
    expected = tex.quantize(weight, square_nvfp4(te))
    assert torch.equal(whole, expected._amax_rowwise)
    block_scale, scale_inv = torch.empty_like(amax), torch.zeros_like(expected._rowwise_scale_inv)
    kept_amax, global_scale = torch.zeros(1), torch.empty(1)
    tex.nvfp4_compute_global_scale(whole, global_scale)
    assert global_scale.item() == pytest.approx(448 * 6 / weight.abs().max().item())
    # TE's kernel writes rows of the blocks' number, whatever the width of the buffer.
    rows = torch.zeros(scale_inv.shape[0], W // 16, dtype=torch.uint8)
    tex.nvfp4_multi_tensor_fused_scale(
        [amax], [whole], [block_scale], [rows], [kept_amax], [H // 16], [W // 16], [rows.shape[0]], 16
    )
    assert torch.equal(kept_amax, whole)
    assert torch.equal(rows[:H], expected._rowwise_scale_inv[:H, : W // 16])
    assert not rows[H:].any()
    out = torch.zeros(H * W // 2, dtype=torch.uint8)
    for start, end in pairwise(cuts):
        tex.nvfp4_multi_tensor_2d_partial_cast(
            [weight.view(-1)[start:end]],
            [out[start // 2 : end // 2]],
            [block_scale],
            [global_scale],
            [H],
            [W],
            [start],
        )
    assert torch.equal(out, expected._rowwise_data.view(-1))


@since("2.14")
def test_nvfp4_columnwise_data_is_the_transposed_rowwise_data(te, tex):
    quantized = tex.quantize(torch.randn(H, W), square_nvfp4(te))
    turned = tex.nvfp4_data_transpose(quantized._rowwise_data, out=None)
    assert torch.equal(turned, quantized._columnwise_data)
    scales = torch.full_like(quantized._columnwise_scale_inv, 9)
    tex.nvfp4_2d_scale_transpose(quantized._rowwise_scale_inv, scales, H // 16, W // 16)
    assert torch.equal(scales[:W, : H // 16], quantized._columnwise_scale_inv[:W, : H // 16])
    data = torch.empty_like(turned)
    tex.nvfp4_2d_multi_tensor_transpose(
        [quantized._rowwise_data], [data], [quantized._rowwise_scale_inv], [scales], [H], [W]
    )
    assert torch.equal(data, turned)
    with pytest.raises(RuntimeError, match="to be even"):
        tex.nvfp4_data_transpose(torch.zeros(3, 8, dtype=torch.uint8), out=None)


@since("2.14")
def test_te_casts_nvfp4_master_weights(te, tex, group):
    from transformer_engine.pytorch.tensor import utils

    weight = torch.randn(256, 128)
    parameter = square_nvfp4(te)(torch.zeros(256, 128, dtype=torch.bfloat16))
    cast = getattr(utils, "quantize_master_weights", None)
    if cast is None:
        pytest.skip("this release casts no NVFP4 master weights")
    cast([parameter], [weight.view(-1)], [0], group)
    expected = tex.quantize(weight.to(torch.bfloat16), square_nvfp4(te))
    assert torch.equal(parameter._rowwise_data, expected._rowwise_data)
    assert torch.equal(parameter.dequantize(), expected.dequantize())
