"""The stats tier on quantised parameters whose high-precision copies the distributed optimizer cuts between
ranks: each rank measures what it has, and the rows are those of the whole weight.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from nemo_fp8_recipes.telemetry import store
from tests.stages.distributed.configurations import run_configurations

STEPS = 3
CUT = {"fp8_param": True, "distributed_optimizer": True}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall",
       "moe_router_load_balancing_type": "none", "moe_router_padding_for_fp8": True}  # fmt: skip
RUNS: dict[int, dict[str, dict[str, Any]]] = {
    # Three layers: the cut is in the middle of the second one.
    2: {
        recipe: {"recipe": recipe, "layers": 3, **CUT}
        for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")
    },
    # Cuts in the middle of rows, and a rank in the middle that has nothing of most weights.
    3: {"three ranks": {"recipe": "blockwise", "layers": 1, **CUT}},
    4: {
        "tensor parallel": {"recipe": "tensorwise", "tp": 2, "layers": 3, **CUT},
        "experts": {"recipe": "tensorwise", "ep": 2, "layers": 1, "model_options": MOE, **CUT},
    },
}
RANKS = {name: ranks for ranks, those in RUNS.items() for name in those}
RECIPES = {name: options["recipe"] for those in RUNS.values() for name, options in those.items()}
NAMES = list(RANKS)
SUMMED = ("elements", "zero_elements", "underflows", "saturated", "norm", "noise", "bulk_norm", "bulk_noise")


class Outcome(NamedTuple):
    """What the ranks say, by rank (`shared_program.run`), and where they wrote."""

    ranks: list[dict[str, Any]]
    path: Path

    def logged(self, stat: str) -> dict[tuple[int, str], float]:
        rows = store.read(self.path / "rank0", tensor="weight", stat=stat).to_pylist()
        return {(row["step"], row["module"]): row["value"] for row in rows}

    def oracle(self) -> dict[tuple[int, str], list[dict[str, Any]]]:
        """(step, module) -> counts and sums of each tensor-parallel shard of the weight, once each."""
        found: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
        for rank in self.ranks:
            for step, module, sums in rank["oracle"]:
                shards = found.setdefault((step, module), {})
                # All that share a weight put the same one together, NaN not compared.
                assert shards.setdefault(rank["shard"], sums) == sums
        return {key: list(shards.values()) for key, shards in found.items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    found = {}
    for ranks, configurations in RUNS.items():
        path = tmp_path_factory.mktemp(f"ranks{ranks}")
        made = run_configurations("shared_program", configurations, ranks=ranks, steps=STEPS, path=path)
        found |= {name: Outcome(by_rank, path / name) for name, by_rank in made.items()}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_exactly_those_of_the_whole_weight(name: str, outcomes: dict[str, Outcome]) -> None:
    run = outcomes[name]
    parts = {"underflow": "underflows", "saturation": "saturated", "zeros": "zero_elements"}
    # A third of a sum is rounded.
    exact = name not in ("three ranks", "experts")
    seen = set()
    for stat, part in parts.items():
        logged = run.logged(stat)
        oracle = run.oracle()
        assert logged.keys() == oracle.keys()
        for key, shards in oracle.items():
            ratio = np.float32(sum(one[part] for one in shards) / sum(one["elements"] for one in shards))
            assert logged[key] == (ratio if exact else pytest.approx(float(ratio), rel=2e-7)), (stat, key)
            seen |= {stat} if ratio else set()
    assert seen == set(parts)


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_the_whole_weight(name: str, outcomes: dict[str, Outcome]) -> None:
    run = outcomes[name]
    sqnr, bulk = run.logged("sqnr"), run.logged("bulk_error")
    for key, shards in run.oracle().items():
        sums = {part: sum(one[part] for one in shards) for part in SUMMED}
        assert sqnr[key] == pytest.approx(10 * math.log10(sums["norm"] / sums["noise"]), abs=5e-6), key
        assert bulk[key] == pytest.approx(math.sqrt(sums["bulk_noise"] / sums["bulk_norm"]), rel=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_extremes_are_those_of_the_whole_weight(name: str, outcomes: dict[str, Outcome]) -> None:
    run = outcomes[name]
    nonfinite, oracle = run.logged("nonfinite"), run.oracle()
    assert nonfinite == {key: max(one["nonfinite"] for one in shards) for key, shards in oracle.items()}
    assert {step for (step, _), number in nonfinite.items() if number} == {STEPS}
    if RECIPES[name] in ("blockwise", "mxfp8"):
        largest = {key: np.float32(max(one["largest"] for one in shards)) for key, shards in oracle.items()}
        assert run.logged("amax") == largest


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_really_cut(name: str, outcomes: dict[str, Outcome]) -> None:
    """And each element is on one rank alone, where the optimizer has it."""
    run = outcomes[name]
    assert all(rank["agrees"] for rank in run.ranks)
    cuts: list[tuple[int, int]] = []
    for rank in run.ranks:
        cuts += [(first, columns) for first, _, columns in rank["pieces"].values() if first]
    assert cuts
    if name == "three ranks":
        assert any(first % columns for first, columns in cuts)
    everywhere = set().union(*(rank["pieces"] for rank in run.ranks))
    assert everywhere == {module for _, module in run.oracle()}
    assert any(rank["pieces"].keys() < rank["replica"].keys() for rank in run.ranks)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_one_collective(name: str, outcomes: dict[str, Outcome]) -> None:
    """But for the first, in which the ranks agree on what they read."""
    for rank in outcomes[name].ranks:
        assert rank["collectives"][1:] == [["all_reduce"]] * (STEPS - 1)
