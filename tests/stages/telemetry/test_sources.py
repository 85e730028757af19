"""What is logged of each way in which Transformer Engine quantises, against the tensors themselves.

Experts (one of which gets no token), bias gradients, activations and norms fused with the quantisation,
activation recompute, micro-batches, primary weights, an evaluation in the middle of a step. The expected
numbers come from plain torch hooks, numpy and ml_dtypes.
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
from tests.stages.telemetry.source_program import MICRO_BATCHES, STEPS
from tests.telemetry.oracle import error_statistics, quantised

ROOT = Path(__file__).parents[3]
DEVICES = {"delayed": "h100", "tensorwise": "h100", "blockwise": "h100", "mxfp8": "b200"}
TENSORS = ("input", "weight", "grad_output")
MODULES = (
    "recomputed",
    "mlp.gemm0",
    "mlp.gemm1",
    "experts.gemm0",
    "experts.gemm1",
    "experts.gemm2",
    "primary",
)
OWN_SCALE = ("primary", "weight")
"""Under delayed scaling it is written, and its amax observed, when the step ends."""
EMPTY = {("experts.gemm1", "input"), ("experts.gemm1", "grad_output")}
COMPUTED_INSIDE = {("mlp.gemm0", "input"), ("mlp.gemm1", "input"), ("mlp.gemm0", "grad_output")}
"""A norm's or an activation's result: torch's may round to the neighbouring bf16."""
OPERANDS = [(module, tensor) for module in MODULES for tensor in TENSORS]
STATS = ("underflow", "zeros", "saturation", "nonfinite", "sqnr", "bulk_error")


class Run(NamedTuple):
    """Attributes:
    recipe: of the run.
    logged: (step, module, tensor, stat) -> number.
    formats: (module, tensor) -> element format.
    taken: (step, module, tensor) -> what was quantised, fp32 (rows, columns), one a cast.
    called: functions of Transformer Engine's binding that were called.
    """

    recipe: str
    logged: dict[tuple[int, str, str, str], float]
    formats: dict[tuple[str, str], str]
    taken: dict[tuple[int, str, str], list[np.ndarray]]
    called: set[str]


@pytest.fixture(scope="module", params=DEVICES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe, out = str(request.param), tmp_path_factory.mktemp(str(request.param))
    program = [sys.executable, "-m", "tests.stages.telemetry.source_program"]
    done = subprocess.run(
        [*program, DEVICES[recipe], recipe, str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    facts: dict[str, Any] = torch.load(out / "taken.pt", weights_only=True)
    rows = [row for row in store.read(out / "run").to_pylist() if row["values"] is None]
    logged = {(row["step"], row["module"], row["tensor"], row["stat"]): row["value"] for row in rows}
    assert len(logged) == len(rows)
    taken = {}
    for key, tensors in facts["taken"].items():
        # Weights are kept for the micro-batches of a step: cast in the first one.
        assert len(tensors) == MICRO_BATCHES, key
        taken[key] = [x.float().numpy() for x in (tensors[:1] if key[2] == "weight" else tensors)]
    formats = {(row["module"], row["tensor"]): row["format"] for row in rows}
    return Run(recipe, logged, formats, taken, set(facts["called"]))


def test_every_way_was_taken(run: Run) -> None:
    expected = {
        "delayed": {"gelu", "dbias_dgelu", "bgrad_quantize", "split_quantize"},
        "tensorwise": {"gelu", "dgelu", "bgrad_quantize", "split_quantize"},
        "blockwise": {"gelu", "dgelu", "split_quantize"},
        "mxfp8": {"gelu", "dbias_dgelu", "bgrad_quantize", "split_quantize"},
    }
    assert expected[run.recipe] <= run.called


def test_every_operand_has_its_rows_and_an_expert_without_tokens_none(run: Run) -> None:
    having = {key[:3] for key in run.logged if key[3] == "sqnr"}
    assert having == {
        (step, *operand) for step in range(1, STEPS + 1) for operand in OPERANDS if operand not in EMPTY
    }
    of_empty = {key[3]: value for key, value in run.logged.items() if key[1:3] in EMPTY}
    if run.recipe == "delayed":  # its state has an entry for every expert
        assert set(of_empty) == {"amax", "scale", "scale_next", "headroom"}
        assert of_empty["amax"] == 0
    else:
        assert of_empty == {}


def test_the_amax_is_that_of_all_micro_batches_of_the_step(run: Run) -> None:
    """Neither an evaluation, nor a repeated forward pass, nor the step before could pass for it."""
    for (step, module, tensor), xs in run.taken.items():
        wanted = max(float(np.abs(x).max()) for x in xs)
        near = 2.0**-7 if (module, tensor) in COMPUTED_INSIDE else 2.0**-21
        if run.recipe == "delayed" and (module, tensor) == OWN_SCALE:
            continue
        found = run.logged[step, module, tensor, "amax"]
        assert found == pytest.approx(wanted, rel=near), (step, module, tensor)


def scales(run: Run, module: str, tensor: str) -> dict[int, list[float | None]]:
    """Step -> scale of each cast: delayed scaling's follows from the casts before, by a window of four."""
    scale, window = np.float32(1), np.zeros(4, np.float32)
    found: dict[int, list[float | None]] = {}
    for step in range(1, STEPS + 1):
        xs = run.taken[step, module, tensor]
        found[step] = []
        for x in xs:
            found[step].append(float(scale) if run.recipe == "delayed" else None)
            window = np.append(window[1:], np.abs(x).max())
            scale = np.float32(FP8_MAX[run.formats[module, tensor]]) / window.max()
    return found


def test_the_statistics_are_those_of_the_tensors(run: Run) -> None:
    checked = set()
    for module, tensor in OPERANDS:
        if (module, tensor) in EMPTY or (run.recipe == "delayed" and (module, tensor) == OWN_SCALE):
            continue
        fmt = run.formats[module, tensor]
        for step, of_step in scales(run, module, tensor).items():
            xs = run.taken[step, module, tensor]
            pairs = [(x, quantised(x, run.recipe, tensor, fmt, s)) for x, s in zip(xs, of_step, strict=True)]
            limits = [FP8_MAX[fmt] / s * (1 + 2e-7) if s else np.inf for s in of_step]
            wanted = error_statistics(pairs, limits)
            inside = (module, tensor) in COMPUTED_INSIDE
            for name in ("underflow", "zeros", "saturation", "nonfinite"):
                wanted[name] = pytest.approx(wanted[name], rel=1e-6, abs=2e-3 if inside else 0)
            if inside:
                wanted["sqnr"] = pytest.approx(wanted["sqnr"].expected, abs=0.2)
                wanted["bulk_error"] = pytest.approx(wanted["bulk_error"].expected, rel=0.05)
            found = {stat: run.logged[step, module, tensor, stat] for stat in STATS}
            assert found == wanted, (step, module, tensor)
            checked.add((module, tensor))
    assert len(checked) >= len(OPERANDS) - len(EMPTY) - 1


def test_primary_weights_are_compared_with_the_optimizers_copy(run: Run) -> None:
    """Under delayed scaling too, whose scale of the first cast is not told."""
    sqnr = [run.logged[step, "primary", "weight", "sqnr"] for step in range(1, STEPS + 1)]
    assert all(5 < value < 60 for value in sqnr)
    assert len(set(sqnr)) == STEPS
