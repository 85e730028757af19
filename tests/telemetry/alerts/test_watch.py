"""When an alert is given, what it holds, and what the configuration refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.recipes import load
from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from nemo_fp8_recipes.telemetry.alerts.schema import FIELDS, default_alerts
from nemo_fp8_recipes.telemetry.alerts.watch import Watch, reduces_amax
from nemo_fp8_recipes.telemetry.series import Series, StepValues
from tests.telemetry.alerts.series import MODULE, alerts, config, only, steps


def test_many_tensors_make_one_alert_with_the_worst_first() -> None:
    given = steps({"amax": [8.0], "scale": [224.0], "scale_next": [224.0]}, modules=("a", "b", "c"))
    given[0].values[3] = 80.0  # the amax of b
    (alert,) = alerts(given, only("saturation"))
    assert (alert.module, alert.tensor, alert.value) == ("b", "input", pytest.approx(40.0))
    assert alert.tensors == (("b", "input"), ("a", "input"), ("c", "input"))
    assert "(and 2 more tensors)" in alert.message


def test_what_comes_back_soon_is_the_same_event() -> None:
    loud = [1.0, 9.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 9.0]
    rules = only("", quiet=3, custom={"loud": {"stat": "amax", "above": 5.0, "message": "-"}})
    assert [alert.step for alert in alerts(steps({"amax": loud}), rules)] == [20, 90]


def test_steps_without_the_statistic_are_no_steps_in_which_the_rule_was_kept() -> None:
    rules = only("", quiet=2, custom={"lost": {"stat": "underflow", "above": 0.5, "message": "-"}})
    given = steps({"amax": [1.0] * 12})
    for index, fraction in ((0, 0.9), (5, 0.9), (11, 0.9)):
        (given[index],) = steps({"underflow": [fraction]})
        given[index] = dataclasses.replace(given[index], step=10 * (index + 1))
    assert [alert.step for alert in alerts(given, rules)] == [10]


def test_a_resumed_run_is_looked_at_anew() -> None:
    watch = Watch(only("", custom={"loud": {"stat": "amax", "above": 5.0, "message": "-"}}))
    first, second, third = steps({"amax": [9.0, 9.0, 9.0]})
    assert len(watch.look(first)) == 1
    assert watch.look(second) == ()
    watch.forget()
    assert [alert.step for alert in watch.look(third)] == [30]


def test_a_tensor_seen_later_has_its_own_beginning() -> None:
    rules = only("", custom={"loud": {"stat": "amax", "above": 5.0, "message": "-"}})
    given = [*steps({"amax": [9.0]}, modules=("a",)), *steps({"amax": [0, 9.0]}, modules=("b", "a"))[1:]]
    assert [alert.tensors for alert in alerts(given, rules)] == [(("a", "input"),), (("b", "input"),)]


def test_what_another_recipe_would_do_is_not_what_this_one_does() -> None:
    (given,) = steps({"amax": [8.0], "scale": [224.0], "scale_next": [224.0]})
    asked = Series(MODULE, "input", "whatif/mxfp8/amax_bound", "mxfp8", "e4m3")
    given = dataclasses.replace(
        given, series=(*given.series, asked), values=np.append(given.values, np.float32(8))
    )
    assert [alert.rule for alert in alerts([given], only("saturation"))] == ["saturation"]


def test_switched_off_nothing_is_evaluated() -> None:
    assert alerts(steps({"amax": [float("inf")]}), config(enabled=False)) == []


def test_an_alert_survives_json() -> None:
    alert = Alert(5, "non_finite", "stop", "text", "m", "input", float("-inf"), (("m", "input"),))
    assert Alert.from_dict(json.loads(json.dumps(alert.to_dict(), allow_nan=False))) == alert


@pytest.mark.parametrize(
    ("options", "reduced"),
    [({}, True), ({"reduce_amax": False}, False), ({"tp_only_amax_red": True}, False)],
)
def test_ranks_have_to_agree_only_where_the_recipe_reduces_over_all(
    options: dict[str, Any], reduced: bool
) -> None:
    assert reduces_amax(load("delayed", **options).to_dict()) is reduced


def test_every_default_message_says_what_to_do() -> None:
    for name, rule in default_alerts().rules().items():
        for advice in rule.advice.values() or ("",):
            filled = rule.message.format_map({**dict.fromkeys(FIELDS, "x"), "advice": advice})
            assert "{" not in filled, name
            words = ("raise", "go on from", "check", "use ", "Lower", "keep the module in")
            assert any(word in filled for word in words), (name, filled)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"saturation": {"message": "{tensr}"}}, "contains {tensr}"),
        ({"saturation": {"message": "{module"}}, "cannot be formatted"),
        ({"saturation": {"message": "{value:.2f}"}}, "write {value}, not {value:.2f}"),
        ({"saturation": {"message": "{value!x}"}}, "cannot be formatted"),
        ({"saturation": {"message": "{module:{foo}}"}}, "cannot be formatted"),
        ({"saturation": {"action": "halt"}}, "Allowed: warn, checkpoint, stop"),
        ({"saturaton": {}}, "Did you mean 'saturation'?"),
        ({"quiet": 0}, "alerts.quiet=0"),
        ({"amax_growth": {"window": 2}}, "alerts.amax_growth.window=2"),
        ({"amax_growth": {"limit": 1.0}}, "alerts.amax_growth.limit=1.0"),
        ({"amax_growth": {"steadiness": 2.0}}, "alerts.amax_growth.steadiness=2.0"),
        ({"custom": {"a": {"stat": "amax", "message": "-"}}}, "one of above and below"),
        ({"custom": {"a": {"stat": "x", "message": "-", "above": 1, "below": 2}}}, "one of above and below"),
        ({"custom": {"underflow": {"stat": "x", "message": "-", "above": 1}}}, "is there already"),
        ({"custom": {"a": {"above": 1, "message": "-"}}}, "alerts.custom.a.stat needs a value"),
    ],
)
def test_impossible_rules_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "says", "not_says"),
    [
        ("delayed", "use block scales (fp8_recipe=mxfp8 or blockwise)", "BF16"),
        ("tensorwise", "use block scales (fp8_recipe=mxfp8 or blockwise)", "BF16"),
        ("blockwise", "use smaller ones (fp8_recipe=mxfp8)", "or blockwise"),
        ("mxfp8", "fp8_recipe.fp8_format=hybrid", "fp8_recipe=mxfp8"),
        ("nvfp4", "keep the module in MXFP8 or BF16", "fp8_recipe="),
    ],
)
def test_what_to_do_about_underflow_depends_on_the_recipe(recipe: str, says: str, not_says: str) -> None:
    """Never the recipe that the run has."""
    (found,) = alerts(steps({"underflow": [0.9]}, recipe=recipe), only("underflow"))
    assert says in found.message
    assert not_says not in found.message
    assert f"fp8_recipe={recipe}" not in found.message


def test_advice_is_for_recipes_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"alerts\.underflow\.advice\.mxfp9 is for no recipe"):
        config(underflow={"advice": {"mxfp9": "-"}})
    changed = config(underflow={"advice": {"mxfp8": "Do this."}})
    (found,) = alerts(steps({"underflow": [0.9]}, recipe="mxfp8"), changed)
    assert found.message.endswith("Do this.")


def test_a_step_that_is_not_looked_at_closely_has_nothing_to_report() -> None:
    edges = [0.0, 1e-45, 2.0**-149, 2.0**-126, 2.0**-125, 0.5, 1.0, 2.0**126, 2.0**127, 3.4028235e38]
    edges += [math.inf, -math.inf, math.nan, -1.0]
    stats = ("amax_bound", "amax", "scale", "scale_inv_max", "scale_inv_min", "underflow", "nonfinite")
    series = tuple(
        Series("m", tensor, stat, recipe, "e4m3")
        for tensor, recipe in (("input", "mxfp8"), ("weight", "blockwise"))
        for stat in stats
    )
    plain = np.asarray([1.0, 1.0, 1.0, 1.0, 1.0, 0.25, 0.0] * 2, dtype=np.float32)
    watch, thorough = Watch(default_alerts()), Watch(default_alerts())
    for check in thorough._checks.values():
        check.quiet = None
    reported = set()
    for step, (place, edge) in enumerate(itertools.product(range(len(series)), edges), start=1):
        for number, value in ((2 * step, plain[place]), (2 * step + 1, edge)):
            values = plain.copy()
            values[place] = value
            found, wanted = (
                [alert.to_dict() for alert in one.look(StepValues(number, series, values))]
                for one in (watch, thorough)
            )
            assert found == wanted, (series[place], edge)
            reported |= {alert["rule"] for alert in found}
    assert {"non_finite", "scale_limit", "underflow"} <= reported
