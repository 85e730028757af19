"""What the kernels count of block scales, against numpy on the positions in use, and against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_fp8_recipes.emulation.kernels import Library
from nemo_fp8_recipes.telemetry import host_kernels
from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes import BlockProbe
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.scale_layout import SWIZZLES, unpadded_positions
from tests.telemetry.test_block_probe import Quantizer, Stored

GRIDS = [
    (512, 8, 512, 8, ""),
    (40, 3, 128, 4, ""),
    (130, 5, 256, 8, "rowwise"),
    (5, 130, 8, 256, "columnwise"),
    (128, 4, 128, 4, "rowwise"),
    (1, 1, 128, 4, ""),
    (700, 41, 700, 41, ""),
]
SLOTS = [0, 1, 0, 2, 1, 2, 1]


def arrays(dtype: type, low: int, high: int) -> list[np.ndarray]:
    rng = np.random.default_rng(low + high)
    return [
        rng.integers(low, high, grid[2:4]).astype(dtype)
        if dtype is np.uint8
        else np.exp2(rng.uniform(low - 127, high - 127, grid[2:4])).astype(np.float32)
        for grid in GRIDS
    ]


def used(array: np.ndarray, grid: tuple[int, int, int, int, str]) -> np.ndarray:
    return array.reshape(-1)[unpadded_positions(*grid)]  # type: ignore[arg-type]


def counted(kernels: Library, made: list[np.ndarray]) -> tuple[Tensor, Tensor | None]:
    grids = torch.tensor([(*grid[:4], SWIZZLES.index(grid[4])) for grid in GRIDS])  # type: ignore[arg-type]
    found = kernels.scale_counts(
        [torch.from_numpy(one) for one in made], grids, torch.tensor(SLOTS), max(SLOTS) + 1
    )
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("low", "high"), [(0, 256), (120, 124), (0, 1), (255, 256), (0, 20), (3, 40), (16, 48), (47, 49)]
)
def test_codes_are_counted_where_they_are_in_use(kernels: Library, low: int, high: int) -> None:
    made = arrays(np.uint8, low, high)
    wanted = np.zeros((3, 256), dtype=np.int64)
    for array, grid, slot in zip(made, GRIDS, SLOTS, strict=True):
        wanted[slot] += np.bincount(used(array, grid), minlength=256)
    counts, exact = counted(kernels, made)
    assert np.array_equal(counts.numpy(), wanted)
    assert exact is None


def test_empty_blocks_among_few_codes_are_counted(kernels: Library) -> None:
    made = arrays(np.uint8, 100, 104)
    for array in made:
        array[:, ::3] = 0
    counts, _ = counted(kernels, made)
    total = sum(int((used(array, grid) == 0).sum()) for array, grid in zip(made, GRIDS, strict=True))
    assert int(counts[:, 0].sum()) == total > 0


def test_fp32_scales_are_counted_by_exponent_and_described(kernels: Library) -> None:
    made = arrays(np.float32, 100, 140)
    counts, exact = counted(kernels, made)
    assert exact is not None
    wanted = np.zeros((3, 256), dtype=np.int64)
    for array, grid, slot, row in zip(made, GRIDS, SLOTS, exact.numpy(), strict=True):
        scales = used(array, grid)
        wanted[slot] += np.bincount(scales.view(np.int32) >> 23, minlength=256)
        values = scales.astype(np.float64)
        assert (row[0], row[1], row[4]) == (values.max(), values.min(), values.size)
        assert row[2:4] == pytest.approx([values.sum(), np.square(values).sum()], rel=1e-13)
    assert np.array_equal(counts.numpy(), wanted)


def test_a_nan_among_fp32_scales_is_both_extremes(kernels: Library) -> None:
    made = arrays(np.float32, 100, 140)
    made[0][3, 3] = np.nan
    _, exact = counted(kernels, made)
    assert exact is not None
    assert exact[0].isnan().tolist() == [True, True, True, True, False]
    assert not exact[1:].isnan().any()


@pytest.mark.parametrize(
    "scales",
    [
        torch.zeros(4, 4, dtype=torch.int32),
        torch.zeros(4, 8, dtype=torch.uint8)[:, ::2],
        torch.zeros(4, 4, dtype=torch.uint8, device="meta"),
    ],
    ids=["dtype", "strides", "device"],
)
def test_what_cannot_be_read_is_left_to_torch(native: Library, scales: Tensor) -> None:
    grids, slots = torch.tensor([(4, 4, 4, 4, 0)]), torch.tensor([0])
    assert native.scale_counts([scales], grids, slots, 1) is None


def described(recipe: str, case: str) -> Tensor:
    rng = np.random.default_rng(7)
    probe = BlockProbe(IndexCache(), recipe)
    for index in range(7):
        m, k = 64 + 32 * index, 256
        data = torch.zeros(m, k // 2 if recipe == "nvfp4" else k, dtype=torch.uint8)
        if recipe == "blockwise":
            scale = np.exp2(rng.uniform(-9, 9, (2, m))).astype(np.float32)
            if case == "not a number":
                scale[0, 0] = np.nan if index % 2 else np.inf
        else:
            columns = k // (16 if recipe == "nvfp4" else 32)
            scale = rng.integers(90, 127, (-(-m // 128) * 128, columns)).astype(np.uint8)
            if case == "zeros":
                scale[: m // 2 if index else m] = 0
            if case == "not a number":
                scale[0, 0] = 255 if recipe == "mxfp8" else 127
        stored = Stored(data, torch.from_numpy(scale), _with_gemm_swizzled_scales=False)
        if index == 5:
            rows, columns = (scale.shape[0] * 32, scale.shape[1]) if recipe == "mxfp8" else data.shape
            stored = Stored(
                None, None, torch.zeros(rows, columns, dtype=torch.uint8), torch.from_numpy(scale)
            )
        probe.quantised(Operand(f"m{index % 3}", "input"), Quantizer(), stored)
        if index == 3:
            probe.settle()
    reading = probe.end()
    assert reading is not None
    return reading.values


@pytest.mark.parametrize("recipe", ["mxfp8", "nvfp4", "blockwise"])
@pytest.mark.parametrize("case", ["numbers", "zeros", "not a number"])
def test_the_distribution_is_that_of_the_torch_operations(
    recipe: str, case: str, native: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_kernels, "scale_counts", None)
    monkeypatch.setattr(host_kernels, "scale_distribution", None)
    wanted = described(recipe, case)
    monkeypatch.setattr(host_kernels, "scale_counts", native.scale_counts)
    halfway = described(recipe, case)
    monkeypatch.setattr(host_kernels, "scale_distribution", native.scale_distribution)
    for found in (halfway, described(recipe, case)):
        torch.testing.assert_close(found, wanted, rtol=2.0**-22, atol=0, equal_nan=True)
