"""docs/bridge.md and examples/pretrain_bridge.py do what they say, line by line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.processes import environment

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[3]
GUIDE = ROOT / "docs" / "bridge.md"
EXAMPLE = ROOT / "examples" / "pretrain_bridge.py"


def test_the_guides_lines_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace that has what a script has before them: cfg, forward_step, pretrain."""
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from tests.frameworks.bridge.jobs import job

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names = {"cfg": job("bf16_mixed", steps=2), "forward_step": forward_step, "pretrain": pretrain}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    callback = names["callback"]
    assert {row.recipe for row in callback.manifest.quantized()} == {"delayed"}
    assert callback.way == "config"
    assert (tmp_path / "runs/mine/manifest.json").exists()
    assert list((tmp_path / "runs/mine/telemetry").glob("*.parquet"))


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(EXAMPLE),
            "fp8_recipe=mxfp8",
            "--",
            "train.train_iters=12",
            "model.num_layers=3",
        ],
        cwd=tmp_path,
        env=environment({"PYTHONPATH": str(ROOT)}),  # without what other jobs of this process have set
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mxfp8 on emulated b200" in done.stdout
    assert "12 of 16 modules quantised by mxfp8" in " ".join(done.stdout.split())
    assert "the recipe came in by config" in done.stdout
    losses = [float(loss) for loss in re.findall(r"lm loss: ([\d.E+-]+)", done.stdout)]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert list((tmp_path / "runs/example-bridge/telemetry").glob("*.parquet"))
