"""The fused update of histories and scales against the rule written for one number at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

FP8_MAX = {"kFloat8E4M3": 448.0, "kFloat8E5M2": 57344.0}
FLT_MAX = float(np.finfo(np.float32).max)


def one_column(
    history: list[float], scale: float, reduced: float, algorithm: str, fp8_max: float, margin: float
):
    """`amax_and_scale_update_impl::kernel_bulk` of TE, for one column."""
    newest = reduced if reduced != 0.0 else history[0]
    if newest == 0.0:
        return history, scale
    rolled = [*history[1:], newest]
    if algorithm == "max":
        seen = max((value for value in rolled if not math.isnan(value)), default=0.0)
    else:
        seen = newest
    rolled[0] = 0.0
    if math.isfinite(seen) and seen > 0.0:
        with np.errstate(over="ignore"):
            scale = float(np.float32(fp8_max * 2.0**-margin) / np.float32(seen))
        if math.isinf(scale):
            scale = FLT_MAX
    return rolled, scale


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("fmt", ["kFloat8E4M3", "kFloat8E5M2"])
@pytest.mark.parametrize(("length", "margin"), [(1, 0), (2, 1), (5, 0)])
def test_against_the_scalar_rule(te, tex, algorithm, fmt, length, margin):
    special = [0.0, 1e-42, 3.0, 448.0, float("inf"), float("nan"), 1e30, 0.5]
    histories = [torch.rand(length, 3) * 10, torch.rand(length, 8)]
    histories[0][0, 1] = 0.0
    if length > 2:
        histories[1][2, 4] = float("inf")
        histories[1][1, 3] = float("nan")
    scales = [torch.rand(3), torch.rand(8)]
    reduced = torch.tensor([5.0, 0.0, 7.0, *special])
    expected = []
    for column in range(11):
        group, index = (0, column) if column < 3 else (1, column - 3)
        expected.append(
            one_column(
                histories[group][:, index].tolist(),
                scales[group][index].item(),
                reduced[column].item(),
                algorithm,
                FP8_MAX[fmt],
                margin,
            )
        )
    pointers = [history.data_ptr() for history in histories]
    tex.fused_amax_and_scale_update_after_reduction(
        reduced, histories, scales, algorithm, getattr(te.DType, fmt), margin
    )
    assert [history.data_ptr() for history in histories] == pointers
    found_history = torch.cat(histories, dim=1).numpy()
    found_scale = torch.cat(scales).numpy()
    for column, (history, scale) in enumerate(expected):
        np.testing.assert_array_equal(found_history[:, column], np.float32(history))
        np.testing.assert_array_equal(found_scale[column], np.float32(scale))


def test_unknown_algorithm(te, tex):
    with pytest.raises(RuntimeError, match=r"Unsupported amax compute algorithm \(mean\)"):
        tex.fused_amax_and_scale_update_after_reduction(
            torch.ones(1), [torch.ones(2, 1)], [torch.ones(1)], "mean", te.DType.kFloat8E4M3, 0
        )
