"""Telemetry on Transformer Engine's own modules, against what plain torch hooks saw go in.

The program makes every step's tensors a different size, so that a value of an earlier step, of one
micro-batch only, or of an evaluation pass cannot pass for the right one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.series import FP8_MAX
from tests.telemetry.oracle import error_statistics, quantised

ROOT = Path(__file__).parents[2]
DEVICES = {"delayed": "h100", "tensorwise": "h100", "blockwise": "h100", "mxfp8": "b200", "nvfp4": "b200"}
STEPS = 5
LOGGED = [1, 2, 4]
RECORDED = "whatif/delayed/amax_by_rank"
MODULES = ("first.0", "first.1", "second.0", "second.1")
TENSORS = ("input", "weight", "grad_output")
OPERANDS = [(module, tensor) for module in MODULES for tensor in TENSORS]

# Transformer Engine normalises in its own kernel: its result may round to the neighbouring bf16.
NORM_TOLERANCE = 2.0**-7


class Run(NamedTuple):
    """What telemetry logged, and what went into the GEMMs.

    Attributes:
        logged: (step, module, tensor, stat) -> number or window.
        formats: (module, tensor) -> element format.
        taken: (step, module, tensor) -> high-precision tensors (rows, columns), one a forward pass.
        facts: what the program counted.
    """

    logged: dict[tuple[int, str, str, str], Any]
    formats: dict[tuple[str, str], str]
    taken: dict[tuple[int, str, str], list[torch.Tensor]]
    facts: dict[str, Any]

    def amax(self, step: int, module: str, tensor: str) -> float:
        return max(float(x.float().abs().max()) for x in self.taken[step, module, tensor])


@pytest.fixture(scope="module", params=DEVICES)
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp(recipe)
    program = [sys.executable, "-m", "tests.telemetry.te_program", DEVICES[recipe], recipe, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    facts = torch.load(out / "taken.pt", weights_only=True)
    rows = store.read(out / "run").to_pylist()
    logged = {
        (row["step"], row["module"], row["tensor"], row["stat"]): row["value"]
        if row["values"] is None
        else row["values"]
        for row in rows
    }
    assert len(logged) == len(rows)
    own = [row for row in rows if not row["stat"].startswith("whatif/")]
    assert {row["recipe"] for row in own} == {recipe}
    formats = {(row["module"], row["tensor"]): row["format"] for row in own}
    return Run(logged, formats, facts.pop("taken"), facts)


def tolerance(module: str, tensor: str) -> float:
    return NORM_TOLERANCE if module.startswith("first") and tensor == "input" else 2.0**-21


def test_every_operand_of_every_linear_is_logged_in_every_logging_step(run: Run) -> None:
    assert {key[:3] for key in run.logged} == {(step, *operand) for step in LOGGED for operand in OPERANDS}


def test_formats_are_those_of_the_recipe(run: Run, recipe: str) -> None:
    forward = "e2m1" if recipe == "nvfp4" else "e4m3"
    gradients = "e5m2" if recipe in ("delayed", "tensorwise") else forward
    for (_, tensor), fmt in run.formats.items():
        assert fmt == (gradients if tensor == "grad_output" else forward)


def test_the_amax_is_that_of_this_step(run: Run, recipe: str) -> None:
    for step in LOGGED:
        for module, tensor in OPERANDS:
            wanted = run.amax(step, module, tensor)
            if recipe in ("delayed", "tensorwise", "nvfp4"):
                found = run.logged[step, module, tensor, "amax"]
                assert found == pytest.approx(wanted, rel=tolerance(module, tensor)), (step, module, tensor)
            else:
                found = run.logged[step, module, tensor, "amax_bound"]
                slack = 1 + tolerance(module, tensor)
                assert wanted <= found * slack, (step, module, tensor)
                assert found < 2 * wanted * slack, (step, module, tensor)


def test_the_steps_differ_so_a_stale_amax_would_show(run: Run) -> None:
    # Inputs behind a norm are of one size in every step, weights change slowly.
    for module, tensor in (
        ("second.0", "input"),
        ("second.1", "input"),
        *((m, "grad_output") for m in MODULES),
    ):
        amaxes = [run.amax(step, module, tensor) for step in (1, 2, 3, 4)]
        assert len(set(amaxes)) == 4
        if tensor == "grad_output":
            assert max(amaxes) > 2 * min(amaxes)


def test_delayed_scale_follows_from_the_logged_window(run: Run, recipe: str) -> None:
    if recipe != "delayed":
        pytest.skip("only delayed scaling has a history")
    for step in LOGGED:
        for module, tensor in OPERANDS:
            row = {s: run.logged[step, module, tensor, s] for s in ("scale", "scale_next", "amax_history")}
            window = np.asarray(row["amax_history"], dtype=np.float32)
            assert len(window) == 4
            last_cast = run.taken[step, module, tensor][0 if tensor == "weight" else -1]
            assert window[-1] == pytest.approx(
                float(last_cast.float().abs().max()), rel=tolerance(module, tensor)
            ), (step, module, tensor)
            wanted = np.float32(FP8_MAX[run.formats[module, tensor]]) / window.max()
            assert np.float32(row["scale_next"]) == wanted, (step, module, tensor, row)


def test_tensorwise_scale_is_that_of_the_amax(run: Run, recipe: str) -> None:
    if recipe != "tensorwise":
        pytest.skip("the scale of one tensor")
    for step in LOGGED:
        for module, tensor in OPERANDS:
            wanted = FP8_MAX[run.formats[module, tensor]] / run.amax(step, module, tensor)
            found = run.logged[step, module, tensor, "scale"]
            assert found == pytest.approx(wanted, rel=tolerance(module, tensor))
            assert run.logged[step, module, tensor, "scale_inv"] == pytest.approx(1 / found, rel=2**-22)


def block_amax(x: torch.Tensor, block: tuple[int, int]) -> np.ndarray:
    """Largest magnitude of each block of a matrix whose sides are multiples of the block's."""
    rows, columns = x.shape[0] // block[0], x.shape[1] // block[1]
    blocks = x.float().abs().reshape(rows, block[0], columns, block[1]).amax(dim=(1, 3))
    return blocks.numpy().astype(np.float64)


def test_block_scales_are_those_of_the_blocks(run: Run, recipe: str) -> None:
    if recipe not in ("blockwise", "mxfp8"):
        pytest.skip("block scaling")
    for step in LOGGED:
        for module, tensor in OPERANDS:
            if tolerance(module, tensor) == NORM_TOLERANCE:
                continue
            if recipe == "mxfp8":
                block = (1, 32)
            else:
                block = (128, 128) if tensor == "weight" else (1, 128)
            largest = FP8_MAX[run.formats[module, tensor]]
            amax = np.concatenate([block_amax(x, block).reshape(-1) for x in run.taken[step, module, tensor]])
            # Power-of-two scales: the smallest power of two that brings the block within the format.
            scale_inv = np.exp2(np.ceil(np.log2(amax[amax > 0] / largest)))
            found = {
                stat: run.logged[step, module, tensor, stat]
                for stat in ("scale_inv_min", "scale_inv_max", "scale_inv_mean", "blocks")
            }
            where = (step, module, tensor)
            assert found["scale_inv_max"] == scale_inv.max(), where
            assert found["blocks"] == block_amax(run.taken[step, module, tensor][0], block).size, where
            if (amax > 0).all():
                assert found["scale_inv_min"] == scale_inv.min(), where
                assert found["scale_inv_mean"] == pytest.approx(scale_inv.mean(), rel=1e-6), where


def matrices(run: Run, step: int, module: str, tensor: str) -> list[np.ndarray]:
    """What was quantised in the step: a weight in its first micro-batch only."""
    taken = [x.float().numpy() for x in run.taken[step, module, tensor]]
    return taken[:1] if tensor == "weight" else taken


def delayed_scales(run: Run, module: str, tensor: str) -> dict[int, list[float | None]]:
    """Step -> scale of each cast under the recipe of the run, a window of four: from the amax of all casts
    before, whether their steps were logged or not.
    """
    largest = np.float32(FP8_MAX[run.formats[module, tensor]])
    scale, window, found = np.float32(1), np.zeros(4, np.float32), {}
    for step in range(1, STEPS + 1):
        found[step] = []
        for x in matrices(run, step, module, tensor):
            found[step].append(float(scale))
            window = np.append(window[1:], np.abs(x).max())
            scale = largest / window.max()
    return found


def test_errors_are_those_of_the_tensors_that_were_quantised(run: Run, recipe: str) -> None:
    checked = 0
    for step in LOGGED:
        for module, tensor in OPERANDS:
            found = {
                stat: run.logged[step, module, tensor, stat]
                for stat in ("underflow", "zeros", "saturation", "nonfinite", "sqnr", "bulk_error")
            }
            assert 0 <= found["underflow"] <= 1
            assert found["sqnr"] > (5 if recipe == "delayed" else 15), (step, module, tensor)
            if tolerance(module, tensor) == NORM_TOLERANCE or recipe == "nvfp4":
                continue
            fmt = run.formats[module, tensor]
            xs = matrices(run, step, module, tensor)
            scales: list[float | None] = [None] * len(xs)
            if recipe == "delayed":
                scales = delayed_scales(run, module, tensor)[step]
                assert run.logged[step, module, tensor, "scale"] == scales[-1], (step, module, tensor)
            pairs = [
                (x, quantised(x, recipe, tensor, fmt, scale)) for x, scale in zip(xs, scales, strict=True)
            ]
            limits = [FP8_MAX[fmt] / scale * (1 + 2e-7) if scale else np.inf for scale in scales]
            assert found == error_statistics(pairs, limits), (step, module, tensor)
            checked += 1
    assert checked or recipe == "nvfp4"


def test_the_other_recipes_are_judged_on_the_same_tensors(run: Run, recipe: str) -> None:
    others = set(DEVICES) - {recipe}
    chosen = [("second.0", tensor) for tensor in TENSORS] + [("first.1", "grad_output")]
    judged = {key[:3] for key in run.logged if key[3].startswith("whatif/")}
    assert judged == {(step, *operand) for step in LOGGED for operand in chosen}
    for step in LOGGED:
        for module, tensor in chosen:
            named = {
                key[3].split("/")[1]
                for key in run.logged
                if key[:3] == (step, module, tensor) and key[3].startswith("whatif/") and key[3] != RECORDED
            }
            if recipe != "delayed":
                # What the history was made of: one rank, whose amax of the step it is.
                assert run.logged[step, module, tensor, RECORDED] == [run.amax(step, module, tensor)]
            # Delayed scaling has no history of its own before the first logging step.
            assert named == (others - {"delayed"} if step == 1 else others)
            for other in named:
                fmt = "e5m2" if other in ("delayed", "tensorwise") and tensor == "grad_output" else "e4m3"
                found = {
                    stat: run.logged[step, module, tensor, f"whatif/{other}/{stat}"]
                    for stat in ("underflow", "zeros", "saturation", "nonfinite", "sqnr", "bulk_error")
                }
                scale = None
                if other == "delayed":
                    earlier = max(run.amax(s, module, tensor) for s in LOGGED if s < step)
                    scale = FP8_MAX[fmt] / earlier
                xs = matrices(run, step, module, tensor)
                pairs = [(x, quantised(x, other, tensor, fmt, scale)) for x in xs]
                if other == "nvfp4":
                    assert 10 < found["sqnr"] < 30
                    continue
                limit = FP8_MAX[fmt] / scale if scale else np.inf
                wanted = error_statistics(pairs, [limit * (1 + 2e-7)] * len(pairs))
                assert found == wanted, (step, module, tensor, other)


def test_transformer_engine_is_left_as_it_was(run: Run) -> None:
    assert run.facts["restored"]
    assert {step: counts["wrapped"] for step, counts in run.facts["counts"].items()} == {
        1: True,
        2: True,
        3: False,
        4: True,
        5: False,
    }


def test_other_steps_launch_nothing(run: Run) -> None:
    assert [run.facts["counts"][step]["end"] for step in (3, 5)] == [[], []]
    # Step 3 delivers the first step with something new in it: what delayed scaling would have done.
    assert run.facts["counts"][5]["begin"] == []


def test_launches_of_a_logging_step_do_not_grow_with_the_modules(run: Run) -> None:
    small, large = run.facts["launches"][1], run.facts["launches"][3]
    assert len(small) == len(large) < 90


def test_a_logging_step_never_waits_for_the_device(run: Run) -> None:
    waiting = {"item", "local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}
    for step in LOGGED:
        assert not waiting & set(run.facts["counts"][step]["end"])
        assert not waiting & set(run.facts["counts"][step]["begin"])
