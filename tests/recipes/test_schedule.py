"""Which recipe each step trains with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.config import compose
from nemo_fp8_recipes.errors import ConfigError, Fp8Error, RecipeError
from nemo_fp8_recipes.recipes.schedule import Schedule, Span, read_schedule, schedule_of

MXFP8 = recipes.load("mxfp8")
BF16 = recipes.load("bf16")


def names(schedule: Schedule, steps: int) -> list[str]:
    return [schedule.at(step).name for step in range(1, steps + 1)]


def test_without_spans_every_step_has_the_main_recipe():
    schedule = read_schedule([], MXFP8, 10)
    assert names(schedule, 10) == ["mxfp8"] * 10
    assert schedule.recipes() == (MXFP8,)
    assert str(schedule) == "mxfp8"


def test_spans_take_the_steps_they_name_both_ends_included():
    schedule = read_schedule(
        [{"recipe": "bf16", "from_step": "85%"}, {"recipe": "bf16", "to_step": 3}], MXFP8, 20
    )
    assert names(schedule, 20) == ["bf16"] * 3 + ["mxfp8"] * 14 + ["bf16"] * 3
    assert str(schedule) == "mxfp8; bf16 in steps 1 to 3, bf16 in steps 18 to 20"
    assert schedule.recipes() == (MXFP8, BF16)


@given(steps=st.integers(1, 10_000), percent=st.integers(0, 100))
def test_shares_that_meet_leave_no_step_out_and_share_none(steps: int, percent: int):
    covered: list[int] = []
    border = int(steps * percent / 100)
    for key, empty in (("to_step", border == 0), ("from_step", border == steps)):
        entries = [{"recipe": "bf16", key: f"{percent}%"}]
        if empty:
            with pytest.raises(RecipeError, match="covers steps"):
                read_schedule(entries, MXFP8, steps)
        else:
            (span,) = read_schedule(entries, MXFP8, steps).spans
            covered += range(span.first, span.last + 1)
    assert covered == list(range(1, steps + 1))


def test_a_span_may_have_options_an_alias_or_a_preset():
    spans = [
        {"recipe": {"name": "tensorwise", "use_power_2_scales": True}, "to_step": 1},
        {"recipe": "fp8_cs", "from_step": 2, "to_step": 2},
        {"recipe": "nemotron_nano_v2", "from_step": 3, "to_step": 3},
    ]
    with pytest.raises(RecipeError, match=r"recipe_schedule\[2\] stores weights quantised"):
        read_schedule(spans, MXFP8, 10)
    first, second = read_schedule(spans[:2], MXFP8, 10).spans
    assert first.recipe == recipes.load("tensorwise", use_power_2_scales=True)
    assert second.recipe == recipes.load("tensorwise")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{"recipe": "mxfp9", "to_step": 2}], "no recipe 'mxfp9'"),
        ([{"recipe": "bf16"}], "neither from_step nor to_step"),
        ([{"recipe": "bf16", "from_step": 0}], "covers steps 0 to 10 of a job of training.steps=10"),
        ([{"recipe": "bf16", "from_step": 5, "to_step": 4}], "covers steps 5 to 4"),
        ([{"recipe": "bf16", "to_step": 11}], "covers steps 1 to 11"),
        ([{"recipe": "bf16", "to_step": "101%"}], "to_step=101% is neither a step nor a share"),
        ([{"recipe": "bf16", "to_step": "half"}], "to_step=half is neither"),
        (
            [{"recipe": "bf16", "to_step": 5}, {"recipe": "blockwise", "from_step": 5}],
            "two recipes for step 5: bf16 for steps 1 to 5 and blockwise for steps 5 to 10",
        ),
    ],
)
def test_bad_spans_are_named(entries, said):
    with pytest.raises(RecipeError) as raised:
        read_schedule(entries, MXFP8, 10)
    assert said in str(raised.value)


def test_the_model_must_be_built_for_a_recipe_that_can_change():
    with pytest.raises(RecipeError, match="needs a quantised fp8_recipe"):
        Schedule(BF16, (Span(MXFP8, 1, 2),))
    with pytest.raises(RecipeError, match="return to delayed scaling only where the model is built for it"):
        Schedule(MXFP8, (Span(recipes.load("delayed"), 1, 2),))
    with pytest.raises(RecipeError, match="weights that are stored quantised"):
        Schedule(recipes.load("tensorwise", fp8_param=True), (Span(BF16, 1, 2),))


def test_it_composes_and_is_checked_with_the_configuration():
    config = compose(["training.steps=100", "recipe_schedule=[{recipe: bf16, from_step: 85%}]"])
    assert schedule_of(config).spans == (Span(BF16, 86, 100),)
    for wrong, key in (
        ("recipe_schedule=[{recipe: bf16, until: 5}]", "until"),
        ("recipe_schedule=[{recipe: bf16, to_step: 5.5}]", "to_step"),
        ("recipe_schedule=[{to_step: 5}]", r"recipe_schedule\[0\]\.recipe needs a value\.$"),
        ("recipe_schedule=bf16", "recipe_schedule"),
        ("recipe_schedule=[{recipe: bf16, to_step: 1000}]", "recipe_schedule"),
    ):
        with pytest.raises(Fp8Error, match=key) as raised:
            compose(["training.steps=100", wrong])
        assert isinstance(raised.value, ConfigError | RecipeError)


@pytest.mark.parametrize(("percent", "steps", "last"), [("32.3%", 1000, 323), ("64.6%", 500, 323)])
def test_a_percentage_that_gives_a_whole_step_is_that_step(percent, steps, last):
    schedule = read_schedule([{"recipe": "bf16", "to_step": percent}], MXFP8, steps)
    assert schedule.spans[0].last == last


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"name": "mxfp8", "margn": 1}, r"There is no key 'recipe_schedule\[0\]\.recipe\.margn'"),
        ({"name": "mxfp8", "amax_history_len": 4}, r"recipe_schedule\[0\]\.recipe=mxfp8 has no such option"),
        ("mxpf8", r"recipe_schedule\[0\]\.recipe: There is no recipe 'mxpf8'\..* Did you mean 'mxfp8'"),
    ],
)
def test_a_mistake_in_a_spans_recipe_is_named_there(recipe: object, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as raised:
        read_schedule([{"recipe": recipe, "to_step": 2}], MXFP8, 10)
    assert str(raised.value.key).startswith("recipe_schedule[0].recipe")
