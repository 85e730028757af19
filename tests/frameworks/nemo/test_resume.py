"""`llm.train` with NeMo's checkpoints: an interrupted run goes on as if it had not been interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.telemetry import store


def rows(run_dir: Path) -> list[dict[str, Any]]:
    found = store.read(run_dir).to_pylist()
    return sorted(found, key=lambda row: (row["step"], row["module"], row["tensor"], row["stat"]))


@pytest.mark.parametrize("recipe", ["delayed", "mxfp8"])
def test_a_resumed_run_is_the_uninterrupted_one(recipe: str, tmp_path: Path) -> None:
    from tests.frameworks.nemo import jobs

    options = {"amax_history_len": 8} if recipe == "delayed" else {}
    whole = jobs.job(recipe, tmp_path / "whole", options=options, steps=6)
    uninterrupted = whole.train(tmp_path / "whole-log")

    jobs.clean()
    # Lost after step 5: the checkpoint is of step 4, and step 5 has been logged.
    first = jobs.job(recipe, tmp_path / "cut", options=options, steps=6, interrupted_after=5)
    with pytest.raises(jobs.NodeLostError):
        first.train(tmp_path / "cut-log", every=4)
    assert first.seen.losses == uninterrupted[:5]
    jobs.clean()
    second = jobs.job(recipe, tmp_path / "cut", options=options, steps=6)
    after = second.train(tmp_path / "cut-log", every=4, resume=True)

    assert after == uninterrupted[4:]
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    metrics = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    assert metrics == [1, 2, 3, 4, 5, 6]
    if recipe == "delayed":
        histories = [row for row in rows(tmp_path / "cut") if row["stat"] == "amax_history"]
        assert any(row["step"] == 6 for row in histories)
