from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.numerics import E4M3, delayed

from . import oracles
from .inputs import mixed

FLT_MAX = float(np.finfo(np.float32).max)
AMAXES = st.sampled_from(
    [0.0, 1e-45, 1e-38, 0.5, 1.0, 3.0, 448.0, 1e30, FLT_MAX, math.inf, math.nan]
) | st.floats(min_value=0.0, max_value=1e6, width=32)


def update_column(
    history: list[float], scale: float, reduced: float | None, algorithm: str, scaled_max: float
) -> tuple[list[float], float]:
    """The fused update of one column, in scalars."""
    newest = reduced if reduced is not None and reduced != 0.0 else history[0]
    amax = 0.0
    if newest != 0.0:
        moved = [*history[1:], newest]
        for value in moved:
            amax = value if value > amax else amax
        history = [0.0, *moved[1:]]
    if algorithm == "most_recent":
        amax = newest
    if math.isfinite(amax) and amax > 0.0:
        with np.errstate(over="ignore"):
            scale = float(np.float32(scaled_max) / np.float32(amax))
    return history, FLT_MAX if math.isinf(scale) else scale


@st.composite
def updates(draw: st.DrawFn) -> dict:
    length = draw(st.integers(1, 5))
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    columns = sum(widths)
    amaxes = st.lists(AMAXES, min_size=columns, max_size=columns)
    return {
        "widths": widths,
        "history": draw(st.lists(amaxes, min_size=length, max_size=length)),
        "scale": draw(st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=columns, max_size=columns)),
        "reduced": draw(st.none() | amaxes),
        "algorithm": draw(st.sampled_from(["max", "most_recent"])),
        "fp8_max": draw(st.sampled_from([448.0, 57344.0])),
        "margin": draw(st.sampled_from([0, 1, 3])),
    }


@settings(max_examples=150, deadline=None)
@given(updates())
def test_update_equals_the_scalar_rule(case: dict) -> None:
    all_history, all_scale = torch.tensor(case["history"]), torch.tensor(case["scale"])
    histories = [part.clone() for part in all_history.split(case["widths"], dim=1)]
    scales = [part.clone() for part in all_scale.split(case["widths"])]
    reduced = None if case["reduced"] is None else torch.tensor(case["reduced"])
    delayed.update_amax_and_scale(
        histories,
        scales,
        reduced,
        algorithm=case["algorithm"],
        fp8_max=case["fp8_max"],
        margin=case["margin"],
    )
    scaled_max = case["fp8_max"] * 2.0 ** -case["margin"]
    for column in range(all_scale.numel()):
        history, scale = update_column(
            all_history[:, column].tolist(),
            all_scale[column].item(),
            None if reduced is None else reduced[column].item(),
            case["algorithm"],
            scaled_max,
        )
        np.testing.assert_array_equal(torch.cat(histories, dim=1)[:, column].tolist(), history)
        assert torch.cat(scales)[column].item() == scale


def updated(history: list[float], scale: float = 7.0, **options: object) -> tuple[list[float], float]:
    table, scales = torch.tensor(history).reshape(-1, 1), torch.tensor([scale])
    arguments = {"algorithm": "max", "fp8_max": 448.0, **options}
    reduced = arguments.pop("reduced", table[0].clone())
    delayed.update_amax_and_scale([table], [scales], reduced, **arguments)
    return table.flatten().tolist(), scales.item()


def test_the_newest_amax_becomes_the_last_row_and_row_zero_is_cleared() -> None:
    history, scale = updated([2.0, 8.0, 4.0, 1.0])
    assert history == [0.0, 4.0, 1.0, 2.0]
    # The oldest entry, 8, is counted once more before it is gone.
    assert scale == 448.0 / 8.0
    assert updated([2.0, 8.0, 4.0, 1.0], algorithm="most_recent") == ([0.0, 4.0, 1.0, 2.0], 224.0)


def test_an_amax_of_zero_skips_roll_and_scale() -> None:
    assert updated([0.0, 8.0, 4.0]) == ([0.0, 8.0, 4.0], 7.0)
    assert updated([0.0, 8.0, 4.0], algorithm="most_recent") == ([0.0, 8.0, 4.0], 7.0)


def test_an_infinite_amax_freezes_the_scale_until_it_leaves_the_window() -> None:
    table, scale = torch.tensor([[math.inf], [1.0], [1.0]]), torch.tensor([7.0])
    seen = []
    for _ in range(4):
        delayed.update_amax_and_scale([table], [scale], table[0].clone(), algorithm="max", fp8_max=448.0)
        seen.append(scale.item())
        table[0] = 2.0
    assert seen == [7.0, 7.0, 7.0, 224.0]


def test_nan_is_kept_in_the_history_and_ignored_by_the_maximum() -> None:
    history, scale = updated([math.nan, 8.0, 4.0])
    np.testing.assert_array_equal(history, [0.0, 4.0, math.nan])
    assert scale == 448.0 / 8.0
    _, scale = updated([math.nan, 8.0, 4.0], algorithm="most_recent")
    assert scale == 7.0


def test_the_reduced_amax_replaces_the_local_one() -> None:
    history, scale = updated([2.0, 0.0, 0.0], reduced=torch.tensor([16.0]))
    assert (history, scale) == ([0.0, 0.0, 16.0], 28.0)
    assert updated([2.0, 0.0, 0.0], reduced=torch.tensor([0.0]))[0] == [0.0, 0.0, 2.0]
    assert updated([2.0, 0.0, 0.0], reduced=None)[0] == [0.0, 0.0, 2.0]


def test_margin_and_overflow() -> None:
    assert updated([2.0, 0.0], margin=3)[1] == 28.0
    assert updated([1e-40, 0.0])[1] == FLT_MAX


def test_a_history_of_one_row() -> None:
    assert updated([2.0]) == ([0.0], 224.0)
    assert updated([2.0], algorithm="most_recent") == ([0.0], 224.0)


def test_the_update_is_in_place_on_views() -> None:
    histories, scales = torch.ones(4, 6), torch.ones(6)
    delayed.update_amax_and_scale(
        [histories[:, :2], histories[:, 3:]],
        [scales[:2], scales[3:]],
        torch.tensor([2.0, 4.0, 8.0, 16.0, 32.0]),
        algorithm="max",
        fp8_max=448.0,
    )
    assert histories[-1].tolist() == [2.0, 4.0, 1.0, 8.0, 16.0, 32.0]
    assert scales.tolist() == [224.0, 112.0, 1.0, 56.0, 28.0, 14.0]


def test_nothing_to_update() -> None:
    delayed.update_amax_and_scale([], [], None, algorithm="max", fp8_max=448.0)


def test_unknown_algorithm() -> None:
    with pytest.raises(RecipeError, match=r"'maximum'.*Allowed: max, most_recent.*Did you mean max") as error:
        delayed.update_amax_and_scale([], [], None, algorithm="maximum", fp8_max=448.0)
    assert error.value.key == "amax_compute_algo"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_uses_the_given_scale_and_observes_the_amax(dtype: torch.dtype) -> None:
    x = mixed((9, 33), dtype)
    quantized = delayed.quantize_delayed(x, E4M3, torch.tensor([0.3]))
    values = x.float().numpy()
    expected = oracles.encode_all(oracles.multiply(values, np.float32(0.3)), "e4m3")
    np.testing.assert_array_equal(quantized.codes.numpy(), expected)
    assert quantized.amax.tolist() == [oracles.amax(values)]
    assert quantized.scale_inv.tolist() == [np.float32(1.0) / np.float32(0.3)]
    assert delayed.quantize_delayed(torch.empty(0, 8), E4M3, torch.ones(1)).amax.tolist() == [0.0]
