"""What `nemo-fp8 train` leaves, without training.

python fake_train.py LOSS SECONDS STATUS train fp8_recipe=NAME ... run_dir='PATH'

writes a run of 20 steps whose loss lies LOSS above bf16's, taking SECONDS a step, and ends with STATUS.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_fp8_recipes.config import compose

STEPS = 20


def loss_of(step: int) -> float:
    return 5.0 - step / 10


def train(words: list[str], *, above: float, seconds: float = 0.0, status: int = 0) -> None:
    config = compose([word for word in words if not word.startswith("training.resume")])
    path = Path(config.run_dir)
    recipe = str(config.fp8_recipe.name)
    extra = 0.0 if recipe == "bf16" else above
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    record: dict[str, Any] = {
        "schema_version": 1,
        "status": "running",
        "overrides": words,
        "recipe": {"name": recipe},
        "device": "emulated b200",
        "started": "2026-01-01T10:00:00+00:00",
        "ended": None,
        "error": None,
        "result": None,
    }

    def write(**changes: Any) -> None:
        (path / "run.json").write_text(json.dumps(record | changes))

    def stop(number: int, _: Any) -> None:
        write(status="interrupted", error=f"stopped by signal {number}")
        sys.exit(128 + number)

    write()
    if seconds:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            step_time_ms = 900.0 if step < 3 else 20.0 if recipe == "bf16" else 30.0
            row = {"step": step, "loss": loss_of(step) + extra, "step_time_ms": step_time_ms}
            file.write(json.dumps(row) + "\n")
            file.flush()
            time.sleep(seconds)
    if status:
        write(status="failed", error="DivergedError: the loss is nan")
        sys.exit(status)
    write(status="finished", result={"held_out_loss": 3.5 + extra})
    print("fake run of", recipe)


if __name__ == "__main__":
    loss, pause, code = sys.argv[1:4]
    train(sys.argv[5:], above=float(loss), seconds=float(pause), status=int(code))
