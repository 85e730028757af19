"""How long `nemo-fp8 doctor` takes beside composing an empty Hydra configuration, both in fresh processes.

    python benchmarks/doctor_speed.py [--pairs 9]

Each pair runs one after the other; the ratios are of the CPU time (user and system) of the two processes,
which a busy machine disturbs less than wall time. The matrix of all models x recipes x GPUs is timed inside
one process, CPU time too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

EMPTY = """
import hydra
with hydra.initialize_config_dir(config_dir={directory!r}, version_base="1.3"):
    hydra.compose(config_name="config")
"""
DOCTOR = ("doctor", "fp8_recipe=mxfp8", "hardware=b200", "device=native")


def cpu_seconds(command: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of a process to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started


def spread(values: list[float]) -> str:
    return f"min {min(values):.2f}  median {statistics.median(values):.2f}  max {max(values):.2f}"


def matrix_seconds() -> tuple[float, int]:
    """CPU seconds for every model, recipe and GPU, and how many; composing the models is not counted."""
    from nemo_fp8_recipes import config, preflight, recipes
    from nemo_fp8_recipes.commands.doctor_matrix import matrix

    first = preflight.job_input(config.compose(["device=native"]), {}, emulated=False)
    jobs = []
    for name in config.options("model"):
        overrides = [f"model={name}", "parallel=published"]
        composed = preflight.job_input(config.compose(overrides), {}, emulated=False)
        jobs.append(replace(first, model=composed.model, parallel=composed.parallel))
    started = time.process_time()
    cells = sum(len(row) for job in jobs for row in matrix(job).values())
    assert len(jobs) * (len(recipes.names()) + len(recipes.presets())) < cells
    return time.process_time() - started, cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    empty, doctor, wall = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.yaml").write_text("key: value\n")
        commands = (
            [sys.executable, "-c", EMPTY.format(directory=directory)],
            [sys.executable, "-m", "nemo_fp8_recipes", *DOCTOR],
        )
        for command in commands:
            cpu_seconds(command)  # byte code and file cache
        for _ in range(pairs):
            empty.append(cpu_seconds(commands[0])[0])
            spent, took = cpu_seconds(commands[1])
            doctor.append(spent)
            wall.append(took)
    print(f"empty Hydra configuration, CPU s    {spread(empty)}")
    print(f"nemo-fp8 doctor, CPU s              {spread(doctor)}    (wall {spread(wall)})")
    print(
        f"ratio, pair by pair                 {spread([d / e for d, e in zip(doctor, empty, strict=True)])}"
    )
    runs = [matrix_seconds() for _ in range(3)]
    print(f"matrix of {runs[0][1]} cells, CPU s     {spread([seconds for seconds, _ in runs])}")


if __name__ == "__main__":
    main()
