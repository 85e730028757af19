"""What telemetry adds to the emulated training step of the default model, beside nvdlfw-inspect.

    python benchmarks/telemetry_overhead.py [--rounds 5] [--steps 40] [--recipe mxfp8] [-- overrides]

Each run is the job itself, `nemo-fp8 train`, in a process of its own, on one thread and in CPU time, which
other programs disturb less than the clock on the wall. Each tier has a run: in it steps without telemetry
and steps with the tier take turns; their times are the medians. Handing a step's values to the sinks is
counted to that step. Beside it stands the CPU time inside telemetry's own code, which is less noisy than a
difference of steps. It is the sum of

- the mean of the recorder's calls, with what it does in every step, logging or not, such as handing the loss
  to TensorBoard;
- the share of a logging step in the median writing of files, which comes every tenth of them;
- the median of what stands around Transformer Engine's quantising functions. The clocks around these
  functions are there in the steps without telemetry too, and what they take themselves is not counted.

In a run of its own, nvdlfw-inspect (`pip install -r requirements/benchmarks.txt`) logs Transformer Engine's
LogFp8TensorStats for the same operands in every step: underflows%, scale_inv_min, scale_inv_max and mse. For
nvfp4, which that does not know, it is LogNvfp4TensorStats, whose statistics are underflows% and mse. What it
adds is compared with what the stats tier adds, whose statistics include those and are more.

Emulated kernels are slow, and so is a step: shares of it say little about a GPU, where launches and waiting
count. Those are what tests/telemetry asserts.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

TIERS = ("cheap", "stats")
WARM_UP = 24
"""Steps that are not measured: by then every sink was flushed once, which imports and opens things."""
FLUSH_EVERY = 10
RESULT = "@@measured "
FEATURES = """
telemetry_overhead:
  enabled: true
  layers: {{layer_name_regex_pattern: .*}}
  transformer_engine:
    {feature}:
      enabled: true
      tensors: [activation, gradient, weight]
      stats: [{stats}]
      freq: 1
"""


def worker(contender: str, arguments: list[str]) -> int:
    """Run `nemo-fp8 train` here and print what its steps cost."""
    from nemo_fp8_recipes import cli
    from nemo_fp8_recipes.training import job

    start = job.start
    seconds: dict[str, list[float]] = defaultdict(list)
    inside: dict[str, list[float]] = defaultdict(list)
    around: dict[str, list[float]] = defaultdict(list)
    written: list[float] = []

    def started(config):  # what is measured begins where the stack is in place
        begun = start(config)
        from nemo_fp8_recipes.telemetry.recorder import Recorder
        from nemo_fp8_recipes.telemetry.seam import QUANTISING, BindingSeam
        from nemo_fp8_recipes.telemetry.sinks.guard import GuardedSink
        from nemo_fp8_recipes.training.trainer import Trainer

        end_of_step = _inspect("fp8_recipe=nvfp4" in arguments) if contender == "inspect" else None
        step = Trainer._step
        spent, writing = [0.0], [0.0]

        def tier(number: int) -> str:
            return contender if contender in TIERS and number % 2 else "none"

        def timed(method):
            def call(*positional, **named):
                begin = time.process_time()
                try:
                    return method(*positional, **named)
                finally:
                    spent[0] += time.process_time() - begin

            return call

        hooks, theirs = [0.0], [0.0]  # seconds in the functions that quantise, and of these in the originals
        guarded = BindingSeam._guarded

        def timed_guard(self, original, wrapper):
            inner = clocked(original, theirs)
            return clocked(guarded(self, inner, wrapper) if wrapper is not bare else inner, hooks)

        def bare(original):
            return original

        BindingSeam._guarded = timed_guard
        clocks = BindingSeam(dict.fromkeys(QUANTISING, bare), {})
        Recorder.logs = lambda _, number: tier(number) != "none"
        Recorder.reads_tensors = lambda _, number: tier(number) == "stats"
        begin_step, end_step, deliver = Recorder.begin_step, Recorder.end_step, Recorder._deliver
        Recorder.begin_step, Recorder.end_step = timed(begin_step), timed(end_step)
        flush = GuardedSink.flush

        def timed_flush(self):  # within what the recorder is called for, and told apart from it
            before = spent[0]
            timed(flush)(self)
            writing[0] += spent[0] - before
            spent[0] = before - (spent[0] - before)

        GuardedSink.flush = timed_flush

        def measured_step(self, position, *positional, **named):
            number = position.step + 1
            spent[0] = writing[0] = hooks[0] = theirs[0] = 0.0
            if contender in TIERS and tier(number) == "none":
                clocks.open()
            begin = time.process_time()
            done = step(self, position, *positional, **named)
            clocks.close()
            if self.fp8_run.recorder is not None:
                timed(deliver)(self.fp8_run.recorder)
            if end_of_step is not None:
                end_of_step()
            if number > WARM_UP:
                name = "inspect" if contender == "inspect" else tier(number)
                seconds[name].append(time.process_time() - begin)
                inside[name].append(spent[0])
                written.extend([writing[0]] if writing[0] else [])
                around[name].append(hooks[0] - theirs[0])
            return done

        Trainer._step = measured_step
        return begun

    job.start = started
    status = cli.main(["train", *arguments])
    if status == 0:
        result = {name: statistics.median(values) for name, values in seconds.items()}
        direct = {name: statistics.fmean(inside[name]) + statistics.median(around[name]) for name in inside}
        clocks = statistics.median(around["none"]) if "none" in around else 0.0
        share = statistics.median(written) / FLUSH_EVERY if written else 0.0
        direct = {name: value - clocks + (share if name != "none" else 0.0) for name, value in direct.items()}
        print(RESULT + json.dumps({"step": result, "inside": direct}))
    return status


def clocked(function, seconds: list[float]):
    """`function`, its time added to `seconds`. By the clock on the wall, which costs a fifth of a microsecond
    to read, where the CPU time costs as much as what is measured.
    """

    @functools.wraps(function)
    def call(*positional, **named):
        begin = time.perf_counter()
        try:
            return function(*positional, **named)
        finally:
            seconds[0] += time.perf_counter() - begin

    return call


def _inspect(nvfp4: bool):
    """Start nvdlfw-inspect with Transformer Engine's features; what to call after each step."""
    import nvdlfw_inspect.api as inspect
    import transformer_engine

    directory = Path(tempfile.mkdtemp())
    feature, stats = "LogFp8TensorStats", '"underflows%", scale_inv_min, scale_inv_max, mse'
    if nvfp4:
        feature, stats = "LogNvfp4TensorStats", '"underflows%", mse'
    (directory / "features.yaml").write_text(FEATURES.format(feature=feature, stats=stats))
    inspect.initialize(
        config_file=str(directory / "features.yaml"),
        feature_dirs=[str(Path(transformer_engine.__file__).parent / "debug" / "features")],
        log_dir=str(directory),
        default_logging_enabled=True,
    )
    return inspect.step


def run(contender: str, recipe: str, steps: int, overrides: list[str]) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--worker", contender]
        command += [f"fp8_recipe={recipe}", f"training.steps={steps}", "training.eval_batches=0"]
        command += [f"telemetry.flush_every={FLUSH_EVERY}"]
        command += [f"telemetry.enabled={contender in TIERS}", f"run_dir={directory}/run", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": directory}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith(RESULT))
    measured: dict[str, dict[str, float]] = json.loads(line.removeprefix(RESULT))
    return measured


def shown(values: list[float], *, scale: float = 1.0, unit: str = "") -> str:
    numbers = (min(values), statistics.median(values), max(values))
    return " / ".join(f"{number * scale:.2f}{unit}" for number in numbers)


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3:])
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="mxfp8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of a run, every second with the tier")
    parser.add_argument("--inspect-steps", type=int, default=8, help="of nvdlfw-inspect; 0: leave it out")
    options = parser.parse_args(sys.argv[1:split])
    overrides = sys.argv[split + 1 :]
    own: dict[str, list[dict[str, dict[str, float]]]] = defaultdict(list)
    peer = []
    for number in range(options.rounds):
        for name in TIERS:
            own[name].append(run(name, options.recipe, WARM_UP + options.steps, overrides))
        if options.inspect_steps:
            peer.append(run("inspect", options.recipe, WARM_UP + options.inspect_steps, overrides))
        print(f"round {number + 1}/{options.rounds} done", file=sys.stderr)
    print(f"{options.recipe}: minimum / median / maximum of {options.rounds} runs, one thread, CPU time")
    for name, interval in zip(TIERS, (1, 100), strict=True):
        base = [measured["step"]["none"] for measured in own[name]]
        added = [measured["step"][name] - measured["step"]["none"] for measured in own[name]]
        inside = [measured["inside"][name] for measured in own[name]]
        share = [part / whole / interval for part, whole in zip(added, base, strict=True)]
        inner = [part / whole / interval for part, whole in zip(inside, base, strict=True)]
        print(f"step without telemetry           {shown(base, scale=1e3, unit=' ms')}")
        print(f"{name} tier adds                  {shown(added, scale=1e3, unit=' ms')}")
        print(f"  of a step, every {interval:3} steps      {shown(share, scale=100, unit=' %')}")
        print(f"  inside telemetry               {shown(inside, scale=1e3, unit=' ms')}")
        print(f"    of a step                    {shown(inner, scale=100, unit=' %')}")
    if peer:
        base = [measured["step"]["none"] for measured in own["stats"]]
        added = [theirs["step"]["inspect"] - whole for theirs, whole in zip(peer, base, strict=True)]
        ours = [measured["step"]["stats"] - measured["step"]["none"] for measured in own["stats"]]
        ratio = [mine / its for mine, its in zip(ours, added, strict=True)]
        print(f"nvdlfw-inspect adds              {shown(added, scale=1e3, unit=' ms')}")
        print(f"  stats tier / nvdlfw-inspect    {shown(ratio)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
