"""Grouped tensors: every member is what it would be alone, wherever it lies in the buffers."""

from __future__ import annotations

import math

import pytest
import torch

from tests.emulation.binding.architecture import BLACKWELL, HOPPER
from tests.emulation.binding.test_quantize import blockwise, delayed, mxfp8, tensorwise
from tests.support.te_release import RELEASE, since

pytestmark = since("2.14")

ROWS = [128, 0, 256, 128]
COLUMNS = 128


def nvfp4(te, *, rowwise=True, columnwise=True):
    return te.NVFP4Quantizer(
        fp4_dtype=te.DType.kFloat4E2M1,
        rowwise=rowwise,
        columnwise=columnwise,
        with_amax_reduction=False,
        with_rht=True,
        with_post_rht_amax=True,
    )


def square_blocks(te):
    return blockwise(te, dim=2)


def blockwise_rows(te):
    quantizer = blockwise(te)
    quantizer.set_usage(columnwise=False)
    return quantizer


def members(x):
    return [part.contiguous() for part in x.split(ROWS)]


BUFFERS = (
    ("rowwise_data", ("_rowwise_data", "_data")),
    ("scale_inv", ("_rowwise_scale_inv", "_scale_inv")),
    ("columnwise_data", ("_columnwise_data", "_transpose")),
    ("columnwise_scale_inv", ("_columnwise_scale_inv",)),
)


def assert_members_are_alone(grouped, alone):
    """The flat buffers are those of the members, one behind the other."""
    found = 0
    for name, names in BUFFERS:
        parts = [next((getattr(t, each) for each in names if hasattr(t, each)), None) for t in alone]
        buffer = getattr(grouped, name)
        if any(part is None for part in parts) or buffer is None:
            continue
        flat = torch.cat([part.reshape(-1).view(buffer.dtype) for part in parts])
        assert torch.equal(buffer.reshape(-1)[: flat.numel()], flat), name
        found += 1
    assert found


@pytest.mark.parametrize(
    "maker",
    [
        mxfp8,
        nvfp4,
        pytest.param(blockwise, marks=since("2.20")),
        pytest.param(square_blocks, marks=since("2.20")),
        pytest.param(tensorwise, marks=since("2.20")),
    ],
)
def test_a_member_is_quantised_as_if_it_were_alone(te, tex, pose, maker):
    if maker in (blockwise, square_blocks):
        pose(HOPPER)  # the only one with kernels for groups of these
    x = torch.randn(sum(ROWS), COLUMNS).bfloat16() * torch.logspace(-3, 3, sum(ROWS))[:, None].bfloat16()
    grouped = tex.group_quantize(x, maker(te), len(ROWS), torch.tensor(ROWS))
    alone = [tex.quantize(part, maker(te)) for part in members(x) if len(part)]
    if maker is tensorwise:  # one value a member, of the empty one too
        kept = [number for number, rows in enumerate(ROWS) if rows]
        assert grouped.scale_inv[kept].tolist() == [t._scale_inv.item() for t in alone]
        assert grouped.amax[kept].tolist() == [part.abs().max().item() for part in members(x) if len(part)]
        assert [buffer[1].item() for buffer in (grouped.amax, grouped.scale, grouped.scale_inv)] == [0, 1, 1]
        codes = torch.cat([t._data.reshape(-1) for t in alone])
        assert torch.equal(grouped.rowwise_data, codes)
        return
    assert_members_are_alone(grouped, alone)
    assert grouped.tensor_offsets.tolist() == [
        COLUMNS * sum(ROWS[:number]) for number in range(len(ROWS) + 1)
    ]
    if maker is nvfp4:
        kept = [number for number, rows in enumerate(ROWS) if rows]
        assert grouped.amax[kept].tolist() == [t._amax_rowwise.item() for t in alone]
        assert grouped.columnwise_amax[kept].tolist() == [t._amax_columnwise.item() for t in alone]


@pytest.mark.parametrize("maker", [mxfp8, nvfp4])
def test_scales_in_the_order_of_the_gemm(te, tex, maker):
    x = torch.randn(sum(ROWS), COLUMNS).bfloat16()
    quantizer = maker(te)
    quantizer.optimize_for_gemm = True
    grouped = tex.group_quantize(x, quantizer, len(ROWS), torch.tensor(ROWS))
    assert grouped._with_gemm_swizzled_scales
    alone = [tex.quantize(part, maker(te)) for part in members(x) if len(part)]
    for each in alone:
        tex.swizzle_scales_for_gemm_(each)
    assert_members_are_alone(grouped, alone)


def test_te_takes_a_group_apart_again(te, tex):
    x = torch.randn(512, COLUMNS).bfloat16()
    grouped = tex.group_quantize(x, mxfp8(te), 4, torch.tensor([128] * 4))
    parts = grouped.split_into_quantized_tensors()
    for part, source in zip(parts, x.split(128), strict=True):
        assert torch.equal(part.dequantize(), tex.quantize(source, mxfp8(te)).dequantize())


def test_rows_behind_the_last_member_are_left_alone(te, tex):
    x = torch.randn(512, COLUMNS).bfloat16()
    x[256:] = float("nan")
    grouped = tex.group_quantize(x, mxfp8(te), 2, torch.tensor([128, 128]))
    assert_members_are_alone(grouped, [tex.quantize(part, mxfp8(te)) for part in x[:256].split(128)])


def test_members_of_one_shape_need_no_sizes(te, tex):
    x = torch.randn(256, COLUMNS).bfloat16()
    grouped = tex.group_quantize(x, mxfp8(te), 2, None)
    assert grouped.first_dims is None
    assert grouped.tensor_offsets is None
    assert_members_are_alone(grouped, [tex.quantize(part, mxfp8(te)) for part in x.split(128)])


@since("2.20")
def test_members_that_differ_in_columns(te, tex):
    shapes = [(128, 256), (128, 128)]
    parts = [torch.randn(shape).bfloat16() for shape in shapes]
    x = torch.cat([part.view(-1) for part in parts]).view(128, 384)
    grouped = tex.group_quantize(x, mxfp8(te), 2, None, last_dims=torch.tensor([256, 128]))
    assert_members_are_alone(grouped, [tex.quantize(part, mxfp8(te)) for part in parts])


@since("2.20")
def test_members_that_differ_in_both(te, tex):
    shapes = [(128, 256), (256, 128), (384, 384)]
    parts = [torch.randn(shape).bfloat16() for shape in shapes]
    x = torch.cat([part.view(-1) for part in parts]).view(1, -1)
    rows, columns = (torch.tensor(sizes) for sizes in zip(*shapes, strict=True))
    grouped = tex.group_quantize(x, mxfp8(te), 3, rows, columns)
    assert grouped.scale_inv.numel() == x.numel() // 32
    assert_members_are_alone(grouped, [tex.quantize(part, mxfp8(te)) for part in parts])


@since("2.20")
def test_an_existing_group_is_written_in_place_unless_told_not_to(te, tex):
    quantizer = mxfp8(te)
    grouped = tex.group_quantize(torch.zeros(256, COLUMNS), quantizer, 2, None)
    data, x = grouped.rowwise_data, torch.randn(256, COLUMNS)
    skip = torch.ones(1)
    assert tex.group_quantize(x, quantizer, 2, None, noop_flag=skip, output=grouped) is grouped
    assert not data.any()
    assert tex.group_quantize(x, quantizer, 2, None, noop_flag=skip * 0, output=grouped) is grouped
    assert_members_are_alone(grouped, [tex.quantize(part, mxfp8(te)) for part in x.split(128)])
    assert grouped.rowwise_data is data
    with pytest.raises(RuntimeError, match="created by the same quantizer"):
        tex.group_quantize(x, mxfp8(te), 2, None, output=grouped)
    with pytest.raises(RuntimeError, match="output has an incompatible logical shape"):
        tex.group_quantize(x[:128], quantizer, 2, None, output=grouped)
    grouped.quantizer = None
    with pytest.raises(RuntimeError, match="output must have quantized storage"):
        tex.group_quantize(x, quantizer, 2, None, output=grouped)


def test_bias_gradients(te, tex):
    dy = torch.randn(sum(ROWS), COLUMNS).bfloat16()
    grouped, sums = tex.bgrad_group_quantize(dy, mxfp8(te), len(ROWS), torch.tensor(ROWS))
    assert torch.equal(sums, torch.stack([part.float().sum(0) for part in members(dy)]).bfloat16())
    assert_members_are_alone(grouped, [tex.quantize(part, mxfp8(te)) for part in members(dy) if len(part)])


@since("2.17")
def test_dequantised(te, tex):
    x = torch.randn(sum(ROWS), COLUMNS).bfloat16()
    for usage in ({"columnwise": False}, {"rowwise": False}):
        grouped = tex.group_quantize(x, mxfp8(te, **usage), len(ROWS), torch.tensor(ROWS))
        alone = [tex.quantize(part, mxfp8(te, **usage)) for part in members(x) if len(part)]
        back = tex.group_dequantize(grouped, te.DType.kBFloat16)
        assert torch.equal(back.rowwise_data.view(x.shape), torch.cat([t.dequantize() for t in alone]))


@since("2.17")
def test_what_is_not_dequantised(te, tex, pose):
    x, splits = torch.randn(sum(ROWS), COLUMNS).bfloat16(), torch.tensor(ROWS)

    def refused(message, quantizer, x=x):
        grouped = tex.group_quantize(x, quantizer, len(splits), splits)
        with pytest.raises(RuntimeError, match=message):
            tex.group_dequantize(grouped, te.DType.kBFloat16)

    refused("not both simultaneously", mxfp8(te))
    refused("not implemented for scaling mode: NVTE_NVFP4_1D_SCALING", nvfp4(te))
    pose(HOPPER)
    refused("NOT supported by architectures < 10.0", mxfp8(te, columnwise=False))
    if RELEASE != "2.20":
        return
    refused("not implemented for scaling mode: NVTE_DELAYED_TENSOR_SCALING", tensorwise(te))
    refused("accepts exactly one direction at a time", blockwise(te))
    narrow = torch.randn(sum(ROWS), 48).bfloat16()
    refused(r"Last dim must be a multiple of 128 .* \(got 48\)", blockwise_rows(te), narrow)
    grouped = tex.group_quantize(x, blockwise_rows(te), len(ROWS), splits)
    pose(BLACKWELL)
    with pytest.raises(RuntimeError, match=r"only supported on Hopper .*; got SM100"):
        tex.group_dequantize(grouped, te.DType.kBFloat16)


@since("2.20")
def test_made_ready_for_gemms_in_place(te, tex):
    x = torch.randn(sum(ROWS), COLUMNS).bfloat16()
    splits = torch.tensor(ROWS)
    rowwise = te.MXFP8Quantizer(te.DType.kFloat8E4M3, rowwise=True, columnwise=False)
    grouped = tex.group_quantize(x, rowwise, len(ROWS), splits)
    values = tex.group_requantize_inplace(
        grouped, mxfp8(te), len(ROWS), splits, te.DType.kBFloat16, return_dequantized=True
    )
    assert torch.equal(
        values, torch.cat([tex.quantize(part, mxfp8(te)).dequantize() for part in members(x) if len(part)])
    )
    again = [tex.quantize(part, mxfp8(te)) for part in members(values) if len(part)]
    columns = torch.cat([t._columnwise_data.view(-1) for t in again])
    assert torch.equal(grouped.columnwise_data, columns)
    assert grouped._with_gemm_swizzled_scales
    assert tex.group_requantize_inplace(grouped, mxfp8(te), len(ROWS), splits, te.DType.kBFloat16) is None
    with pytest.raises(RuntimeError, match="compact format"):
        tex.group_requantize_inplace(
            grouped, mxfp8(te), len(ROWS), splits, te.DType.kBFloat16, return_dequantized=True
        )


def test_swizzling_a_group(te, tex):
    x = torch.randn(512, COLUMNS).bfloat16()
    grouped = tex.group_quantize(x, mxfp8(te), 4, None)
    expected = [tex.quantize(part, mxfp8(te)) for part in x.split(128)]
    for each in expected:
        tex.swizzle_scales_for_gemm_(each)
    tex.grouped_swizzle_for_gemm(grouped, True, True)
    assert grouped.scale_inv.shape == (512, 4)
    assert_members_are_alone(grouped, expected)
    before = grouped.scale_inv
    tex.grouped_swizzle_for_gemm(grouped, True, True)
    assert grouped.scale_inv is before


@since("2.17")
def test_nvfp4_under_amaxes_that_are_known(te, tex):
    x = torch.randn(256, COLUMNS).bfloat16()
    rowwise, columnwise = torch.tensor([7.0]), torch.tensor([9.0])
    tensor = tex.nvfp4_quantize_with_amax(x, nvfp4(te), rowwise, columnwise)
    assert tensor._amax_rowwise is rowwise
    assert tensor._amax_columnwise is columnwise
    assert not torch.equal(tensor._rowwise_scale_inv, tex.quantize(x, nvfp4(te))._rowwise_scale_inv)
    own = tex.quantize(x, nvfp4(te))
    same = tex.nvfp4_quantize_with_amax(x, nvfp4(te), own._amax_rowwise, own._amax_columnwise)
    assert torch.equal(same._rowwise_data, own._rowwise_data)
    assert torch.equal(same._columnwise_data, own._columnwise_data)

    alone = [tex.quantize(part, nvfp4(te)) for part in x.split(128)]
    amaxes = [torch.cat([getattr(t, name) for t in alone]) for name in ("_amax_rowwise", "_amax_columnwise")]
    arguments = {"rowwise_amax": amaxes[0], "columnwise_amax": amaxes[1]}
    if RELEASE == "2.20":
        arguments["last_dims"] = None
    grouped = tex.nvfp4_group_quantize_with_amax(x, nvfp4(te), 2, torch.tensor([128, 128]), **arguments)
    assert_members_are_alone(grouped, alone)
    assert grouped.amax is amaxes[0]


def test_what_is_refused(te, tex):
    x = torch.randn(256, COLUMNS).bfloat16()
    with pytest.raises(RuntimeError, match="must have length 2"):
        tex.group_quantize(x, mxfp8(te), 2, torch.tensor([256]))
    with pytest.raises(RuntimeError, match="first_dims must have dtype int64"):
        tex.group_quantize(x, mxfp8(te), 2, torch.tensor([128, 128], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="non-RHT path is not ready yet"):
        tex.group_quantize(x, te.NVFP4Quantizer(fp4_dtype=te.DType.kFloat4E2M1), 2, None)
    with pytest.raises(RuntimeError, match="Number of tensors must be greater than 0"):
        tex.group_quantize(x, mxfp8(te), 0, None)
    with pytest.raises(RuntimeError, match="members of the group end at element 49152 of 32768"):
        tex.group_quantize(x, mxfp8(te), 2, torch.tensor([256, 128]))
    if RELEASE != "2.20":
        with pytest.raises(RuntimeError, match="only support NVFP4 or MXFP8 quantizer"):
            tex.group_quantize(x, blockwise(te), 2, None)
        with pytest.raises(RuntimeError, match="only MXFP8 quantizer is supported"):
            tex.bgrad_group_quantize(x, blockwise(te), 2, None)
        return
    with pytest.raises(RuntimeError, match="only supports MXFP8, NVFP4, Float8CurrentScalingQuantizer, or"):
        tex.group_quantize(x, delayed(te), 2, None)
    with pytest.raises(RuntimeError, match="varying last dim is not supported because"):
        tex.bgrad_group_quantize(x, mxfp8(te), 2, None, torch.tensor([64, 64]))
    with pytest.raises(RuntimeError, match=r"only supported on Hopper .* Got SM100"):
        tex.group_quantize(x, blockwise(te), 2, None)


def test_a_view_whose_rows_do_not_lie_together_is_refused(te, tex):
    """The kernels take the address of the data, and would read what lies behind it instead."""
    x = torch.randn(256, 2 * COLUMNS).bfloat16()
    splits = torch.tensor([128, 128])
    for call in (tex.group_quantize, tex.bgrad_group_quantize):
        for view in (x[:, :COLUMNS], torch.ones(1, 1).bfloat16().expand(256, COLUMNS)):
            with pytest.raises(RuntimeError, match="has to be contiguous"):
                call(view, mxfp8(te), 2, splits)
    tex.group_quantize(
        torch.randn(0, 2 * COLUMNS).bfloat16()[:, :COLUMNS], mxfp8(te), 2, torch.tensor([0, 0])
    )


def test_groups_of_more_than_64(te, tex):
    x, splits = torch.randn(128 * 65, COLUMNS).bfloat16(), torch.full((65,), 128)
    tex.group_quantize(x, mxfp8(te), 65, splits)
    with pytest.raises(RuntimeError, match="Number of tensors should be less than or equal to 64"):
        tex.group_quantize(x, nvfp4(te), 65, splits)
    if RELEASE == "2.20":
        wide = x.view(128, -1)
        with pytest.raises(RuntimeError, match=r"MAX number of supported descriptors \(64\)"):
            tex.group_quantize(wide, mxfp8(te), 65, None, torch.full((65,), COLUMNS))


def test_sizes_that_no_kernel_takes(te, tex):
    whole = "First dimension of each tensor in a group must be divisible by 128"
    x = torch.randn(256, COLUMNS).bfloat16()
    for maker in (mxfp8, nvfp4):
        with pytest.raises(RuntimeError, match=whole):
            tex.group_quantize(x, maker(te), 2, torch.tensor([200, 56]))
    odd = torch.randn(160, COLUMNS).bfloat16()
    with pytest.raises(RuntimeError, match="First logical dimension of a grouped tensor must be divisible"):
        tex.group_quantize(odd, mxfp8(te), 1, torch.tensor([160]))
    with pytest.raises(RuntimeError, match="First dimension of a grouped tensor should be divisible"):
        tex.group_quantize(odd, nvfp4(te), 1, None)
    narrow = torch.randn(128, 64).bfloat16()
    with pytest.raises(RuntimeError, match="Last dimension of a grouped tensor should be divisible"):
        tex.group_quantize(narrow, nvfp4(te), 1, None)


@since("2.20")
def test_sizes_that_no_kernel_takes_of_the_newer_formats(te, tex, hopper):
    x = torch.randn(256, COLUMNS).bfloat16()
    with pytest.raises(RuntimeError, match="first dimension must be a multiple of 128"):
        tex.group_quantize(x, blockwise(te), 2, torch.tensor([200, 56]))
    with pytest.raises(RuntimeError, match="SAME_BOTH_DIMS first dim must be multiple of 128"):
        tex.group_quantize(x[:160].contiguous(), blockwise(te), 1, None)
    with pytest.raises(RuntimeError, match="must be a multiple of TMA_GMEM_ALIGNMENT"):
        tex.group_quantize(torch.randn(128, 24).bfloat16(), blockwise(te), 1, None)
    rowwise = tensorwise(te, columnwise=False)
    with pytest.raises(RuntimeError, match="last logical dimension must be a multiple of 16"):
        tex.group_quantize(torch.randn(128, 24).bfloat16(), rowwise, 2, torch.tensor([33, 95]))
    tex.group_quantize(torch.randn(128, 48).bfloat16(), rowwise, 2, torch.tensor([33, 95]))


def test_offsets(te, tex):
    sizes = torch.tensor([3, 0, 5])
    assert tex.splits_to_offsets(sizes, 4).tolist() == [0, 12, 12, 32]


@since("2.17")
@pytest.mark.parametrize("bulk", [False, True])
def test_offsets_of_several_strides(tex, bulk):
    sizes, (rows, bytes_) = tex.splits_to_offsets_multi(
        torch.tensor([3, 0, 5], dtype=torch.int32),
        "cuda",
        strides=[1, 8],
        include_leading_zero=[False, True],
        dtypes=[torch.int32, torch.int64],
        bulk_allocate=bulk,
    )
    assert sizes.dtype == torch.int64
    assert (rows.tolist(), rows.dtype) == ([3, 3, 8], torch.int32)
    assert (bytes_.tolist(), bytes_.dtype) == ([0, 24, 24, 64], torch.int64)
    if bulk:
        assert bytes_.data_ptr() % 16 == rows.data_ptr() % 16 == 0
        assert 0 < bytes_.data_ptr() - rows.data_ptr() < 32


@since("2.17")
def test_tensors_in_one_buffer(tex):
    shapes, dtypes = [(3, 5), (0,), (7,)], [torch.bfloat16, torch.float32, torch.float32]
    made = tex.bulk_allocate(shapes, dtypes, "cuda", [64, 4, 64])
    for tensor, shape, dtype in zip(made, shapes, dtypes, strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert made[0].data_ptr() % 64 == made[2].data_ptr() % 64 == 0
    assert made[0].untyped_storage().data_ptr() == made[2].untyped_storage().data_ptr()
    made[0].fill_(1.0)
    made[2].fill_(2.0)
    assert made[0].float().sum() == math.prod(shapes[0])


@since("2.17")
def test_addresses(te, tex):
    tensors = [torch.ones(4), torch.zeros(2)]
    assert tex.copy_data_ptrs_to_device(tensors, "cuda").tolist() == [t.data_ptr() for t in tensors]
    quantized = [tex.quantize(torch.randn(160, 96).bfloat16(), mxfp8(te)) for _ in range(3)]
    data = [t._columnwise_data for t in quantized]
    scales = [t._columnwise_scale_inv for t in quantized]
    addresses, scale_addresses, buffer = (
        tex.grouped_mlp_experimental.swizzle_scales_and_pack_ptrs_for_discrete_weights(
            data, scales, "mxfp8_columnwise", "cuda"
        )
    )
    assert addresses.tolist() == [d.data_ptr() for d in data]
    clean = buffer.clone()
    for each, address in zip(quantized, scale_addresses.tolist(), strict=True):
        tex.swizzle_scales_for_gemm_(each)
        start = address - buffer.data_ptr()
        assert start % 16 == 0
        wanted = each._columnwise_scale_inv.reshape(-1)
        assert torch.equal(buffer[start : start + wanted.numel()], wanted)
    for each in scales:  # what is in the padding of the given ones does not matter
        each[5:] = 255
        each[:, 96:] = 255
    *_, buffer = tex.grouped_mlp_experimental.swizzle_scales_and_pack_ptrs_for_discrete_weights(
        data, scales, "mxfp8_columnwise", "cuda"
    )
    assert torch.equal(buffer, clean)


@pytest.mark.skipif(RELEASE != "2.14", reason="Transformer Engine 2.14 alone has it")
@pytest.mark.parametrize("rowwise", [True, False])
def test_addresses_of_2_14(te, tex, rowwise):
    quantized = [tex.quantize(torch.randn(160, 96).bfloat16(), mxfp8(te)) for _ in range(3)]
    direction = "rowwise" if rowwise else "columnwise"
    data = [getattr(t, f"_{direction}_data") for t in quantized]
    scales = [getattr(t, f"_{direction}_scale_inv") for t in quantized]
    (found,) = tex.convert_host_pointers_to_tensor([data])
    assert found.tolist() == [d.data_ptr() for d in data]
    options = {"rowwise": rowwise, "data_dtype": te.DType.kFloat8E4M3}
    addresses, places, buffer = tex.get_device_pointer_for_data_and_scales(data, scales, **options)
    assert torch.equal(addresses, found)
    assert places.tolist() == [s.data_ptr() for s in scales]
    assert not buffer.numel()
    addresses, places, buffer = tex.get_device_pointer_for_data_and_scales(
        data, scales, swizzle=True, **options
    )
    for each, place in zip(quantized, places.tolist(), strict=True):
        tex.swizzle_scales_for_gemm_(each)
        wanted = getattr(each, f"_{direction}_scale_inv").reshape(-1)
        start = place - buffer.data_ptr()
        assert torch.equal(buffer[start : start + wanted.numel()], wanted)
    with pytest.raises(RuntimeError, match="Tensor list is empty"):
        tex.convert_host_pointers_to_tensor([[]])
    with pytest.raises(RuntimeError, match="must not be empty"):
        tex.get_device_pointer_for_data_and_scales([], [], **options)


@since("2.20")
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_activation_times_probability(te, tex, clamped, ordered):
    x = torch.randn(sum(ROWS), 2 * COLUMNS).bfloat16()
    probability = torch.rand(sum(ROWS)).bfloat16()
    quantizer = mxfp8(te, rowwise=False)
    quantizer.optimize_for_gemm = ordered
    splits = torch.tensor(ROWS)
    if clamped:
        found = tex.group_scaled_clamped_swiglu(x, probability, quantizer, 4, 0.7, first_dims=splits)
        act, gate = x.double().chunk(2, dim=-1)
        act = act.clamp(max=0.7)
        exact = act * torch.sigmoid(1.702 * act) * (gate.clamp(-0.7, 0.7) + 1)
    else:
        found = tex.group_scaled_swiglu(x, probability, quantizer, 4, first_dims=splits)
        act, gate = x.double().chunk(2, dim=-1)
        exact = torch.nn.functional.silu(act) * gate
    exact = (exact * probability[:, None].double()).bfloat16()
    wanted = tex.group_quantize(exact, quantizer, 4, splits)
    assert found.rowwise_data is None
    assert found._with_gemm_swizzled_scales is ordered
    different = found.columnwise_data != wanted.columnwise_data
    assert different.double().mean() < 0.01  # a bf16 that was rounded the other way
    assert torch.equal(found.columnwise_scale_inv, wanted.columnwise_scale_inv)


@since("2.20")
def test_activations_that_are_refused(te, tex):
    x, probability = torch.randn(256, 2 * COLUMNS).bfloat16(), torch.rand(256).bfloat16()
    columns = mxfp8(te, rowwise=False)

    def refused(message, x=x, probability=probability, quantizer=columns, **options):
        with pytest.raises(RuntimeError, match=message):
            tex.group_scaled_swiglu(x, probability, quantizer, 2, **options)

    refused("only supports MXFP8", quantizer=nvfp4(te))
    refused("columnwise output only", quantizer=mxfp8(te))
    refused("last dim must be even", x=x[:, 1:].contiguous())
    refused("input must be contiguous", x=x[:, : 2 * COLUMNS - 2])
    refused("exactly N elements", probability=probability[:3])
    refused("same dtype as the input", probability=probability.float())
    refused("requires N divisible by 128", x=x[:96], probability=probability[:96])
    with pytest.raises(RuntimeError, match="limit must be positive"):
        tex.group_scaled_clamped_swiglu(x, probability, columns, 2, 0.0)
    ordered = mxfp8(te, rowwise=False)
    ordered.optimize_for_gemm = True
    refused("requires per-expert first dims", quantizer=ordered)
