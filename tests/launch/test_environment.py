"""The variables of a recipe, and which of several values wins."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.launch.environment import needed, resolve


def _values(recipe: recipes.Recipe, **options: object) -> dict[str, str]:
    arguments = {"capability": (9, 0), "tensor_parallel": 1, "deterministic": False, "processes": 1}
    variables = needed(recipe, **{**arguments, **options})  # type: ignore[arg-type]
    return {variable.name: variable.value for variable in variables}


@pytest.mark.parametrize(
    ("name", "options", "te_class", "attribute", "expected"),
    [
        ("tensorwise", {"use_power_2_scales": True}, "Float8CurrentScaling", "use_power_2_scales", True),
        ("tensorwise", {}, "Float8CurrentScaling", "use_power_2_scales", False),
        ("blockwise", {"use_f32_scales": True}, "Float8BlockScaling", "use_f32_scales", True),
        ("nvfp4", {"disable_rht": True}, "NVFP4BlockScaling", "disable_rht", True),
        (
            "nvfp4",
            {"disable_stochastic_rounding": True},
            "NVFP4BlockScaling",
            "disable_stochastic_rounding",
            True,
        ),
        ("nvfp4", {"disable_2d_quantization": True}, "NVFP4BlockScaling", "disable_2d_quantization", True),
        ("nvfp4", {"disable_rht": True, "nvfp4_4over6": "all"}, "NVFP4BlockScaling", "nvfp4_4over6", "all"),
    ],
)
def test_transformer_engines_own_defaults_become_the_recipes(
    name: str, options: dict[str, object], te_class: str, attribute: str, expected: object
) -> None:
    """The installed Transformer Engine is the oracle: its class, built with no argument in such a process."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    values = _values(recipes.load(name, **options))
    script = (
        "import importlib.util, os\n"
        "spec = importlib.util.find_spec('transformer_engine')\n"
        "path = os.path.join(spec.submodule_search_locations[0], 'common', 'recipe', '__init__.py')\n"
        "spec = importlib.util.spec_from_file_location('te_recipe', path)\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "import sys; sys.modules['te_recipe'] = module\n"
        "spec.loader.exec_module(module)\n"
        f"print(repr(module.{te_class}.{attribute}))\n"
    )
    environment = {"PATH": "/usr/bin:/bin", **values}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == repr(expected)


def test_overlap_of_communication_needs_one_queue_before_blackwell() -> None:
    recipe = recipes.load("tensorwise")
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert _values(recipe, tensor_parallel=2)[name] == "1"
    assert _values(recipe, tensor_parallel=2, capability=None)[name] == "1"
    assert name not in _values(recipe, tensor_parallel=2, capability=(10, 0))
    assert name not in _values(recipe)


def test_deterministic_training_binds_transformer_engine() -> None:
    values = _values(recipes.load("bf16"), deterministic=True)
    assert values["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    assert {"NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG"} <= set(values)


def test_the_recipe_wins_over_the_shell_and_says_so() -> None:
    recipe = recipes.load("blockwise")
    variables = needed(recipe, capability=None, tensor_parallel=1, deterministic=False, processes=1)
    (setting,) = resolve(variables, {}, {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"})
    assert (setting.value, setting.origin, setting.replaced) == ("0", "recipe", "1")
    assert "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0 replaces 1" in str(setting.note())


def test_what_is_only_advisable_leaves_the_shells_value() -> None:
    variables = needed(
        recipes.load("bf16"), capability=None, tensor_parallel=2, deterministic=False, processes=1
    )
    (setting,) = resolve(variables, {}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
    assert (setting.value, setting.origin, setting.note()) == ("8", "environment", None)


def test_launcher_environment_wins_over_all() -> None:
    variables = needed(
        recipes.load("bf16"), capability=None, tensor_parallel=2, deterministic=False, processes=1
    )
    explicit = {"CUDA_DEVICE_MAX_CONNECTIONS": 4, "NCCL_DEBUG": "INFO", "FLAG": True}
    settings = {s.name: s for s in resolve(variables, explicit, {})}
    assert {name: s.value for name, s in settings.items()} == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "4",
        "NCCL_DEBUG": "INFO",
        "FLAG": "1",
    }
    assert {s.origin for s in settings.values()} == {"launcher.environment"}
