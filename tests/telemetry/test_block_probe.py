"""The block probe on scale arrays made by hand: padding does not count, work does not grow with modules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes import BlockProbe, Reading, scale_codes
from nemo_fp8_recipes.telemetry.probes import blocks as blocks_module
from nemo_fp8_recipes.telemetry.probes.base import COUNT
from nemo_fp8_recipes.telemetry.probes.blocks import unpadded_positions
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from tests.telemetry.launches import Launches

GARBAGE = 254


@dataclass
class Dtype:
    name: str = "kFloat8E4M3"


@dataclass
class Quantizer:
    dtype: Dtype = field(default_factory=Dtype)
    block_scaling_dim: int = 1
    force_pow_2_scales: bool = False


@dataclass
class Stored:
    """The attributes of a quantised tensor that the probe reads."""

    _rowwise_data: Tensor | None = None
    _rowwise_scale_inv: Tensor | None = None
    _columnwise_data: Tensor | None = None
    _columnwise_scale_inv: Tensor | None = None
    _with_gemm_swizzled_scales: bool = False


def read(reading: Reading | None) -> dict[str, float]:
    assert reading is not None
    found = {spec.name: float(value) for spec, value in zip(reading.specs, reading.values, strict=True)}
    found.pop(COUNT)
    return found


def distribution(scale_inv: np.ndarray, *, exponents: bool = False) -> dict[str, Any]:
    """What the probe shall read of these scales, by numpy; `exponents`: percentiles know no more of them."""
    known = np.exp2(np.floor(np.log2(scale_inv))) if exponents else scale_inv
    return {
        "scale_inv_max": scale_inv.max(),
        "scale_inv_min": scale_inv.min(),
        "scale_inv_mean": pytest.approx(scale_inv.mean(), rel=1e-6),
        "scale_inv_rms": pytest.approx(np.sqrt(np.square(scale_inv).mean()), rel=1e-6),
        **{
            f"scale_inv_p{percentile:02d}": np.percentile(known, percentile, method="inverted_cdf")
            for percentile in (1, 50, 99)
        },
        "scale_inv_at_min": 0.0,
        "scale_inv_at_max": 0.0,
        "blocks": scale_inv.size,
    }


def padded(used: np.ndarray, rows: int, columns: int, fill: float) -> Tensor:
    full = np.full((rows, columns), fill, dtype=used.dtype)
    full[: used.shape[0], : used.shape[1]] = used
    return torch.from_numpy(full)


def mxfp8(m: int, k: int, seed: int) -> tuple[Stored, np.ndarray]:
    codes = np.random.default_rng(seed).integers(100, 140, (m, k // 32)).astype(np.uint8)
    scale = padded(codes, -(-m // 128) * 128, -(-(k // 32) // 4) * 4, GARBAGE)
    return Stored(torch.zeros(m, k, dtype=torch.uint8), scale), codes


@pytest.mark.parametrize(("m", "k"), [(128, 128), (40, 96), (256, 1024), (129, 160)])
def test_mxfp8_statistics_leave_the_padding_out(m: int, k: int) -> None:
    stored, codes = mxfp8(m, k, 0)
    probe = BlockProbe(IndexCache(), "mxfp8")
    probe.quantised(Operand("m", "input"), Quantizer(), stored)
    assert read(probe.end()) == distribution(np.exp2(codes.astype(np.float64) - 127))


def test_blocks_of_zeros_do_not_count_for_minimum_and_mean() -> None:
    codes = np.asarray([[0, 127, 128, 0]], dtype=np.uint8)
    stored = Stored(torch.zeros(1, 128, dtype=torch.uint8), padded(codes, 128, 4, GARBAGE))
    probe = BlockProbe(IndexCache(), "mxfp8")
    probe.quantised(Operand("m", "input"), Quantizer(), stored)
    found = read(probe.end())
    assert (found["scale_inv_min"], found["scale_inv_max"], found["scale_inv_mean"]) == (1.0, 2.0, 1.5)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize(("m", "k"), [(130, 260), (256, 512), (7, 100)])
def test_blockwise_layouts(dim: int, m: int, k: int) -> None:
    shape = (-(-k // 128), m) if dim == 1 else (-(-m // 128), -(-k // 128))
    used = np.random.default_rng(1).uniform(0.5, 2.0, shape).astype(np.float32)
    scale = padded(used, shape[0], -(-shape[1] // 4) * 4, 1e30)
    probe = BlockProbe(IndexCache(), "blockwise")
    stored = Stored(torch.zeros(m, k, dtype=torch.uint8), scale)
    probe.quantised(Operand("m", "weight"), Quantizer(block_scaling_dim=dim), stored)
    assert read(probe.end()) == distribution(used.astype(np.float64), exponents=True)


@pytest.mark.parametrize("swizzled", [False, True])
def test_nvfp4_scales_are_e4m3(swizzled: bool) -> None:
    m, k = 128, 128
    codes = np.random.default_rng(3).integers(0, 127, (m, k // 16)).astype(np.uint8)
    scale = padded(codes, 128, 8, GARBAGE)
    if swizzled:
        scale = scale.reshape(4, 32, 2, 4).permute(2, 1, 0, 3).reshape(128, 8)
    stored = Stored(torch.zeros(m, k // 2, dtype=torch.uint8), scale, _with_gemm_swizzled_scales=swizzled)
    probe = BlockProbe(IndexCache(), "nvfp4")
    probe.quantised(Operand("m", "input"), Quantizer(), stored)
    values = codes.reshape(-1).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    wanted = distribution(values[values > 0])
    wanted["scale_inv_at_min"] = pytest.approx((values == 0).mean(), rel=1e-6)
    wanted["scale_inv_at_max"] = pytest.approx((values == 448).mean(), rel=1e-6)
    wanted["blocks"] = codes.size
    assert read(probe.end()) == wanted


def test_both_ends_of_e8m0_are_counted_and_nan_shows_as_infinite() -> None:
    codes = np.asarray([[0, 0, 254, 127]], dtype=np.uint8)
    found = {}
    for top in (254, 255):
        codes[0, 2] = top
        stored = Stored(torch.zeros(1, 128, dtype=torch.uint8), padded(codes, 128, 4, GARBAGE))
        probe = BlockProbe(IndexCache(), "mxfp8")
        probe.quantised(Operand("m", "input"), Quantizer(), stored)
        found[top] = read(probe.end())
        assert (found[top]["scale_inv_at_min"], found[top]["scale_inv_at_max"]) == (0.5, 0.25)
    assert (found[254]["scale_inv_max"], found[255]["scale_inv_max"]) == (2.0**127, math.inf)
    assert (found[255]["scale_inv_min"], found[255]["scale_inv_mean"]) == (1.0, math.inf)


def test_a_tensor_of_zeros_has_no_scale_to_describe() -> None:
    stored = Stored(torch.zeros(1, 128, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8))
    probe = BlockProbe(IndexCache(), "mxfp8")
    probe.quantised(Operand("m", "input"), Quantizer(), stored)
    found = read(probe.end())
    assert (found.pop("scale_inv_at_min"), found.pop("blocks")) == (1.0, 4.0)
    assert set(found.values()) == {0.0}


def test_columnwise_scales_are_read_only_where_there_are_no_rowwise_ones() -> None:
    rowwise, codes = mxfp8(128, 128, 2)
    columnwise = Stored(
        None, None, torch.zeros(128, 128, dtype=torch.uint8), torch.full((4, 128), 200, dtype=torch.uint8)
    )
    probe = BlockProbe(IndexCache(), "mxfp8")
    probe.quantised(Operand("both", "input"), Quantizer(), rowwise)
    probe.quantised(Operand("both", "input"), Quantizer(), columnwise)
    probe.quantised(Operand("only", "input"), Quantizer(), columnwise)
    reading = probe.end()
    assert reading is not None
    largest = {
        spec.module: float(value)
        for spec, value in zip(reading.specs, reading.values, strict=True)
        if spec.name == "scale_inv_max"
    }
    assert largest == {"both": 2.0 ** (int(codes.max()) - 127), "only": 2.0**73}


def test_the_blocks_that_are_not_empty_are_counted_over_micro_batches() -> None:
    probe = BlockProbe(IndexCache(), "mxfp8")
    for codes in ([[0, 127, 128, 0]], [[1, 2, 3, 0]]):
        scale = padded(np.asarray(codes, dtype=np.uint8), 128, 4, GARBAGE)
        probe.quantised(
            Operand("m", "input"), Quantizer(), Stored(torch.zeros(1, 128, dtype=torch.uint8), scale)
        )
    reading = probe.end()
    assert reading is not None
    named = zip(reading.specs, reading.values.tolist(), strict=True)
    assert [value for spec, value in named if spec.name == COUNT] == [5.0]


def test_micro_batches_are_combined() -> None:
    probe = BlockProbe(IndexCache(), "mxfp8")
    parts = [mxfp8(128, 256, seed) for seed in range(3)]
    for stored, _ in parts:
        probe.quantised(Operand("m", "input"), Quantizer(), stored)
    codes = np.concatenate([codes for _, codes in parts])
    scale_inv = np.exp2(codes.astype(np.float64) - 127)
    found = read(probe.end())
    assert (found["scale_inv_min"], found["scale_inv_max"]) == (scale_inv.min(), scale_inv.max())
    assert found["scale_inv_mean"] == pytest.approx(scale_inv.mean(), rel=1e-6)
    assert found["blocks"] == parts[0][1].size


def test_reducing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Reading:
        probe = BlockProbe(IndexCache(), "mxfp8")
        for index in range(6):
            probe.quantised(Operand(f"m{index % 4}", "input"), Quantizer(), mxfp8(96, 160, index)[0])
        reading = probe.end()
        assert reading is not None
        return reading

    whole = run()
    monkeypatch.setattr(blocks_module, "_CHUNK_BLOCKS", 700)
    chunked = run()
    assert chunked.specs == whole.specs
    torch.testing.assert_close(chunked.values, whole.values, rtol=1e-6, atol=0)


def test_copies_of_the_histogram_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_codes, "_HOSTS", ())
    test_mxfp8_statistics_leave_the_padding_out(129, 160)
    test_micro_batches_are_combined()


def test_large_padded_scales_are_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "_INDEXED_BLOCKS", 10)
    test_mxfp8_statistics_leave_the_padding_out(40, 96)


def test_scales_that_are_emptied_later_were_already_kept() -> None:
    # Transformer Engine drops saved data by giving the tensor object an empty storage.
    stored, codes = mxfp8(128, 128, 5)
    probe = BlockProbe(IndexCache(), "mxfp8")
    probe.quantised(Operand("m", "input"), Quantizer(), stored)
    assert stored._rowwise_scale_inv is not None
    stored._rowwise_scale_inv.data = torch.empty(0, dtype=torch.uint8)
    assert read(probe.end())["scale_inv_max"] == 2.0 ** (int(codes.max()) - 127)


def test_an_expert_without_tokens_has_no_row() -> None:
    probe = BlockProbe(IndexCache(), "mxfp8")
    empty = Stored(torch.zeros(0, 128, dtype=torch.uint8), torch.zeros(0, 4, dtype=torch.uint8))
    probe.quantised(Operand("m", "input"), Quantizer(), empty)
    assert probe.end() is None


@pytest.mark.parametrize(
    ("rows", "columns", "all_rows", "all_columns"), [(130, 5, 256, 8), (1, 1, 128, 4), (300, 12, 384, 12)]
)
def test_swizzled_positions_follow_the_tiles(
    rows: int, columns: int, all_rows: int, all_columns: int
) -> None:
    # cuBLAS: a 128 x 4 tile is 32 rows of 16 bytes; byte 4 g + c of row i belongs to (32 g + i, c).
    plain = np.arange(all_rows * all_columns).reshape(all_rows, all_columns)
    tiles = plain.reshape(all_rows // 128, 4, 32, all_columns // 4, 4)
    swizzled = tiles.transpose(0, 3, 2, 1, 4).reshape(-1)
    wanted = plain[:rows, :columns].reshape(-1)
    found = swizzled[unpadded_positions(rows, columns, all_rows, all_columns, "rowwise")]
    assert np.array_equal(found, wanted)
    transposed = swizzled[unpadded_positions(columns, rows, all_columns, all_rows, "columnwise")]
    assert np.array_equal(transposed, plain[:rows, :columns].T.reshape(-1))


@pytest.mark.parametrize("shape", [(128, 128), (40, 96)])
def test_launches_do_not_grow_with_the_modules(shape: tuple[int, int]) -> None:
    counts = {}
    for modules in (2, 200):
        probe = BlockProbe(IndexCache(), "mxfp8")
        tensors = [mxfp8(*shape, index)[0] for index in range(modules)]
        with Launches() as launches:
            for index, stored in enumerate(tensors):
                probe.quantised(Operand(f"m{index}", "input"), Quantizer(), stored)
            observing = len(launches.names)
            probe.end()
        assert observing == 0
        counts[modules] = len(launches.names)
    assert counts[2] == counts[200] < 60


def test_nothing_waits_for_the_device() -> None:
    probe = BlockProbe(IndexCache(), "mxfp8")
    with Launches() as launches:
        probe.quantised(Operand("m", "input"), Quantizer(), mxfp8(128, 128, 0)[0])
        probe.end()
    assert not {"item", "local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(launches.names)
    assert math.isfinite(len(launches.names))
