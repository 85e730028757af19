"""`recipe_schedule`: the recipe changes while the job runs, and resuming inside it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

from tests.training.command import Run, train

DELAYED = ("fp8_recipe=delayed", "fp8_recipe.amax_history_len=4", "training.steps=8")
SPANS = (
    "recipe_schedule=[{recipe: bf16, to_step: 25%}, "
    "{recipe: {name: delayed, amax_history_len: 2}, from_step: 4, to_step: 6}]"
)


def recipes_found(run: Run) -> dict[int, tuple[str, int | None]]:
    """Step after which a manifest was read -> recipe and amax history length of the quantised modules."""
    found = {}
    for file in sorted((run.path / "manifests").glob("step_*.json")):
        rows = json.loads(file.read_text())["rows"]
        kinds = {
            (row["recipe"], row["input"] and row["input"]["amax_history_len"])
            for row in rows
            if row["module_class"].startswith("TE") and "Attention" not in row["module_class"]
        }
        (found[int(file.stem.removeprefix("step_"))],) = kinds
    return found


def test_a_job_stopped_inside_a_span_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *DELAYED, SPANS)
    assert recipes_found(whole) == {
        1: ("bf16", None),
        3: ("delayed", 4),
        4: ("delayed", 2),
        7: ("delayed", 4),
    }
    assert json.loads((whole.path / "manifest.json").read_text())["asked"] == "delayed"
    assert "bf16 in steps 1 to 2" in whole.output

    stopped = train(tmp_path / "run", *DELAYED, SPANS, "training.stop_at_step=5", "training.save_every=5")
    # What comes may be changed when a job goes on; here a last step in BF16 is added.
    resumed = train(stopped.path, *DELAYED, f"{SPANS[:-1]}, {{recipe: bf16, from_step: 8}}]", resume=True)
    assert resumed.losses[:7] == whole.losses[:7]
    assert recipes_found(resumed) == {**recipes_found(whole), 6: ("delayed", 2), 8: ("bf16", None)}

    # What was may not.
    changed = SPANS.replace("to_step: 6", "to_step: 4")
    refused = train(stopped.path, *DELAYED, changed, status=2, resume=True)
    assert "was trained with the recipe" in refused.errors
