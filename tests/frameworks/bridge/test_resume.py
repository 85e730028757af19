"""Bridge's own checkpoints: a resumed run is the uninterrupted one, amax histories included."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_fp8_recipes.telemetry import store


@pytest.mark.parametrize("way", ["config", "get_fp8_recipe"])
def test_amax_history_and_losses_of_a_resumed_run(tmp_path: Path, way: str) -> None:
    import torch

    from nemo_fp8_recipes.callbacks.bridge import Fp8Callback, mixed_precision
    from tests.frameworks.bridge.jobs import MODULES, job, run

    hidden = {} if way == "config" else {"reduce_amax": False}

    def go(directory: Path, steps: int, checkpoints: Path | None) -> tuple:
        callback = Fp8Callback(directory, log_every=1)
        recipe = mixed_precision("delayed", amax_history_len=4, **hidden)
        seen = run(job(recipe, steps=steps, checkpoints=checkpoints), callback)
        assert callback.way == way
        return seen, callback

    whole, _ = go(tmp_path / "whole", 6, None)
    first, _ = go(tmp_path / "parts", 3, tmp_path / "checkpoints")
    second, _ = go(tmp_path / "parts", 6, tmp_path / "checkpoints")

    assert first.losses + second.losses == whole.losses
    assert set(second.first_state) == set(MODULES)
    for path in MODULES:
        for restored, saved in zip(second.first_state[path], first.last_state[path], strict=True):
            assert torch.equal(restored, saved)
            assert saved.abs().sum() > 0
    rows = {
        name: {
            (row["step"], row["module"], row["tensor"], row["stat"]): row["value"]
            for row in store.read(tmp_path / name).to_pylist()
        }
        for name in ("whole", "parts")
    }
    assert {step for step, *_ in rows["parts"]} == {1, 2, 3, 4, 5, 6}
    assert rows["parts"] == rows["whole"]
