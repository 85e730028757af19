"""The hook for Megatron-LM, on a stand-in for its training module that trains Megatron-Core's own GPT."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.callbacks import megatron_lm
from nemo_fp8_recipes.errors import Fp8Error, InjectionError, RecipeError
from nemo_fp8_recipes.recipes.modules import ModuleRecipe
from nemo_fp8_recipes.targets import megatron_lm as target
from tests.injection import gpt

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture(scope="module", autouse=True)
def _megatron(emulated):
    with gpt.process_group():
        yield


class MegatronLm(ModuleType):
    """What of `megatron.training.training` the hook stands around, called as `pretrain` calls it: by name in
    the module.
    """

    def __init__(self, args: SimpleNamespace, *, fail_at: int = 0, exit_at: int = 0) -> None:
        super().__init__(megatron_lm.TRAINING)
        self.args = args

        def setup_model_and_optimizer(model_type: str) -> tuple[list[Any], None, None]:
            fields = {name: getattr(args, name) for name in vars(args) if name in CONFIG_FIELDS}
            return [gpt.build(gpt.config_of(None, **fields))], None, None

        def train_step(forward_step: Any, data: Any, model: list[Any]) -> tuple[dict[str, Any], int]:
            if args.curr_iteration + 1 == fail_at:
                raise ValueError("out of memory")
            return {"lm loss": gpt.train_step(model[0], seed=args.curr_iteration)}, 0

        def train(model: list[Any]) -> int:
            for iteration in range(args.iteration, args.train_iters):
                args.curr_iteration = iteration
                self.train_step(None, None, model)
                if iteration + 1 == exit_at:
                    raise SystemExit(0)
            return args.train_iters

        self.get_args = lambda: args
        self.setup_model_and_optimizer = setup_model_and_optimizer
        self.train_step = train_step
        self.train = train

    def pretrain(self) -> Any:
        model, _, _ = self.setup_model_and_optimizer("gpt")
        self.train(model)
        return model


CONFIG_FIELDS = {
    "fp8",
    "fp8_recipe",
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "fp8_quantizer_factory",
    "fp4",
    "fp4_recipe",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    "quant_recipe",
}


def started(recipe: recipes.Recipe, tmp_path: Path, *, route: str | None = None, **changes: Any) -> Any:
    """Megatron-LM's arguments as its parser makes them of our settings, and the environment."""
    made = target.settings(recipe, route=route)
    fields = {key: value for key, value in recipe.megatron().items() if key in CONFIG_FIELDS}
    if made.route == "factory":
        fields |= {
            "fp8_recipe": "custom",
            "fp8_quantizer_factory": f"{target.FACTORY_MODULE}.{recipe.name}",
        }
    args = {
        **fields,
        "fp8_param_gather": False,
        "fp4_param_gather": False,
        "save": str(tmp_path),
        "tensorboard_dir": None,
        "iteration": 0,
        "curr_iteration": 0,
        "train_iters": 3,
        **changes,
    }
    return SimpleNamespace(**args), dict(made.environment)


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch):
    """Installs the hook on a stand-in as the two lines of a training script do."""
    hooks = []

    def install(training: MegatronLm, environ: dict[str, str], **options: Any) -> Any:
        monkeypatch.setitem(sys.modules, megatron_lm.TRAINING, training)
        monkeypatch.setenv("NEMO_FP8_RECIPE", environ["NEMO_FP8_RECIPE"])
        hook = megatron_lm.install(**{"log_every": 1, "environ": environ, **options})
        hooks.append(hook)
        return hook

    yield install
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("name", "options", "route"),
    [
        ("mxfp8", {}, "injection"),
        # Of these, Megatron-LM has a flag for nothing: injected, and through the quantizer factory.
        ("delayed", {"reduce_amax": False, "amax_history_len": 4}, "injection"),
        ("tensorwise", {"amax_epsilon": 0.125}, "injection"),
        ("blockwise", {"w_block_scaling_dim": 1}, "factory"),
    ],
)
def test_a_job_is_proven_and_logged(name: str, options: dict[str, Any], route: str, tmp_path, hooked) -> None:
    from nemo_fp8_recipes.injection import Manifest, require_quantized
    from nemo_fp8_recipes.report.run import load
    from nemo_fp8_recipes.telemetry import store

    recipe = recipes.load(name, **options)
    args, environ = started(recipe, tmp_path, route=route)
    training = MegatronLm(args)
    hooked(training, environ)
    (model,) = training.pretrain()

    run = load(tmp_path / "fp8")
    assert run.record["status"] == "finished"
    assert run.record["recipe"] == recipe.to_dict()
    assert run.record["device"] == "emulated b200"
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert len(run.losses) == 3
    manifest = Manifest.from_json((tmp_path / "fp8" / "manifest.json").read_text())
    require_quantized(manifest, recipe)
    te_class = "CustomRecipe" if route == "factory" else recipe.te_class
    assert {row.te_recipe for row in manifest.quantized()} <= {te_class, "TEDelayedScaling"}
    # Telemetry of every tensor of every quantised module, in every step.
    table = store.read(tmp_path / "fp8", stat=None).to_pylist()
    linears = {path for path, _ in model.named_modules() if path.endswith(gpt.LINEARS)}
    seen = {(row["step"], row["module"], row["tensor"]) for row in table}
    tensors = ("input", "weight", "grad_output")
    assert seen == {(step, path, tensor) for step in (1, 2, 3) for path in linears for tensor in tensors}


def test_what_telemetry_is_told_is_the_users_to_say(tmp_path, hooked) -> None:
    from nemo_fp8_recipes.telemetry import store

    args, environ = started(recipes.load("delayed", amax_history_len=4), tmp_path, route="injection")
    training = MegatronLm(args)
    heard: list[tuple[int, str]] = []
    loud = {"stat": "amax", "tensor": "weight", "above": 0.0, "message": "-"}
    hooked(
        training,
        environ,
        stats_every=2,
        whatif=["*linear_fc2/input"],
        history=False,
        alerts={"saturation": {"enabled": False}, "custom": {"loud": loud}},
        on_alert=lambda alerts: heard.extend((alert.step, alert.rule) for alert in alerts),
    )
    training.pretrain()
    run = tmp_path / "fp8"
    assert {row["step"] for row in store.read(run, stat="underflow").to_pylist()} == {1, 2}
    assert {row["step"] for row in store.read(run, stat="whatif/mxfp8/sqnr").to_pylist()} == {1, 2}
    assert not len(store.read(run, stat="amax_history"))
    assert (1, "loud") in heard
    assert {alert.rule for alert in store.read_alerts(run)} >= {"loud"}
    assert "saturation" not in {alert.rule for alert in store.read_alerts(run)}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"stats_every": -1}, "telemetry.stats_every"),
        ({"sinks": ["parquett"]}, "telemetry.sinks"),
        ({"alerts": {"underflo": {"limit": 0.1}}}, "alerts.underflo"),
    ],
)
def test_what_telemetry_cannot_be_told_is_refused_before_the_job_starts(
    given: dict[str, Any], named: str, tmp_path, hooked
) -> None:
    args, environ = started(recipes.load("mxfp8"), tmp_path, route="injection")
    with pytest.raises(Fp8Error) as error:
        hooked(MegatronLm(args), environ, **given)
    assert error.value.key == named


def test_outside_logging_steps_the_loss_is_not_read(tmp_path, hooked) -> None:
    class Loss:
        reads = 0

        def __float__(self) -> float:
            Loss.reads += 1
            return 1.0

    args, environ = started(recipes.load("mxfp8"), tmp_path, route="injection", train_iters=5)
    training = MegatronLm(args)
    step = training.train_step
    training.train_step = lambda *given: ({"lm loss": Loss()}, step(*given)[1])
    hooked(training, environ, log_every=4)
    training.pretrain()
    assert Loss.reads == 2  # steps 1 and 4


def test_without_the_loss_of_the_last_stage_the_rest_is_logged(tmp_path, hooked) -> None:
    args, environ = started(recipes.load("mxfp8"), tmp_path, route="injection")
    training = MegatronLm(args)
    step = training.train_step
    training.train_step = lambda *given: ({}, step(*given)[1])
    hooked(training, environ)
    training.pretrain()
    assert json.loads((tmp_path / "fp8" / "run.json").read_text())["status"] == "finished"


def test_a_resumed_job_goes_on_in_its_directory(tmp_path, hooked) -> None:
    from nemo_fp8_recipes.telemetry import store

    recipe = recipes.load("mxfp8")
    args, environ = started(recipe, tmp_path, route="injection")
    training = MegatronLm(args, exit_at=3)
    first = hooked(training, environ)
    with pytest.raises(SystemExit):
        training.pretrain()
    record = json.loads((tmp_path / "fp8" / "run.json").read_text())
    assert (record["status"], record["error"]) == ("interrupted", "Megatron-LM exited after step 3")
    first.remove()
    # The checkpoint was of step 2: what was logged of step 3 is logged again, once.
    args, environ = started(recipe, tmp_path, route="injection", iteration=2, train_iters=4)
    training = MegatronLm(args)
    hooked(training, environ)
    training.pretrain()
    record = json.loads((tmp_path / "fp8" / "run.json").read_text())
    assert record["status"] == "finished"
    assert [resume["step"] for resume in record["resumes"]] == [2]
    rows = store.read(tmp_path / "fp8", stat=None).to_pylist()
    one = [
        row["step"]
        for row in rows
        if row["module"].endswith("0.mlp.linear_fc1") and row["tensor"] == "input" and row["stat"] == "blocks"
    ]
    assert one == [1, 2, 3, 4]
    lines = (tmp_path / "fp8" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_step_that_fails_is_the_runs_error_and_injection_ends(tmp_path, hooked) -> None:
    from megatron.core import fp8_utils

    before = fp8_utils.get_fp8_recipe
    args, environ = started(recipes.load("mxfp8"), tmp_path, route="injection")
    training = MegatronLm(args, fail_at=2)
    hooked(training, environ)
    with pytest.raises(ValueError, match="out of memory"):
        training.pretrain()
    record = json.loads((tmp_path / "fp8" / "run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", "ValueError: out of memory")
    assert fp8_utils.get_fp8_recipe is before


def test_single_modules_may_have_a_recipe_of_their_own(tmp_path, hooked) -> None:
    from megatron.core.quantization.quant_config import RecipeConfig

    recipe = recipes.load("tensorwise")
    modules = [ModuleRecipe("*linear_fc2", "mxfp8"), ModuleRecipe("*layers.0.*", "bf16")]
    overrides = RecipeConfig.from_config_dict(target.precision_config(recipe, modules))
    args, environ = started(recipe, tmp_path, quant_recipe=overrides)
    training = MegatronLm(args)
    hooked(training, environ)
    training.pretrain()
    rows = json.loads((tmp_path / "fp8" / "manifest.json").read_text())["rows"]
    by_module = {row["module"]: row["recipe"] for row in rows}
    assert by_module["decoder.layers.1.mlp.linear_fc2"] == "mxfp8"
    assert by_module["decoder.layers.1.mlp.linear_fc1"] == "tensorwise"
    assert by_module["decoder.layers.0.mlp.linear_fc1"] == "bf16"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fp8_recipe": "delayed"}, "fp8_recipe=delayed"),
        ({"fp8": None}, "fp8=null"),
        ({"fp8_param_gather": True}, "with --fp8-param-gather"),
        ({"fp8_recipe": "custom", "fp8_quantizer_factory": "mine.factory"}, "mine.factory"),
        ({"first_last_layers_bf16": True}, "first_last_layers_bf16=True"),
        ({"save": None}, "neither --save nor --tensorboard-dir"),
    ],
)
def test_arguments_that_disagree_are_refused_before_the_model_is_built(
    changes: dict[str, Any], words: str, tmp_path, hooked
) -> None:
    args, environ = started(recipes.load("mxfp8"), tmp_path, **changes)
    training = MegatronLm(args)
    training.setup_model_and_optimizer = lambda *_: pytest.fail("the model was built")
    hooked(training, environ)
    with pytest.raises(InjectionError, match=words):
        training.pretrain()
    assert not (tmp_path / "fp8").exists()


def test_installing_says_what_is_missing(tmp_path, hooked, monkeypatch: pytest.MonkeyPatch) -> None:
    args, environ = started(recipes.load("mxfp8"), tmp_path)
    training = MegatronLm(args)
    with pytest.raises(RecipeError, match="NEMO_FP8_RECIPE is not set"):
        megatron_lm.install(environ={})
    hooked(training, environ)
    with pytest.raises(InjectionError, match="installed already"):
        megatron_lm.install(environ=environ)
    monkeypatch.setitem(sys.modules, megatron_lm.TRAINING, ModuleType("megatron.training.training"))
    with pytest.raises(InjectionError, match="no Megatron-LM that the hook knows"):
        megatron_lm.install(environ=environ)
    monkeypatch.delitem(sys.modules, megatron_lm.TRAINING)
    with pytest.raises(Fp8Error, match="checkout"):
        megatron_lm.install(environ=environ)
