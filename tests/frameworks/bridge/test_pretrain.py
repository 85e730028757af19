"""Every recipe through Bridge's own `pretrain()`: what it must have done, seen from outside."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nemo_fp8_recipes.telemetry import store

if TYPE_CHECKING:
    from nemo_fp8_recipes.callbacks.bridge import Fp8Callback
    from tests.frameworks.bridge.jobs import Seen

TE_CLASS = {
    "delayed": "TEDelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "mxfp8": "MXFP8BlockScaling",
    "blockwise": "Float8BlockScaling",
}
FORMATS = {
    # (a, b) of forward, dgrad and wgrad; a is the weight, in wgrad the input, b the input or the gradient
    "hybrid": {"TN": ("e4m3", "e4m3"), "NN": ("e4m3", "e5m2"), "NT": ("e4m3", "e5m2")},
    "e4m3": {"TN": ("e4m3", "e4m3"), "NN": ("e4m3", "e4m3"), "NT": ("e4m3", "e4m3")},
}
FORMAT = {"delayed": "hybrid", "tensorwise": "hybrid", "mxfp8": "e4m3", "blockwise": "e4m3"}


@dataclass
class Run:
    seen: Seen
    callback: Fp8Callback
    directory: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Six steps with each recipe, by its registered name alone."""
    from nemo_fp8_recipes.callbacks.bridge import Fp8Callback
    from tests.frameworks.bridge.jobs import job, run

    done = {}
    for name in ("bf16", *TE_CLASS):
        directory = tmp_path_factory.mktemp(name)
        callback = Fp8Callback(directory, log_every=2)
        done[name] = Run(run(job(f"nemo_fp8_{name}"), callback), callback, directory)
    return done


@pytest.mark.parametrize("name", TE_CLASS)
def test_every_gemm_of_the_layers_is_fp8_in_the_formats_of_the_recipe(
    runs: dict[str, Run], name: str
) -> None:
    from tests.frameworks.bridge.jobs import MODULES, STEPS

    gemms = runs[name].seen.gemms
    assert len(gemms) == STEPS
    for step in gemms:
        quantised = [gemm for gemm in step if gemm.quantized]
        assert Counter(gemm.layout for gemm in quantised) == dict.fromkeys(("TN", "NN", "NT"), len(MODULES))
        assert {(g.layout, g.a.format, g.b.format) for g in quantised} == {
            (layout, *formats) for layout, formats in FORMATS[FORMAT[name]].items()
        }
    assert not any(gemm.quantized for step in runs["bf16"].seen.gemms for gemm in step)


@pytest.mark.parametrize("name", TE_CLASS)
def test_megatrons_fp8_context_holds_the_recipes_object(runs: dict[str, Run], name: str) -> None:
    from tests.frameworks.bridge.jobs import MODULES

    held = runs[name].seen.recipes
    assert set(held) == set(MODULES)
    for recipe in held.values():
        assert type(recipe).__name__ == TE_CLASS[name]
        assert recipe.fp8_format.name == FORMAT[name].upper()
        if name == "delayed":
            assert (recipe.amax_history_len, recipe.amax_compute_algo, recipe.margin) == (1024, "max", 0)
    assert set(runs["bf16"].seen.recipes.values()) == {None}


@pytest.mark.parametrize("name", TE_CLASS)
def test_losses_differ_from_bf16_and_stay_within_two_percent(runs: dict[str, Run], name: str) -> None:
    losses, baseline = runs[name].seen.losses, runs["bf16"].seen.losses
    assert losses != baseline
    assert losses == pytest.approx(baseline, rel=0.02)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", TE_CLASS)
def test_telemetry_and_manifest_have_every_quantised_module(runs: dict[str, Run], name: str) -> None:
    from tests.frameworks.bridge.jobs import MODULES

    run = runs[name]
    assert run.callback.manifest is not None
    assert {row.module for row in run.callback.manifest.quantized()} == set(MODULES)
    table = store.read(run.directory).to_pylist()
    assert {row["step"] for row in table} == {1, 2, 4, 6}
    operands = {(row["module"], row["tensor"]) for row in table}
    assert operands == {
        (module, tensor) for module in MODULES for tensor in ("input", "weight", "grad_output")
    }


def test_default_recipes_come_in_by_the_config_and_the_manifest_says_so(runs: dict[str, Run]) -> None:
    import json

    for name, run in runs.items():
        assert run.callback.way == "config", name
        manifest = json.loads((run.directory / "manifest.json").read_text())
        assert manifest["way_in"] == "config"
        assert manifest["asked"] == name


@pytest.mark.parametrize(
    ("recipe", "options", "seen"),
    [
        ("tensorwise", {"use_power_2_scales": True}, lambda te: te.fp8_quant_fwd_inp.power_2_scale),
        ("delayed", {"reduce_amax": False, "amax_history_len": 4}, lambda te: not te.reduce_amax),
    ],
)
def test_options_that_megatron_has_no_field_for_are_injected(
    tmp_path: Path, recipe: str, options: dict[str, Any], seen: Any
) -> None:
    from nemo_fp8_recipes.callbacks.bridge import Fp8Callback, mixed_precision
    from tests.frameworks.bridge.jobs import job, run

    callback = Fp8Callback(tmp_path, recipe=mixed_precision(recipe, **options).load_recipe())
    onlooker = run(job(mixed_precision(recipe, **options), steps=2), callback)
    assert callback.way == "get_fp8_recipe"
    assert all(seen(held) for held in onlooker.recipes.values())


def test_first_and_last_layer_stay_in_bf16(tmp_path: Path) -> None:
    from nemo_fp8_recipes.callbacks.bridge import Fp8Callback, mixed_precision
    from tests.frameworks.bridge.jobs import LINEARS, job, run

    ends = {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
    callback = Fp8Callback(tmp_path)
    seen = run(job(mixed_precision("tensorwise", **ends), steps=1), callback)
    assert callback.manifest is not None
    assert {row.module for row in callback.manifest.quantized()} == {
        f"decoder.layers.{layer}.{name}" for layer in (1, 2) for name in LINEARS
    }
    assert sum(gemm.quantized for gemm in seen.gemms[0]) == 2 * len(LINEARS) * 3


def test_the_recipe_is_out_of_megatron_when_pretrain_has_returned(runs: dict[str, Run]) -> None:
    from megatron.core import fp8_utils

    from nemo_fp8_recipes.callbacks.bridge import active

    assert active.current() is None
    assert "injected" not in (fp8_utils.get_fp8_recipe.__doc__ or "")
