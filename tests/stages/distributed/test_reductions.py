"""Telemetry under tensor, pipeline, data and expert parallelism: real processes under torchrun with gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nemo_fp8_recipes.telemetry import store
from tests.support.processes import run_ranks

STEPS = 3
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall",
       "moe_router_load_balancing_type": "none", "moe_router_padding_for_fp8": True}  # fmt: skip

TWO: dict[str, dict[str, Any]] = {
    "tp": {"recipe": "tensorwise", "tp": 2},
    "tp_sequence": {"recipe": "tensorwise", "tp": 2, "sequence_parallel": True},
    "tp_delayed": {"recipe": "delayed", "tp": 2},
    "tp_mxfp8": {"recipe": "mxfp8", "tp": 2},
    "dp": {"recipe": "tensorwise", "micro_batches": 2},
    "dp_delayed": {"recipe": "delayed", "distributed_optimizer": True},
    "dp_mxfp8": {"recipe": "mxfp8"},
    "pp": {"recipe": "tensorwise", "pp": 2, "micro_batches": 2},
    "pp_delayed": {"recipe": "delayed", "pp": 2, "micro_batches": 2},
    # The second stage has no quantised module at all.
    "pp_one_stage_in_bf16": {
        "recipe": "tensorwise",
        "pp": 2,
        "micro_batches": 2,
        "model_options": {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 0,
            "num_layers_at_end_in_bf16": 1,
        },
    },
    "ep": {"recipe": "tensorwise", "ep": 2, "model_options": MOE},
}
FOUR: dict[str, dict[str, Any]] = {
    "tp_dp": {"recipe": "tensorwise", "tp": 2, "sequence_parallel": True},
    "tp_dp_delayed": {"recipe": "delayed", "tp": 2},
    # Two replicas of each expert, which get different numbers of tokens.
    "ep_dp": {"recipe": "tensorwise", "ep": 2, "model_options": MOE},
}


class Outcome(NamedTuple):
    """What the ranks saw, and where they wrote.

    Attributes:
        ranks: by rank, what `rank_program.run` returned.
        path: directory of the configuration; `rank<n>` in it is what rank n wrote.
    """

    ranks: list[dict[str, Any]]
    path: Path

    def oracle(self) -> dict[tuple[int, str, str], tuple[float, float]]:
        """(step, module, tensor) -> largest magnitude and fraction of zeros, over all ranks."""
        summed: dict[tuple[int, str, str], list[float]] = {}
        for rank in self.ranks:
            for step, module, tensor, amax, zeros, elements in rank["seen"]:
                found = summed.setdefault((step, module, tensor), [0.0, 0.0, 0.0])
                summed[step, module, tensor] = [max(found[0], amax), found[1] + zeros, found[2] + elements]
        return {key: (amax, zeros / elements) for key, (amax, zeros, elements) in summed.items()}

    def logged(self, stat: str) -> dict[tuple[int, str, str], float]:
        rows = store.read(self.path / "rank0", stat=stat).to_pylist()
        found = {(row["step"], row["module"], row["tensor"]): row["value"] for row in rows}
        assert len(found) == len(rows), "a row that is there twice"
        return found


def outcomes(configurations: dict[str, dict[str, Any]], ranks: int, tmp_path: Path) -> dict[str, Outcome]:
    by_rank = run_ranks(
        f"""
        from pathlib import Path
        from tests.stages.distributed.rank_program import run
        result({{
            name: run(name, options, Path({str(tmp_path)!r}), steps={STEPS})
            for name, options in {configurations!r}.items()
        }})
        """,
        ranks=ranks,
        device="b200",
        timeout=900,
        tmp_path=tmp_path,
    )
    return {name: Outcome([rank[name] for rank in by_rank], tmp_path / name) for name in configurations}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return outcomes(TWO, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return outcomes(FOUR, 4, tmp_path_factory.mktemp("four"))


def outcome(name: str, request: pytest.FixtureRequest) -> Outcome:
    found: Outcome = request.getfixturevalue("two" if name in TWO else "four")[name]
    return found


EVERY = [*TWO, *FOUR]


@pytest.mark.parametrize("name", EVERY)
def test_the_amax_is_that_of_the_whole_tensor(name: str, request: pytest.FixtureRequest) -> None:
    run = outcome(name, request)
    options = {**TWO, **FOUR}[name]
    exact = options["recipe"] != "mxfp8"
    logged = run.logged("amax" if exact else "amax_bound")
    oracle = {key: amax for key, (amax, _) in run.oracle().items()}
    if name == "pp_one_stage_in_bf16":
        assert not [key for key in logged if ".layers.1." in key[1]]
        oracle = {key: amax for key, amax in oracle.items() if ".layers.0." in key[1]}
    assert oracle.keys() <= logged.keys(), sorted(oracle.keys() - logged.keys())[:5]
    # Beside the oracle only the inputs behind a fused norm, which it cannot see.
    assert {key[2] for key in logged.keys() - oracle.keys()} <= {"input"}
    assert {key[0] for key in logged} == set(range(1, STEPS + 1))
    for key, amax in oracle.items():
        if amax == 0:
            continue  # tensorwise and block scales of a tensor of zeros are 1
        if exact:
            assert logged[key] == pytest.approx(amax, rel=2**-20), key
        else:
            assert amax <= logged[key] < 2 * amax, key


@pytest.mark.parametrize("name", EVERY)
def test_fractions_are_those_of_all_elements_together(name: str, request: pytest.FixtureRequest) -> None:
    """Replicas count alike, and ranks with more tokens (experts) count for more."""
    run = outcome(name, request)
    logged = run.logged("zeros")
    compared = 0
    for key, (_, zeros) in run.oracle().items():
        if key in logged:
            assert logged[key] == pytest.approx(zeros, rel=1e-4, abs=1e-7), key
            compared += 0 < zeros < 1
    assert compared


def test_the_ranks_really_differ(two: dict[str, Outcome]) -> None:
    """Otherwise the maximum over ranks would prove nothing."""
    for name in ("tp", "dp", "tp_sequence"):
        first, second = ({tuple(row[:3]): row[3] for row in rank["seen"]} for rank in two[name].ranks)
        tensor = "weight" if name != "dp" else "grad_output"
        both = [key for key in first.keys() & second.keys() if key[2] == tensor]
        assert any(first[key] != second[key] for key in both), name


@pytest.mark.parametrize("name", ["ep", "ep_dp"])
def test_every_expert_has_rows_of_its_own(name: str, request: pytest.FixtureRequest) -> None:
    run = outcome(name, request)
    experts = {key[1] for key in run.logged("amax") if ".experts." in key[1] and key[2] == "weight"}
    numbers = {int(path.split("local_experts.")[1].split(".")[0]) for path in experts}
    assert numbers == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["tp_delayed", "dp_delayed", "pp_delayed", "tp_dp_delayed"])
def test_the_ranks_agree_on_delayed_scales(name: str, request: pytest.FixtureRequest) -> None:
    run = outcome(name, request)
    assert run.logged("scale")
    assert run.logged("scale_max") == {}
    assert all([rule for _, rule in rank["alerts"]].count("ranks_disagree") == 0 for rank in run.ranks)


@pytest.mark.parametrize("name", EVERY)
def test_rank_0_alone_writes(name: str, request: pytest.FixtureRequest) -> None:
    assert [rank["wrote"] for rank in outcome(name, request).ranks] == [
        True,
        *[False] * (len(outcome(name, request).ranks) - 1),
    ]


@pytest.mark.parametrize("name", EVERY)
def test_the_callback_hears_the_same_on_every_rank(name: str, request: pytest.FixtureRequest) -> None:
    first, *others = (rank["alerts"] for rank in outcome(name, request).ranks)
    assert all(other == first for other in others)
