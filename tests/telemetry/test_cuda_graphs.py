"""Layers that run as CUDA graphs are marked in manifest and store, and nothing of ours runs in a capture.

Without a GPU a capture can only be posed: what torch, Transformer Engine and Megatron say while they capture
is said for them, and a replay is a forward pass of which no function of Transformer Engine can be watched.
The layers, their configuration and the training step are Megatron's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.telemetry import store
from tests.support.processes import run_emulated

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
RECIPES = ("tensorwise", "delayed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Layer 0 replays a graph of its attention from step 2 on, layer 1 none; step 1 warms a capture up."""
    path = tmp_path_factory.mktemp("graphs")
    return path, run_emulated(
        f"""
        import contextlib, json, torch
        import megatron.core.transformer.cuda_graphs as megatron_graphs
        import transformer_engine.pytorch as te
        import transformer_engine.pytorch.graph as te_graphs
        from megatron.core.fp8_utils import get_fp8_context
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager
        import nemo_fp8_recipes
        from nemo_fp8_recipes import telemetry
        from tests.support.gpt import Trainer
        from tests.telemetry.launches import Launches

        def capturing():
            return True

        @contextlib.contextmanager
        def captured(owner, name):
            original = getattr(owner, name)
            setattr(owner, name, capturing)
            try:
                yield
            finally:
                setattr(owner, name, original)

        found = {{}}
        for recipe in {RECIPES!r}:
            trainer = Trainer(recipe=recipe, model_options={{
                "cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["attn"],
            }})
            first = trainer.gpt.decoder.layers[0]
            recorder = telemetry.attach(
                trainer.model, nemo_fp8_recipes.load(recipe), directory={str(path)!r} + "/" + recipe,
                log_every=1, stats_every=1, sinks=["parquet"],
            )

            class Replay(torch.autograd.Function):
                @staticmethod
                def forward(ctx, hidden_states, others):
                    # As Transformer Engine's replay: the gradients' scales are updated outside the graph.
                    ctx.is_first = FP8GlobalStateManager.is_first_fp8_module()
                    with torch.enable_grad(), captured(torch.cuda, "is_current_stream_capturing"):
                        ctx.input = hidden_states.detach().requires_grad_()
                        ctx.output, _ = first._forward_attention(hidden_states=ctx.input, **others)
                    return ctx.output.detach()

                @staticmethod
                def backward(ctx, gradient):
                    with captured(torch.cuda, "is_current_stream_capturing"):
                        ctx.output.backward(gradient)
                    if ctx.is_first:
                        FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
                    return ctx.input.grad, None

            def replay(hidden_states, is_first_microbatch, **others):
                return (Replay.apply(hidden_states, others),)  # Megatron runs what is outside the scope

            for step in (1, 2, 3):
                recorder.begin_step(step)
                if step == 1:
                    # Warm-up passes on made-up data, as each of the two does before it captures.
                    for owner, name in (
                        (te_graphs, "is_graph_capturing"), (megatron_graphs, "is_graph_warmup"),
                    ):
                        with captured(owner, name):
                            with get_fp8_context(trainer.config, 0):
                                first.mlp(1000 * torch.ones(32, 4, 128, dtype=torch.bfloat16))
                if step == 2:
                    first.cuda_graphs.append(replay)
                trainer.step()
                recorder.end_step(step)
            recorder.close()
            manifest = nemo_fp8_recipes.manifest(trainer.model)
            found[recipe] = {{row.module: row.cuda_graph for row in manifest.rows}}

        recorder = telemetry.attach(
            trainer.model, nemo_fp8_recipes.load(recipe), directory={str(path)!r} + "/whole", log_every=1,
            stats_every=1, sinks=["parquet"],
        )
        recorder.begin_step(1)
        trainer.step()
        recorder.end_step(1)
        with captured(torch.cuda, "is_current_stream_capturing"), Launches() as launches:
            recorder.begin_step(2)
            recorder.end_step(2)
        found["launched"] = launches.names
        recorder.close()

        # make_graphed_callables puts a function of its own module in the place of `forward`.
        model = torch.nn.Sequential(te.Linear(16, 16), te.Linear(16, 16))
        def new_fwd(x):
            return x
        new_fwd.__module__ = te_graphs.make_graphed_callables.__module__
        model[0].forward = new_fwd
        found["callable"] = [row.cuda_graph for row in nemo_fp8_recipes.manifest(model).rows]
        result(found)
        """
    )


def test_the_manifest_says_who_captures_a_module(run: tuple[Path, Any]) -> None:
    for recipe in RECIPES:
        for module, by in run[1][recipe].items():
            expected = "transformer_engine" if ".self_attention." in module else None
            assert by == expected, module
    assert run[1]["callable"] == ["graphed_callable", None]


def marks(run_dir: Path, stat: str) -> set[tuple[int, str, str]]:
    rows = store.read(run_dir, stat=stat).to_pylist()
    assert {row["value"] for row in rows} <= {1.0}
    return {(row["step"], row["module"], row["tensor"]) for row in rows}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_store_marks_what_was_replayed(run: tuple[Path, Any], recipe: str) -> None:
    replayed = {
        (step, f"decoder.layers.0.{linear}", tensor)
        for step in (2, 3)
        for linear in LINEARS[:2]
        for tensor in ("input", "weight", "grad_output")
    }
    found = marks(run[0] / recipe, "graphed")
    assert found == replayed
    # Delayed scaling's state is updated outside the graph; a weight kept for the micro-batches is there.
    unobserved = set() if recipe == "delayed" else {key for key in replayed if key[2] != "weight"}
    assert marks(run[0] / recipe, "unobserved") == unobserved


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_runs_beside_the_graph_is_logged_as_ever(run: tuple[Path, Any], recipe: str) -> None:
    every = {
        (step, f"decoder.layers.{layer}.{linear}", tensor)
        for step in (1, 2, 3)
        for layer in (0, 1)
        for linear in LINEARS
        for tensor in ("input", "weight", "grad_output")
    }
    assert set(marks_of_amax(run[0] / recipe)) == every - marks(run[0] / recipe, "unobserved")


def marks_of_amax(run_dir: Path) -> dict[tuple[int, str, str], float]:
    rows = store.read(run_dir, stat="amax").to_pylist()
    return {(row["step"], row["module"], row["tensor"]): row["value"] for row in rows}


def test_the_warm_up_of_a_capture_is_no_training_step(run: tuple[Path, Any]) -> None:
    # Its made-up input of thousands would be the step's amax.
    assert 0 < marks_of_amax(run[0] / "tensorwise")[1, "decoder.layers.0.mlp.linear_fc2", "input"] < 1000


def test_a_step_inside_a_capture_launches_nothing(run: tuple[Path, Any]) -> None:
    assert run[1]["launched"] == []
    assert store.steps(run[0] / "whole") == (1, 1)
