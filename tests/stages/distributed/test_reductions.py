"""Telemetry under tensor, pipeline, data and expert parallelism: real processes under torchrun with gloo."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.series import FP8_MAX
from tests.stages.distributed.configurations import run_configurations

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
    "pp_mxfp8": {"recipe": "mxfp8", "pp": 2, "micro_batches": 2},
    "dp_fp8_param": {"recipe": "tensorwise", "fp8_param": True},
    "dp_fp8_param_sharded": {"recipe": "tensorwise", "fp8_param": True, "distributed_optimizer": True},
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

    def by_rank(self) -> dict[tuple[int, str, str], list[dict[str, Any]]]:
        """(step, module, tensor) -> what each rank that has it saw, see `rank_program.Sums`."""
        found: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
        for rank in self.ranks:
            for step, module, tensor, sums in rank["seen"]:
                found.setdefault((step, module, tensor), []).append(sums)
        return found

    def oracle(self) -> dict[tuple[int, str, str], tuple[float, float]]:
        """(step, module, tensor) -> largest magnitude and fraction of zeros, over all ranks."""
        return {
            key: (
                max(sums["amax"] for sums in ranks),
                sum(sums["zeros"] for sums in ranks) / sum(sums["elements"] for sums in ranks),
            )
            for key, ranks in self.by_rank().items()
        }

    def logged(self, stat: str) -> dict[tuple[int, str, str], float]:
        rows = store.read(self.path / "rank0", stat=stat).to_pylist()
        found = {(row["step"], row["module"], row["tensor"]): row["value"] for row in rows}
        assert len(found) == len(rows), "a row that is there twice"
        return found


def outcomes(configurations: dict[str, dict[str, Any]], ranks: int, tmp_path: Path) -> dict[str, Outcome]:
    made = run_configurations("rank_program", configurations, ranks=ranks, steps=STEPS, path=tmp_path)
    return {name: Outcome(by_rank, tmp_path / name) for name, by_rank in made.items()}


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
    # Beside the oracle only what it cannot see: inputs behind a fused norm.
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


@pytest.mark.parametrize("name", EVERY)
def test_errors_are_those_of_all_elements_together(name: str, request: pytest.FixtureRequest) -> None:
    """SQNR, bulk error, underflow and saturation of the whole tensor, from the sums of the ranks."""
    run = outcome(name, request)
    options = {**TWO, **FOUR}[name]
    logged = {stat: run.logged(stat) for stat in ("sqnr", "bulk_error", "underflow", "saturation")}
    compared = 0
    for key, ranks in run.by_rank().items():
        if key not in logged["sqnr"]:
            continue
        sums = {
            part: sum(found[part] for found in ranks)
            for part in ("elements", "underflows", "saturated", "norm", "noise", "bulk_norm", "bulk_noise")
        }
        # With sequence parallelism one scale serves the shards of both ranks, which the oracle does not know.
        shared = bool(options.get("sequence_parallel")) and key[2] == "grad_output"
        for stat, part in (("underflow", "underflows"), ("saturation", "saturated")):
            near = pytest.approx(sums[part] / sums["elements"], rel=1e-4, abs=1e-3 if shared else 1e-7)
            assert logged[stat][key] == near, (stat, key)
        if sums["noise"] == 0 or sums["bulk_norm"] == 0:
            continue
        sqnr = 10 * math.log10(sums["norm"] / sums["noise"])
        if sqnr > 100:
            continue  # made of its own quantised values
        assert logged["sqnr"][key] == pytest.approx(sqnr, abs=1.0 if shared else 1e-3), key
        bulk = math.sqrt(sums["bulk_noise"] / sums["bulk_norm"])
        assert logged["bulk_error"][key] == pytest.approx(bulk, rel=0.1 if shared else 0.03), key
        compared += 1
    assert compared > 10


def test_primary_weights_have_statistics_whichever_ranks_have_the_optimizers_copies(
    two: dict[str, Outcome],
) -> None:
    """The distributed optimizer gives each rank other ones; `test_shared_weights.py` has what it cuts."""
    for name in ("dp_fp8_param", "dp_fp8_param_sharded"):
        weights = {key for key in two[name].by_rank() if key[2] == "weight"}
        assert len(weights) == STEPS * 2 * 4
        for stat in ("sqnr", "amax"):
            assert {key for key in two[name].logged(stat) if key[2] == "weight"} == weights


@pytest.mark.parametrize("name", [name for name in EVERY if "delayed" in name])
def test_headroom_is_that_of_the_worst_cast_of_any_rank(name: str, request: pytest.FixtureRequest) -> None:
    run = outcome(name, request)
    logged = run.logged("headroom")
    compared = 0
    for key, ranks in run.by_rank().items():
        peak = max(sums["peak"] for sums in ranks)
        if peak:
            largest = FP8_MAX["e5m2" if key[2] == "grad_output" else "e4m3"]
            assert logged[key] == pytest.approx(largest / peak, rel=1e-5), key
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("name", [name for name in EVERY if "mxfp8" in name])
def test_block_scales_are_combined_as_documented(name: str, request: pytest.FixtureRequest) -> None:
    """Each rank's distribution; then the smallest, the largest, or the mean of the ranks."""
    run = outcome(name, request)
    stats = ("min", "max", "mean", "std", "p01", "p50", "p99")
    logged = {stat: run.logged(f"scale_inv_{stat}") for stat in stats}
    blocks, compared = run.logged("blocks"), 0
    for key, ranks in run.by_rank().items():
        scales = [
            np.repeat(
                np.exp2([float(exponent) for exponent in sums["exponents"]]), list(sums["exponents"].values())
            )
            for sums in ranks
        ]
        if key not in blocks or not all(len(part) for part in scales):
            continue
        parts = [{p: np.percentile(part, p, method="inverted_cdf") for p in (1, 50, 99)} for part in scales]
        mean = np.mean([part.mean() for part in scales])
        square = np.mean([np.square(part).mean() for part in scales])
        wanted = {
            "min": min(part.min() for part in scales),
            "max": max(part.max() for part in scales),
            "mean": pytest.approx(mean, rel=1e-5),
            "std": pytest.approx(math.sqrt(max(square - mean**2, 0)), rel=1e-3, abs=2e-3 * mean),
            "p01": min(part[1] for part in parts),
            "p50": max(part[50] for part in parts),
            "p99": max(part[99] for part in parts),
        }
        assert {stat: logged[stat][key] for stat in stats} == wanted, key
        assert blocks[key] == max(sums["blocks"] for sums in ranks), key
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("name", ["pp", "pp_delayed", "pp_mxfp8"])
def test_each_stage_reports_its_own_modules(name: str, request: pytest.FixtureRequest) -> None:
    run = outcome(name, request)
    layers = [
        {module.split(".layers.")[1].split(".")[0] for _, module, _, _ in rank["seen"]} for rank in run.ranks
    ]
    assert layers == [{"0"}, {"1"}]
    for stat in ("sqnr", "amax"):
        assert {key[1].split(".layers.")[1].split(".")[0] for key in run.logged(stat)} == {"0", "1"}


def test_the_ranks_really_differ(two: dict[str, Outcome]) -> None:
    """Otherwise the maximum over ranks would prove nothing."""
    for name in ("tp", "dp", "tp_sequence"):
        first, second = ({tuple(row[:3]): row[3]["amax"] for row in rank["seen"]} for rank in two[name].ranks)
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
