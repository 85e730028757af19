"""The emulated training step of the default model: every recipe against BF16 under the same stack.

    python benchmarks/emulated_step.py [--rounds 3] [--steps 16] [--threads N] [recipe ...] [-- overrides]

Each run is the job itself, `nemo-fp8 train`, in a process of its own; in a round the recipes take turns. A
run's time is the median of its steps after the first four (with one thread CPU time, which other programs
disturb less), its memory the largest resident set of those steps less that before the model was built (Linux
only). A ratio compares runs of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import ratio_table

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4")
WARM_UP = 4
RESULT = "@@measured "


def resident(field: str) -> float:
    """MiB of this process now (VmRSS) or at most since the last reset (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}: the benchmark runs on Linux only.")


def worker(arguments: list[str]) -> int:
    """Run `nemo-fp8 train` here and print what its steps cost."""
    from nemo_fp8_recipes import cli
    from nemo_fp8_recipes.training import job

    start, seconds, memory = job.start, [], {}
    clock = time.process_time if os.environ["OMP_NUM_THREADS"] == "1" else time.perf_counter

    def started(config):  # what is measured begins where the stack is in place
        begun = start(config)
        from nemo_fp8_recipes.training.session import Trainer, _Session

        step, build = Trainer._step, _Session._build

        def measured_build(self, *positional, **named):
            memory["before"] = resident("VmRSS")
            return build(self, *positional, **named)

        def measured_step(self, *positional, **named):
            if len(seconds) == WARM_UP:
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            begin = clock()
            done = step(self, *positional, **named)
            seconds.append(clock() - begin)
            memory["peak"] = resident("VmHWM")
            return done

        Trainer._step, _Session._build = measured_step, measured_build
        return begun

    job.start = started
    status = cli.main(["train", *arguments])
    if status == 0:
        result = {
            "seconds": statistics.median(seconds[WARM_UP:]),
            "mebibytes": memory["peak"] - memory["before"],
        }
        print(RESULT + json.dumps(result))
    return status


def run(recipe: str, steps: int, threads: int, overrides: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--worker", f"fp8_recipe={recipe}", f"training.steps={steps}"]
        command += [
            "training.eval_batches=0",
            "telemetry.enabled=false",
            f"run_dir={directory}/run",
            *overrides,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith(RESULT))
    measured: dict[str, float] = json.loads(line.removeprefix(RESULT))
    return measured


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2:])
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="recipe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="steps of a run, four of them not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(sys.argv[1:split])
    overrides = sys.argv[split + 1 :]
    seconds: dict[str, list[float]] = {name: [] for name in ("bf16", *options.recipes)}
    mebibytes: dict[str, list[float]] = {name: [] for name in seconds}
    for number in range(options.rounds):
        for recipe in seconds:
            measured = run(recipe, options.steps, options.threads, overrides)
            seconds[recipe].append(measured["seconds"])
            mebibytes[recipe].append(measured["mebibytes"])
            print(
                f"round {number + 1}/{options.rounds} {recipe}: {measured['seconds'] * 1e3:.0f} ms, "
                f"{measured['mebibytes']:.0f} MiB",
                file=sys.stderr,
            )
    print(f"{options.threads} thread(s), {options.rounds} rounds of {options.steps} steps")
    print(ratio_table("\ntime of a step", seconds, against="bf16", unit="ms", scale=1e3))
    print(ratio_table("\npeak memory of a step", mebibytes, against="bf16", unit="MiB"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
