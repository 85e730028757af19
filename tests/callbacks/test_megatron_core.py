"""`Fp8Run`: the recipe in a training loop, proven after the first step, with telemetry told of each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.callbacks.megatron_core import Fp8Run
from nemo_fp8_recipes.errors import InjectionError
from tests.injection import gpt
from tests.support.processes import run_ranks

pytestmark = pytest.mark.usefixtures("emulated")

MXFP8 = recipes.load("mxfp8")


@pytest.fixture(scope="module", autouse=True)
def _megatron(emulated):
    with gpt.process_group():
        yield


class Recorder:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []
        self.quantising: list[bool] = []

    def begin_step(self, step):
        self.told.append(("begin", step))

    def end_step(self, step, metrics):
        self.told.append(("end", step, dict(metrics)))
        self.quantising.append(self.quantises)

    def close(self):
        self.told.append(("close",))


def step(run, model, number):
    run.begin_step(number)
    gpt.train_step(model, seed=number)
    run.end_step(number, {"loss": 1.0})


@pytest.mark.parametrize("name", ["bf16", "delayed", "tensorwise", "mxfp8", "blockwise", "nvfp4"])
def test_a_run_proves_its_recipe_after_the_first_step(name):
    recipe = recipes.load(name)
    config = gpt.config_of(recipe)
    with Fp8Run(recipe) as run:
        run.check(config)
        model = gpt.build(config)
        run.model_built(model)
        assert run.manifest is None
        step(run, model, 1)
        assert run.manifest.asked == name
        assert len(run.manifest.quantized()) == (0 if name == "bf16" else 2 * len(gpt.LINEARS))
    assert run.manifest is not None


def test_telemetry_is_attached_to_the_model_and_told_every_step():
    recorder = Recorder()
    attached = []

    def attach(model):
        attached.append(model)
        return recorder

    config = gpt.config_of(MXFP8)
    with Fp8Run(MXFP8, telemetry=attach) as run:
        model = gpt.build(config)
        run.model_built(model)
        step(run, model, 1)
        step(run, model, 2)
        assert run.recorder is recorder
    assert attached == [model]
    assert recorder.told == [
        ("begin", 1),
        ("end", 1, {"loss": 1.0}),
        ("begin", 2),
        ("end", 2, {"loss": 1.0}),
        ("close",),
    ]


def test_telemetry_is_told_whether_the_recipe_of_a_step_quantises():
    recorder = Recorder()
    for recipe in (MXFP8, recipes.load("bf16")):
        with Fp8Run(recipe, telemetry=lambda model: recorder) as run:
            model = gpt.build(gpt.config_of(recipe))
            run.model_built(model)
            step(run, model, 1)
    assert recorder.quantising == [True, False]


def test_an_error_closes_telemetry_and_restores_megatron():
    from megatron.core import fp8_utils

    before = fp8_utils.get_fp8_recipe
    recorder = Recorder()
    model = gpt.build(gpt.config_of(MXFP8))

    def failing_job():
        with Fp8Run(MXFP8, telemetry=lambda model: recorder) as run:
            run.model_built(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_job()
    assert recorder.told == [("close",)]
    assert fp8_utils.get_fp8_recipe is before


def test_a_model_that_trains_in_high_precision_ends_the_run_after_one_step():
    with Fp8Run(MXFP8) as run:
        model = gpt.build(gpt.config_of(None))
        run.model_built(model)
        with pytest.raises(InjectionError, match="no module is quantised"):
            step(run, model, 1)


def test_frozen_delayed_scaling_ends_the_run():
    delayed = recipes.load("delayed", amax_history_len=4)
    model = gpt.build(gpt.config_of(delayed))
    for recipe in (delayed, MXFP8):
        for field, value in recipe.megatron().items():
            setattr(model.config, field, value)
        with Fp8Run(recipe) as run:
            run.model_built(model)
            step(run, model, 1)
    for field, value in delayed.megatron().items():
        setattr(model.config, field, value)
    with Fp8Run(delayed) as run:
        run.model_built(model)
        with pytest.raises(InjectionError, match="reset_quantization_state"):
            step(run, model, 1)


def test_a_model_in_which_the_recipe_cannot_run_is_refused_before_the_first_step():
    model = gpt.build(gpt.config_of(recipes.load("tensorwise")))
    with Fp8Run(recipes.load("delayed")) as run, pytest.raises(InjectionError, match="save_original_input"):
        run.model_built(model)


def test_a_config_of_another_recipe_is_refused():
    with Fp8Run(MXFP8) as run, pytest.raises(InjectionError, match="fp8_recipe=blockwise"):
        run.check(gpt.config_of(recipes.load("blockwise")))


@pytest.mark.parametrize(
    ("name", "optimizer", "ddp", "key"),
    [
        ("mxfp8", SimpleNamespace(fp8_recipe="delayed"), None, "optimizer.fp8_recipe"),
        ("mxfp8", None, SimpleNamespace(fp8_param_gather=True), "ddp.fp8_param_gather"),
        ("bf16", SimpleNamespace(fp8_recipe="mxfp8"), None, "optimizer.fp8_recipe"),
    ],
)
def test_copies_of_the_fp8_settings_must_agree(name, optimizer, ddp, key):
    recipe = recipes.load(name)
    with Fp8Run(recipe) as run:
        with pytest.raises(InjectionError) as raised:
            run.check(gpt.config_of(recipe), optimizer_config=optimizer, ddp_config=ddp)
        assert raised.value.key == key
        run.check(
            gpt.config_of(recipe),
            optimizer_config=SimpleNamespace(fp8_recipe=None),
            ddp_config=SimpleNamespace(fp8_param_gather=False),
        )


def test_primary_weights_need_the_optimizers_copy():
    recipe = recipes.load("mxfp8", fp8_param=True)
    with Fp8Run(recipe) as run, pytest.raises(InjectionError, match="OptimizerConfig"):
        run.check(gpt.config_of(recipe), optimizer_config=SimpleNamespace(fp8_recipe=None))


def test_it_says_how_it_is_used():
    run = Fp8Run(MXFP8)
    with pytest.raises(InjectionError, match="context manager"):
        run.begin_step(1)
    with run, pytest.raises(InjectionError, match="model_built"):
        run.end_step(1, {})


def test_ranks_share_one_manifest_and_stop_together(tmp_path):
    """Tensor parallel over two ranks: rank 0 has the whole job's manifest; a fault on rank 1 stops both."""
    by_rank = run_ranks(
        """
        import dataclasses
        import torch.distributed as dist
        from megatron.core import parallel_state
        from nemo_fp8_recipes import recipes
        from nemo_fp8_recipes.callbacks import megatron_core
        from nemo_fp8_recipes.errors import InjectionError
        from tests.injection import gpt

        dist.init_process_group("gloo")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        recipe = recipes.load("mxfp8")
        config = gpt.config_of(recipe, layers=1, tensor_model_parallel_size=2)

        def run(read):
            megatron_core.manifest = read
            with megatron_core.Fp8Run(recipe) as run:
                model = gpt.build(config)
                run.model_built(model)
                run.begin_step(1)
                gpt.train_step(model)
                try:
                    run.end_step(1, {})
                except InjectionError as error:
                    return str(error)
                return len(run.manifest.quantized())

        right = megatron_core.manifest

        def wrong(model, asked):
            found = right(model, asked)
            if dist.get_rank() == 0:
                return found
            rows = [
                dataclasses.replace(row, input=dataclasses.replace(row.input, format="e5m2"))
                if row.module.endswith("fc1")
                else row
                for row in found.rows
            ]
            return dataclasses.replace(found, rows=tuple(rows))

        result([run(right), run(wrong)])
        """,
        ranks=2,
        device="b200",
        tmp_path=tmp_path,
    )
    assert [rank[0] for rank in by_rank] == [len(gpt.LINEARS)] * 2
    for rank in by_rank:
        assert "Ranks 0 and 1 disagree about decoder.layers.0.mlp.linear_fc1" in rank[1]
