"""Delayed scaling's own history under another recipe: kept over a resume, judged by an independent oracle."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
import torch

from nemo_fp8_recipes.telemetry.groups import Experts
from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.probes.base import Reading
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.whatif import RECORDED, Recorded, WhatIf

STEPS = 14
OPERANDS = [Operand("m", "input"), Operand("m", "grad_output"), Operand("expert", "input")]
CPU = torch.device("cpu")


def tensors(step: int) -> Iterator[tuple[Operand, torch.Tensor]]:
    """What a step quantises: sizes that jump, a tensor of zeros, an Inf, an expert that gets tokens late."""
    for number, operand in enumerate(OPERANDS):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * step + number))
        x *= 2.0 ** ((5 * step + number) % 7)
        if step == 4 and operand.tensor == "grad_output":
            x.zero_()
        if step == 6 and operand.module == "m":
            x[2, 3] = torch.inf
        yield operand, x[:0] if operand.module == "expert" and step < 5 else x


def run(whatif: WhatIf, first: int, last: int) -> dict[int, Reading]:
    """Logging steps, each with two micro-batches."""
    found = {}
    for step in range(first, last + 1):
        for operand, x in tensors(step):
            for part in (0.5 * x, x):
                whatif.quantised(operand, "tensorwise", part.to(torch.bfloat16), judge=True)
        reading = whatif.end()
        assert reading is not None
        found[step] = reading
    return found


def recorded(readings: dict[int, Reading]) -> list[Recorded]:
    """As the store gives it back."""
    found = []
    for step, reading in readings.items():
        values = reading.values.split([spec.length for spec in reading.specs])
        found += [
            Recorded(step, Operand(spec.module, spec.tensor), value.numpy())
            for spec, value in zip(reading.specs, values, strict=True)
            if spec.name == RECORDED
        ]
    return found


def bits(reading: Reading) -> tuple[tuple[object, ...], bytes]:
    return reading.specs, reading.values.numpy().tobytes()


@pytest.mark.parametrize("resume_at", [1, 4, 6, 11])
def test_histories_after_a_resume_are_those_of_a_run_that_went_on(resume_at: int) -> None:
    whole = run(WhatIf(["*"], IndexCache()), 1, STEPS)
    resumed = WhatIf(["*"], IndexCache())
    resumed.restore([row for row in recorded(whole) if row.step <= resume_at], CPU)
    for step, reading in run(resumed, resume_at + 1, STEPS).items():
        assert bits(reading) == bits(whole[step]), step


def test_without_its_record_a_resumed_history_would_differ() -> None:
    whole = run(WhatIf(["*"], IndexCache()), 1, 9)
    assert bits(run(WhatIf(["*"], IndexCache()), 8, 9)[9]) != bits(whole[9])


def test_going_back_forgets_what_came_later() -> None:
    whatif = WhatIf(["*"], IndexCache())
    whole = run(whatif, 1, STEPS)
    whatif.restore([row for row in recorded(whole) if row.step <= 3], CPU)
    assert bits(run(whatif, 4, 4)[4]) == bits(whole[4])


def test_each_rank_goes_on_from_its_own_part_and_other_ranks_from_the_largest() -> None:
    rows = [Recorded(1, OPERANDS[0], np.asarray([2.0, 8.0, -1.0], np.float32))]
    scales = {}
    for rank, ranks in ((0, 3), (1, 3), (2, 3), (0, 2)):
        whatif = WhatIf(["*"], IndexCache(), rank=rank, ranks=ranks)
        whatif.restore(rows, CPU)
        state = whatif._delayed.get(OPERANDS[0])
        scales[rank, ranks] = None if state is None else float(state.scale)
    assert scales == {(0, 3): 448 / 2, (1, 3): 448 / 8, (2, 3): None, (0, 2): 448 / 8}


def of_experts(whatif: WhatIf, first: int, last: int) -> dict[int, Reading]:
    """Logging steps of an operand that three experts have together, the second one without rows at first."""
    found = {}
    for step in range(first, last + 1):
        x = torch.randn(24, 32, generator=torch.Generator().manual_seed(step)) * 2.0 ** (5 * step % 7)
        rows = torch.tensor([8, 8 if step > 4 else 0, 8 if step > 4 else 16])
        experts = Experts(3, torch.arange(3).repeat_interleave(rows))
        whatif.quantised(Operand("e", "input"), "mxfp8", x, judge=True, experts=experts)
        whatif.quantised(OPERANDS[0], "mxfp8", x, judge=True)
        reading = whatif.end()
        assert reading is not None
        found[step] = reading
    return found


@pytest.mark.parametrize("resume_at", [1, 4, 6])
def test_histories_of_experts_after_a_resume_are_those_of_a_run_that_went_on(resume_at: int) -> None:
    def made() -> WhatIf:
        return WhatIf(["*"], IndexCache(), rank=1, ranks=2, members={"e": 3})

    whole, resumed = of_experts(made(), 1, 8), made()
    resumed.restore([row for row in recorded(whole) if row.step <= resume_at], CPU)
    for step, reading in of_experts(resumed, resume_at + 1, 8).items():
        assert bits(reading) == bits(whole[step]), step
    assert {row.operand.module: len(row.values) for row in recorded(whole)} == {"e": 6, "m": 2}


def test_experts_on_other_ranks_go_on_from_the_largest() -> None:
    rows = [Recorded(1, Operand("e", "input"), np.asarray([2.0, 8.0, 4.0, 1.0], np.float32))]
    scales = {}
    for rank, ranks in ((0, 2), (1, 2), (0, 1)):
        whatif = WhatIf(["*"], IndexCache(), rank=rank, ranks=ranks, members={"e": 2})
        whatif.restore(rows, CPU)
        scales[rank, ranks] = (448 / whatif._delayed[rows[0].operand].scale).tolist()
    assert scales == {(0, 2): [2.0, 8.0], (1, 2): [4.0, 1.0], (0, 1): [8.0, 8.0]}


def test_delayed_scaling_is_judged_with_the_scale_of_the_steps_before() -> None:
    """Inputs and gradients, against numpy and ml_dtypes: the scale of the largest amax so far."""
    readings = run(WhatIf(["*"], IndexCache()), 1, 5)
    formats = {"input": (ml_dtypes.float8_e4m3fn, 448.0), "grad_output": (ml_dtypes.float8_e5m2, 57344.0)}
    largest: dict[Operand, float] = {}
    for step, reading in readings.items():
        values = reading.values.split([spec.length for spec in reading.specs])
        found = {
            (spec.module, spec.tensor, spec.name): float(value[0])
            for spec, value in zip(reading.specs, values, strict=True)
            if spec.recipe == "delayed"
        }
        for operand, source in tensors(step):
            dtype, limit = formats[operand.tensor]
            if operand in largest:
                scale = np.float32(limit) / np.float32(largest[operand])
                parts = [part.to(torch.bfloat16).float().numpy() for part in (0.5 * source, source)]
                x = np.concatenate([part.reshape(-1) for part in parts])
                q = np.clip(x * scale, -limit, limit).astype(dtype).astype(np.float32) / scale
                wanted = {
                    "elements": x.size,
                    "zero_elements": (x == 0).sum(),
                    "underflows": ((x != 0) & (q == 0)).sum(),
                    "saturated": (np.abs(x) > limit / scale * (1 + 2e-7)).sum(),
                    "norm": pytest.approx(np.linalg.norm(x.astype(np.float64)), rel=1e-5),
                    "noise": pytest.approx(np.linalg.norm((q - x).astype(np.float64)), rel=1e-5),
                }
                assert {name: found[(*operand, name)] for name in wanted} == wanted, (step, operand)
            else:
                assert (*operand, "noise") not in found
            amax = float(source.to(torch.bfloat16).float().abs().max()) if source.numel() else 0.0
            if amax:
                largest[operand] = max(largest.get(operand, 0.0), amax)
