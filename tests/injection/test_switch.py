"""Another recipe between two steps, and what ties a model to the one it was built with."""

from __future__ import annotations

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.callbacks.megatron_core import Fp8Run
from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection import check_switchable, frozen_delayed_modules
from nemo_fp8_recipes.recipes.schedule import Schedule, Span

from . import gpt

pytestmark = pytest.mark.usefixtures("megatron")

MXFP8 = recipes.load("mxfp8")
BF16 = recipes.load("bf16")
DELAYED = recipes.load("delayed", amax_history_len=4)


def train(run, model, steps):
    """The recipes found in the model after each step, which Transformer Engine's own state tells."""
    found = []
    for number in steps:
        run.begin_step(number)
        gpt.train_step(model, seed=number)
        run.end_step(number, {})
        rows = [row for row in run.manifest.rows if row.module.endswith(gpt.LINEARS)]
        assert rows
        (name,) = {row.recipe for row in rows}
        quantised = {bool(model.decoder.layers[0].mlp.linear_fc1.fp8)}
        assert quantised == {name != "bf16"}
        found.append((name, run.proven_at))
    return found


def test_every_step_trains_with_the_recipe_of_the_schedule():
    schedule = Schedule(
        DELAYED,
        (
            Span(BF16, 1, 2),
            Span(MXFP8, 5, 5),
            Span(recipes.load("blockwise"), 6, 6),
            Span(recipes.load("blockwise", w_block_scaling_dim=1), 7, 7),
        ),
    )
    config = gpt.config_of(DELAYED)
    with Fp8Run(DELAYED, schedule=schedule) as run:
        run.check(config)
        model = gpt.build(config)
        run.model_built(model)
        found = train(run, model, range(1, 11))
        assert run.manifest.asked == "delayed"
        # Back in delayed scaling its histories are updated: three steps fill three of four entries.
        assert frozen_delayed_modules(model) == ()
        history = model.decoder.layers[0].mlp.linear_fc1.fp8_meta["scaling_fwd"].amax_history
        assert (history[-3:, 0] > 0).all()
        assert history[0, 0] == 0
    assert found == [
        *[("bf16", 1)] * 2,
        *[("delayed", 3)] * 2,
        ("mxfp8", 5),
        ("blockwise", 6),
        ("blockwise", 7),  # the same class with other options is a change too
        *[("delayed", 8)] * 3,
    ]


def test_a_switch_by_hand_holds_until_the_schedule_changes():
    schedule = Schedule(MXFP8, (Span(BF16, 4, 5),))
    config = gpt.config_of(MXFP8)
    with Fp8Run(MXFP8, schedule=schedule) as run:
        model = gpt.build(config)
        with pytest.raises(InjectionError, match="before the recipe can change"):
            run.switch(BF16)
        run.model_built(model)
        assert train(run, model, [1]) == [("mxfp8", 1)]
        run.switch(recipes.load("tensorwise"))
        assert train(run, model, [2, 3, 4, 5, 6]) == [
            ("tensorwise", 2),
            ("tensorwise", 2),
            ("bf16", 4),
            ("bf16", 4),
            ("mxfp8", 6),
        ]


def test_a_switch_by_hand_to_what_the_model_was_not_built_for_is_refused():
    config = gpt.config_of(MXFP8)
    with Fp8Run(MXFP8) as run:
        model = gpt.build(config)
        run.model_built(model)
        assert train(run, model, [1]) == [("mxfp8", 1)]
        with pytest.raises(InjectionError, match="built for mxfp8"):
            run.switch(DELAYED)
        model.config.cuda_graph_impl = "local"
        with pytest.raises(InjectionError, match="cuda_graph_impl=local keeps the recipe"):
            run.switch(BF16)
        model.config.cuda_graph_impl = "none"
        assert train(run, model, [2]) == [("mxfp8", 1)]


def test_a_resumed_run_keeps_the_scaling_state_of_the_saved_step():
    short = recipes.load("delayed", amax_history_len=2)
    schedule = Schedule(DELAYED, (Span(short, 3, 6),))
    config = gpt.config_of(DELAYED)
    with Fp8Run(DELAYED, schedule=schedule) as run:
        model = gpt.build(config)
        run.model_built(model)
        train(run, model, [1, 2, 3, 4])
    state = model.decoder.layers[0].mlp.linear_fc1.fp8_meta["scaling_fwd"]
    assert (state.scale[:2] != 1.0).all()
    with Fp8Run(DELAYED, schedule=schedule) as run:
        run.model_built(model, steps_done=4)
        assert run.recipe == short
        assert train(run, model, [5, 6]) == [("delayed", 5)] * 2
        assert model.decoder.layers[0].mlp.linear_fc1.fp8_meta["scaling_fwd"] is state
        assert train(run, model, [7]) == [("delayed", 7)]
        assert model.decoder.layers[0].mlp.linear_fc1.fp8_meta["scaling_fwd"] is not state


def test_a_schedule_of_another_recipe_is_refused():
    with pytest.raises(InjectionError, match="schedule is one of 'mxfp8' and the run's recipe 'delayed'"):
        Fp8Run(DELAYED, schedule=Schedule(MXFP8, (Span(BF16, 1, 1),)))


@pytest.mark.parametrize(
    ("field", "value"), [("cuda_graph_impl", "local"), ("enable_cuda_graph", True), ("tp_comm_overlap", True)]
)
def test_what_ties_a_model_to_its_first_recipe_is_refused_before_it_is_built(field, value):
    config = gpt.config_of(MXFP8)
    check_switchable(config, [MXFP8, BF16, DELAYED])
    setattr(config, field, value)
    with pytest.raises(InjectionError, match=rf"{field}={value} keeps the recipe"):
        check_switchable(config, [MXFP8, BF16])


def test_a_config_that_one_of_the_recipes_cannot_run_with_is_refused():
    config = gpt.config_of(MXFP8)
    config.recompute_granularity = "selective"
    config.recompute_modules = ["layernorm"]
    check_switchable(config, [MXFP8, BF16])
    with pytest.raises(InjectionError, match="Delayed scaling cannot run with recompute_modules"):
        check_switchable(config, [MXFP8, DELAYED])
    assert config.fp8_recipe == "mxfp8"
