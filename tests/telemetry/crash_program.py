"""Kills a writer of telemetry at random moments and checks what is left; run as a process of its own.

`python -m tests.telemetry.crash_program DIRECTORY ROUNDS SEED`: in each round a forked child resumes the run
and writes steps through the sinks until it is killed with SIGKILL. It says in a pipe which steps were
flushed. There are more rounds, up to five times as many, until moments of every kind were met: how far a
child gets is the machine's doing. Prints one JSON line of what was seen.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks import build
from nemo_fp8_recipes.telemetry.store.lines import read_lines
from tests.telemetry.examples import METADATA, step

FLUSH_EVERY = 3


def values(number: int) -> StepValues:
    made = step(number, window=3 if number % 2 else 0)
    if number % 7:
        return made
    alert = Alert(number, "mine", "warn", "text", "m", "input", 1.0, (("m", "input"),))
    return StepValues(made.step, made.series, made.values, made.windows, (alert,))


def write_until_killed(run_dir: Path, resume_at: int, pipe: int) -> None:
    sinks = build(["parquet", "jsonl"], run_dir, METADATA)
    for sink in sinks:
        sink.truncate_after(resume_at)
    os.write(pipe, f"{resume_at}\n".encode())
    number = resume_at
    while True:
        number += 1
        for sink in sinks:
            sink.values(values(number))
        if number % FLUSH_EVERY == 0:
            for sink in sinks:
                sink.flush()
            os.write(pipe, f"{number}\n".encode())


def check(run_dir: Path, flushed: int) -> int:
    """The last step in the store, after comparing all rows with what was written."""
    found: dict[tuple[int, str, str, str], object] = {}
    for row in store.read(run_dir).to_pylist():
        key = (row["step"], row["module"], row["tensor"], row["stat"])
        assert key not in found, f"twice: {key}"
        found[key] = row["value"] if row["values"] is None else row["values"]
    last = (store.steps(run_dir) or (0, 0))[1]
    assert last >= flushed, f"step {flushed} was flushed, and the store ends at {last}"
    wanted: dict[tuple[int, str, str, str], object] = {}
    for number in range(1, last + 1):
        made = values(number)
        for name, value in zip(made.series, made.values, strict=True):
            wanted[number, name.module, name.tensor, name.stat] = float(value)
        for name, window in made.windows.items():
            wanted[number, name.module, name.tensor, name.stat] = window.tolist()
    assert found == wanted, f"{len(found)} rows instead of {len(wanted)} up to step {last}"
    alerts = [alert.step for alert in store.read_alerts(run_dir)]
    assert alerts == sorted(set(alerts)), alerts
    assert [number for number in alerts if number <= last] == list(range(7, last + 1, 7)), (alerts, last)
    lines = [row["step"] for row in read_lines(run_dir / "telemetry" / "values.jsonl")]
    assert lines == list(range(1, len(lines) + 1)), lines[-5:]
    return last


def main(run_dir: Path, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    for sink in build(["parquet", "jsonl"], run_dir, METADATA):  # what it imports, every child has
        sink.close()
    last, merged, leftovers = 0, 0, 0
    for number in range(5 * rounds):
        if number >= rounds and merged and leftovers:
            break
        resume_at = chance.randint(max(0, last - 5), last)
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            write_until_killed(run_dir, resume_at, write_end)
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            # The first line says that it has resumed: what it truncated is gone.
            flushed = [int(pipe.readline()) for _ in range(chance.randint(1, 12))]
            time.sleep(chance.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            flushed += [int(line) for line in pipe.read().split("\n")[:-1]]
        leftovers += len(list((run_dir / "telemetry").glob(".*")))
        last = check(run_dir, flushed[-1])
        merged += sum(part.last - part.first > FLUSH_EVERY for part in store.parts(run_dir))
    print(json.dumps({"steps": last, "merged": merged, "leftovers": leftovers}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
