"""Ranks whose scales go apart, another rank that writes, and a run that goes on with another TP size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.telemetry import store
from tests.support.processes import run_ranks


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Data-parallel ranks of which one loses its amax history in step 3; the second rank writes."""
    out = tmp_path_factory.mktemp("apart")
    seen = run_ranks(
        f"""
        import torch, torch.distributed as dist
        import nemo_fp8_recipes
        from nemo_fp8_recipes import telemetry
        from tests.support.gpt import Trainer

        trainer = Trainer(recipe="delayed")
        rank, heard = dist.get_rank(), []
        recorder = telemetry.attach(
            trainer.model, nemo_fp8_recipes.load("delayed", amax_history_len=4),
            directory={str(out)!r} + f"/rank{{rank}}", log_every=1, sinks=["parquet"], is_writer=rank == 1,
            on_alert=lambda alerts: heard.extend([step, a.step, a.rule, len(a.tensors)] for a in alerts),
        )
        for step in range(1, 6):
            recorder.begin_step(step)
            if step == 3 and rank == 0:
                for module in trainer.gpt.modules():
                    for direction in ("scaling_fwd", "scaling_bwd"):
                        state = getattr(module, "fp8_meta", {{}}).get(direction)
                        if state is not None:
                            state.scale.mul_(0.5)
            trainer.step()
            recorder.end_step(step)
        recorder.begin_step(6)
        recorder.close()
        result(heard)
        """,
        device="h100",
        timeout=300,
        tmp_path=out,
    )
    return out, seen


def test_scales_that_went_apart_are_reported_on_every_rank(apart: tuple[Path, list[Any]]) -> None:
    heard = [entry for entry in apart[1][0] if entry[2] == "ranks_disagree"]
    assert len(heard) == 1
    now, step, _, tensors = heard[0]
    assert (now, step) == (3 + 1, 3) or (now, step) == (3, 3)
    assert tensors == 2 * 4 * 3  # every operand of every linear
    assert apart[1][1] == apart[1][0]


def test_the_rank_that_was_asked_to_writes(apart: tuple[Path, list[Any]]) -> None:
    out, _ = apart
    assert not (out / "rank0").exists()
    rows = store.read(out / "rank1", stat="scale_max").to_pylist()
    assert {row["step"] for row in rows} == {3}
    smallest = {
        (row["module"], row["tensor"]): row["value"]
        for row in store.read(out / "rank1", stat="scale", first_step=3, last_step=3).to_pylist()
    }
    assert all(row["value"] == 2 * smallest[row["module"], row["tensor"]] for row in rows)
    assert store.info(out / "rank1")["rank"] == 1


def test_a_run_that_goes_on_with_another_tp_size(tmp_path: Path) -> None:
    """Two ranks as tp=2, then the same run directory as dp=2: one store, every step once."""
    run_ranks(
        f"""
        import nemo_fp8_recipes
        from nemo_fp8_recipes import telemetry
        from tests.support.gpt import Trainer

        for tp, steps in ((2, range(1, 6)), (1, range(4, 8))):
            trainer = Trainer(recipe="tensorwise", tp=tp)
            recorder = telemetry.attach(
                trainer.model, nemo_fp8_recipes.load("tensorwise"), directory={str(tmp_path)!r} + "/run",
                log_every=1, sinks=["parquet"], flush_every=2,
            )
            recorder.truncate_after(steps[0] - 1)
            for step in steps:
                recorder.begin_step(step)
                trainer.step()
                recorder.end_step(step)
            recorder.close()
        """,
        timeout=300,
        tmp_path=tmp_path,
    )
    table = store.read(tmp_path / "run", stat="amax")
    keys = list(zip(*(table.column(name).to_pylist() for name in ("step", "module", "tensor")), strict=True))
    assert len(keys) == len(set(keys))
    modules = {key[1] for key in keys}
    assert len(modules) == 2 * 4
    assert {key[0] for key in keys} == set(range(1, 8))
    assert len(keys) == 7 * 8 * 3


def test_what_delayed_scaling_would_have_done_goes_on_where_a_run_is_resumed(tmp_path: Path) -> None:
    """Each rank's histories are of its own shard: the writer reads them back for all of them."""
    run_ranks(
        f"""
        import nemo_fp8_recipes, torch.distributed as dist
        from nemo_fp8_recipes import telemetry
        from tests.support.gpt import Trainer

        def attach(trainer, name):
            return telemetry.attach(
                trainer.model, nemo_fp8_recipes.load("tensorwise"),
                directory=None if dist.get_rank() == 0 else {str(tmp_path)!r} + "/" + name,
                log_every=1, stats_every=1, sinks=["parquet"], is_writer=dist.get_rank() == 1,
                whatif=["*linear_fc2/*", "*.layers.1.*/weight"],
            )

        def steps(trainer, recorder, numbers):
            for step in numbers:
                recorder.begin_step(step)
                trainer.step()
                recorder.end_step(step)

        for kind, options in (("tp", dict(tp=2)), ("pp", dict(pp=2, micro_batches=2))):
            trainer = Trainer(recipe="tensorwise", **options)
            recorder = attach(trainer, kind + "-whole")
            steps(trainer, recorder, range(1, 7))
            recorder.close()
            trainer = Trainer(recipe="tensorwise", **options)
            recorder = attach(trainer, kind + "-resumed")
            steps(trainer, recorder, range(1, 4))
            recorder.flush()
            recorder.close()
            recorder = attach(trainer, kind + "-resumed")
            recorder.truncate_after(3)
            steps(trainer, recorder, range(4, 7))
            recorder.close()
        """,
        timeout=300,
        tmp_path=tmp_path,
    )

    def rows(name: str) -> dict[tuple[Any, ...], str]:
        keys = ("step", "module", "tensor", "stat")
        table = store.read(tmp_path / name).to_pylist()
        found = {tuple(row[key] for key in keys): repr((row["value"], row["values"])) for row in table}
        return {key: value for key, value in found.items() if key[3].startswith("whatif/delayed/")}

    for kind in ("tp", "pp"):
        whole, resumed = rows(f"{kind}-whole"), rows(f"{kind}-resumed")
        assert len([key for key in whole if key[0] > 3 and key[3].endswith("sqnr")]) > 10
        assert {key[1].split(".layers.")[1][0] for key in whole} == {"0", "1"}
        assert resumed == whole
