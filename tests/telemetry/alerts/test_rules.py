"""Each rule on series that violate it and on series that look alike and do not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from nemo_fp8_recipes.telemetry.alerts.columns import OperandTable
from nemo_fp8_recipes.telemetry.alerts.rules import AmaxGrowth
from nemo_fp8_recipes.telemetry.alerts.schema import default_alerts
from nemo_fp8_recipes.telemetry.alerts.watch import Watch
from nemo_fp8_recipes.telemetry.rows import Rows
from nemo_fp8_recipes.telemetry.series import Series, StepValues
from tests.telemetry.alerts.series import MODULE, alerts, only, steps

INF, NAN = math.inf, math.nan
FLT_MAX = 3.4028234663852886e38


def seen(found: list[Any]) -> list[tuple[int, str]]:
    return [(alert.step, alert.rule) for alert in found]


def delayed(amax: list[float], scale: list[float], **extra: list[float]) -> dict[str, list[float]]:
    return {"amax": amax, "scale": scale, "scale_next": scale, **extra}


# -- saturation


def test_an_amax_jump_under_the_old_scale_saturates() -> None:
    # The scale was made for an amax of 2: 448 / 2 = 224. An amax of 8 is four times that.
    found = alerts(steps(delayed([2, 2, 8, 8], [224, 224, 224, 56])), only("saturation"))
    assert seen(found) == [(30, "saturation")]
    assert found[0].value == pytest.approx(4.0)
    assert f"{MODULE} input: the amax of this step is 4 times" in found[0].message
    assert "fp8_recipe.margin" in found[0].message


def test_the_micro_batch_with_the_least_headroom_counts() -> None:
    # The second micro-batch had a scale that followed already; the first one saturated.
    given = steps(delayed([8.0], [56.0], headroom=[0.25]))
    assert alerts(given, only("saturation"))[0].value == pytest.approx(4.0)
    assert alerts(steps(delayed([8.0], [56.0], headroom=[1.0])), only("saturation")) == []


@pytest.mark.parametrize(
    ("amax", "scale", "fmt"),
    [
        ([2.0, 4.0, 8.0], [224.0, 112.0, 56.0], "e4m3"),  # the scale follows in time
        ([2.0, 2.07], [224.0, 224.0], "e4m3"),  # 463.7 rounds to 448: nothing is lost that rounding keeps
        ([1.0, 1.07], [57344.0, 57344.0], "e5m2"),  # likewise below 61440
        ([INF, NAN], [224.0, 224.0], "e4m3"),  # not a jump: other rules report it
    ],
)
def test_what_the_scale_still_holds_does_not_saturate(
    amax: list[float], scale: list[float], fmt: str
) -> None:
    assert alerts(steps(delayed(amax, scale), fmt=fmt), only("saturation", saturation={"limit": 1.0})) == []


def test_the_limit_of_saturation_can_be_raised() -> None:
    given = steps(delayed([8.0], [224.0]))
    assert alerts(given, only("saturation", saturation={"limit": 4.0})) == []
    assert seen(alerts(given, only("saturation", saturation={"limit": 3.0}))) == [(10, "saturation")]


def test_other_recipes_scale_with_the_tensor_and_cannot_saturate_so() -> None:
    given = steps({"amax": [8.0], "scale": [224.0], "scale_next": [224.0]}, recipe="tensorwise")
    assert alerts(given, only("saturation")) == []


# -- history_frozen


def test_an_inf_in_the_window_freezes_the_scale_as_long_as_it_stays() -> None:
    stats = delayed([2, INF, 2, 2], [224] * 4)
    windows = [[0, 0, 2], [0, 2, INF], [2, INF, 2], [INF, 2, 2]]
    found = alerts(steps(stats, windows=windows), only("history_frozen"))
    assert seen(found) == [(20, "history_frozen")]  # once, not in each step it lasts
    assert "after 3 updates at most" in found[0].message


def test_an_inf_between_two_logging_steps_is_found_in_the_window() -> None:
    found = alerts(
        steps(delayed([2, 2], [224, 224]), windows=[[1, 1, 2], [INF, 2, 2]]), only("history_frozen")
    )
    assert seen(found) == [(20, "history_frozen")]


def test_without_windows_the_inf_itself_is_reported() -> None:
    assert seen(alerts(steps(delayed([2, INF], [224, 224])), only("history_frozen"))) == [
        (20, "history_frozen")
    ]


def test_nan_does_not_freeze_and_large_values_do_not() -> None:
    given = steps(delayed([NAN, 3e38], [224, 224]), windows=[[1, NAN, NAN], [1, 2, 3e38]])
    assert alerts(given, only("history_frozen")) == []


# -- non_finite


@pytest.mark.parametrize(("stat", "recipe"), [("amax", "tensorwise"), ("amax_bound", "mxfp8")])
@pytest.mark.parametrize("bad", [INF, NAN])
def test_nan_and_inf_are_reported_under_every_recipe(stat: str, recipe: str, bad: float) -> None:
    found = alerts(steps({stat: [1.0, bad, 1.0]}, recipe=recipe), only("non_finite"))
    assert seen(found) == [(20, "non_finite")]


def test_a_tensor_that_was_not_quantised_is_not_one_of_nan() -> None:
    first = steps({"amax": [1.0]}, modules=("a", "b"))
    second = steps({"amax": [1.0, 1.0]}, modules=("a",))[1:]
    assert alerts([*first, *second], only("non_finite")) == []


# -- scale_limit


@pytest.mark.parametrize(
    ("stats", "recipe"),
    [
        ({"scale_next": [224.0, FLT_MAX]}, "delayed"),
        ({"scale": [224.0, FLT_MAX]}, "tensorwise"),
        ({"scale": [224.0, 1e-39]}, "tensorwise"),
        ({"scale_inv_min": [2.0**-20, 2.0**-126]}, "mxfp8"),
        ({"scale_inv_max": [2.0**20, 2.0**127]}, "mxfp8"),
    ],
)
def test_a_scale_at_the_end_of_its_format(stats: dict[str, list[float]], recipe: str) -> None:
    assert seen(alerts(steps(stats, recipe=recipe), only("scale_limit"))) == [(20, "scale_limit")]


@pytest.mark.parametrize(
    ("stats", "recipe"),
    [
        ({"scale_next": [1.0, 1e38]}, "delayed"),
        ({"scale_inv_min": [0.0, 2.0**-125]}, "mxfp8"),  # 0: a tensor of zeros
        ({"scale_inv_max": [2.0**126, INF]}, "mxfp8"),  # Inf: a NaN in a block, which non_finite reports
        ({"scale_inv_min": [2.0**-126, 2.0**-126]}, "blockwise"),  # FP32 scales go further
    ],
)
def test_a_scale_within_its_format(stats: dict[str, list[float]], recipe: str) -> None:
    assert alerts(steps(stats, recipe=recipe), only("scale_limit")) == []


# -- underflow


def test_underflow_above_the_limit() -> None:
    given = steps({"amax": [1.0] * 3, "underflow": [0.1, 0.49, 0.6]}, fmt="e5m2", tensor="grad_output")
    found = alerts(given, only("underflow"))
    assert seen(found) == [(30, "underflow")]
    assert "the fraction 0.6 of its elements became zero in e5m2, more than 0.5" in found[0].message
    assert seen(alerts(given, only("underflow", underflow={"limit": 0.3}))) == [(20, "underflow")]


def test_without_the_statistic_the_rule_says_that_it_is_blind(caplog: pytest.LogCaptureFixture) -> None:
    assert alerts(steps({"amax": [1.0] * 25}), only("underflow")) == []
    assert [record.message for record in caplog.records] == [
        "Alert rule underflow sees nothing. It needs the statistics that read the tensors again: set "
        "telemetry.stats_every."
    ]


def test_delayed_scalings_first_cast_with_scale_one_is_no_alert() -> None:
    given = {"amax": [1.0] * 2, "underflow": [0.9, 0.9], "scale": [1.0, 2.0]}
    assert seen(alerts(steps(given, recipe="delayed"), only("underflow"))) == [(20, "underflow")]
    assert seen(alerts(steps(given, recipe="tensorwise"), only("underflow"))) == [(10, "underflow")]


def test_a_statistic_that_comes_seldom_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(only("underflow"), reads_tensors=True)
    for values in steps({"amax": [1.0] * 25}):
        watch.look(values)
    watch.report_blind()
    assert caplog.records == []


# -- amax_growth


def test_exponential_growth_is_reported_once() -> None:
    found = alerts(steps({"amax": [1.5**i for i in range(30)]}), only("amax_growth"))
    assert seen(found) == [(100, "amax_growth")]
    assert found[0].value == pytest.approx(1.5**9)


@pytest.mark.parametrize(
    "amax",
    [
        [1.0] * 30,
        [1.0 + i for i in range(10)],  # x10, below the limit
        [1.2**i for i in range(30)],  # x5 over each window
        [64.0 if i == 15 else 1.0 for i in range(30)],  # a spike
        [1.0] * 15 + [64.0] * 15,  # a jump: no straight line
        [2.0**-i for i in range(30)],  # falls
        [0.0] * 5 + [2.0**i for i in range(9)],  # zeros are no growth; the window is not full yet
    ],
)
def test_what_does_not_grow_like_an_exponential(amax: list[float]) -> None:
    # Of a jump at most the middle windows look like a line, with r squared of 0.76 at best.
    assert alerts(steps({"amax": amax}), only("amax_growth")) == []


def test_growth_of_a_bound_in_powers_of_two() -> None:
    bound = [2.0 ** math.floor(i * 0.6) for i in range(20)]
    assert seen(alerts(steps({"amax_bound": bound}, recipe="mxfp8"), only("amax_growth"))) == [
        (100, "amax_growth")
    ]


# -- ranks_disagree


def test_ranks_that_disagree_on_a_delayed_scale() -> None:
    agreed = steps({"scale": [224.0]})
    apart = steps({"scale": [0.0, 224.0], "scale_max": [0.0, 448.0]})[1:]
    found = alerts([*agreed, *apart], only("ranks_disagree"))
    assert seen(found) == [(20, "ranks_disagree")]
    assert found[0].value == 2.0
    assert alerts(apart, only("ranks_disagree"), amax_reduced=False) == []


# -- rules of the user's own


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"stat": "amax", "above": 3.0}, [30]),
        ({"stat": "amax", "below": 2.0}, [10]),
        ({"stat": "amax", "above": 3.0, "module": "decoder.layers.*.linear_fc1"}, [30]),
        ({"stat": "amax", "above": 3.0, "module": "*.linear_fc2"}, []),
        ({"stat": "amax", "above": 3.0, "tensor": "weight"}, []),
        ({"stat": "amax", "above": 3.0, "enabled": False}, []),
    ],
)
def test_a_rule_of_the_users_own(rule: dict[str, Any], expected: list[int]) -> None:
    given = steps({"amax": [1.0, 2.0, 4.0]})
    rules = only("", custom={"mine": {"message": "{module} is at {value}, limit {limit}", **rule}})
    found = alerts(given, rules)
    assert [alert.step for alert in found] == expected
    if expected == [30]:
        assert found[0].message == f"{MODULE} is at 4, limit 3"


def test_a_rule_on_a_statistic_that_is_never_logged_says_so(caplog: pytest.LogCaptureFixture) -> None:
    rules = only("", custom={"mine": {"stat": "amaxx", "above": 1.0, "message": "-"}})
    alerts(steps({"amax": [1.0] * 25}), rules)
    assert "Alert rule mine sees nothing. No statistic 'amaxx' was logged" in caplog.text


def growth_by_definition(steps: np.ndarray, amax: np.ndarray, limit: float, steadiness: float) -> bool:
    """Whether log2(amax) is a rising straight line, fitted by numpy."""
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.log2(amax.astype(np.float64))
    if not np.isfinite(y).all():
        return False
    slope, _ = np.polyfit(steps, y, 1)
    r_squared = np.corrcoef(steps, y)[0, 1] ** 2 if y.std() else 0.0
    return bool(2.0 ** (slope * (steps[-1] - steps[0])) > limit and r_squared >= steadiness)


@pytest.mark.parametrize("seed", range(6))
def test_growth_is_that_of_a_fitted_line_whatever_the_steps_between(seed: int) -> None:
    generator = np.random.default_rng(seed)
    operands, count, window = 5, 60, 10
    steps = np.cumsum(generator.integers(1, 4 if seed % 2 else 2, count))
    slopes = np.repeat(generator.uniform(-0.1, 0.9, (operands, 1)), count, axis=1)
    amax = np.exp2(np.cumsum(slopes + generator.normal(0, 0.15, slopes.shape), axis=1) - 10).astype(
        np.float32
    )
    amax[generator.random(amax.shape) < 0.005] = generator.choice([0.0, np.inf, np.nan])
    names = tuple(Series(f"m{row}", "input", "amax", "delayed", "e4m3") for row in range(operands))
    rule = AmaxGrowth(default_alerts().amax_growth)
    table, found = OperandTable(), []
    for index in range(count):
        columns = table.columns(StepValues(int(steps[index]), names, amax[:, index]))
        violated = rule.check(columns).violated
        begin = index + 1 - window
        for row in range(operands):
            expected = begin >= 0 and growth_by_definition(
                steps[begin : index + 1], amax[row, begin : index + 1], rule.limit, 0.9
            )
            assert bool(violated[row]) == expected, (row, index)
            found.append(expected)
    assert 0 < sum(found) < len(found)


def rows(matrix: list[list[float]]) -> Rows[Series]:
    names = tuple(Series(f"m{row}", "input", "amax_history", "delayed", "e4m3") for row in range(len(matrix)))
    return Rows(names, np.float32(matrix))


@pytest.mark.parametrize(
    ("window", "frozen"),
    [
        ([[1, 2], [3, np.inf]], ["m1"]),
        ([[1, 2], [3, 4]], []),
        ([[np.nan, 2], [3, 4]], []),
        ([[np.nan, np.inf], [3, np.nan]], ["m0"]),
        ([[1, -np.inf], [3, 4]], ["m0"]),
    ],
)
def test_an_inf_in_a_matrix_of_windows_is_found_where_all_numbers_are_calm(
    window: list[list[float]], frozen: list[str]
) -> None:
    names = tuple(
        Series(f"m{row}", "input", stat, "delayed", "e4m3")
        for row in range(2)
        for stat in ("amax", "scale", "scale_next", "headroom")
    )
    values = StepValues(1, names, np.float32([1, 2, 2, 224] * 2), rows(window))
    found = Watch(only("history_frozen")).look(values)
    assert [module for alert in found for module, _ in alert.tensors] == frozen


def test_headroom_alone_rules_saturation_out_only_where_every_operand_has_it() -> None:
    names = tuple(
        Series(f"m{row}", "input", stat, "delayed", "e4m3")
        for row in range(2)
        for stat in ("amax", "scale", "scale_next", *(("headroom",) if row else ()))
    )
    values = StepValues(1, names, np.float32([4480, 1, 1, 1, 1, 1, 448]))
    (alert,) = Watch(only("saturation")).look(values)
    assert alert.tensors == (("m0", "input"),)
