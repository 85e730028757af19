"""Which modules run as CUDA graphs, told from models that Megatron built with each of its settings."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.processes import run_emulated

ATTENTION = {"self_attention.linear_qkv", "self_attention.linear_proj"}
MLP = {"mlp.linear_fc1", "mlp.linear_fc2"}
SETTINGS: dict[str, dict[str, Any]] = {
    "eager": {},
    "local": {"cuda_graph_impl": "local"},
    "transformer_engine": {"cuda_graph_impl": "transformer_engine"},
    "transformer_engine, MLP": {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["mlp"]},
    "full_iteration": {"cuda_graph_impl": "local", "cuda_graph_scope": ["full_iteration"]},
}
CAPTURED: dict[str, tuple[str | None, set[str]]] = {
    "eager": (None, set()),
    "local": ("local", ATTENTION | MLP),
    "transformer_engine": ("transformer_engine", ATTENTION | MLP),
    "transformer_engine, MLP": ("transformer_engine", MLP),
    "full_iteration": ("full_iteration", ATTENTION | MLP | {"output_layer"}),
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, str | None]]:
    return run_emulated(
        f"""
        import torch
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        import nemo_fp8_recipes
        from tests.support.gpt import Trainer

        # What takes a GPU: memory for graphs, and a tracker of random states that a graph can replay.
        torch.cuda.graph_pool_handle = lambda: (0, 0)
        CudaRNGStatesTracker.is_inference_rng_tracker = property(lambda self: True, lambda self, value: None)
        found = {{}}
        for name, options in {SETTINGS!r}.items():
            trainer = Trainer(recipe="mxfp8", model_options=options)
            rows = nemo_fp8_recipes.manifest(trainer.model).rows
            found[name] = {{row.module: row.cuda_graph for row in rows}}
        result(found)
        """,
        device="b200",
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_megatrons_setting_is_read_from_the_model_it_built(
    found: dict[str, dict[str, str | None]], setting: str
) -> None:
    by, expected = CAPTURED[setting]
    marked = {module: mark for module, mark in found[setting].items() if mark is not None}
    names = {module.removeprefix("decoder.layers.").partition(".")[2] or module for module in marked}
    assert {name for name in names if "linear" in name or name == "output_layer"} == expected
    assert set(marked.values()) <= {by}
