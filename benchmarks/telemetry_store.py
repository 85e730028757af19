"""How fast the telemetry store is written, how large it gets, how fast one series is read back.

    python benchmarks/telemetry_store.py                  # 500 logged steps, about a minute
    python benchmarks/telemetry_store.py --steps 10000    # a whole run of 138 million values, some minutes

The values are those of a model of 96 layers, each with 4 linears of 3 tensors of 12 statistics, written as
the recorder does: the Parquet sink gets one step after the other and is flushed every
`telemetry.flush_every` of them. "realistic" values are an amax that drifts slowly, in the steps of BF16, what
follows from it (scales, powers of two, constants) and noisy fractions; "random" values are random bits, which
cannot be compressed at all. The time to make the values is not counted.

Side by side in the same run: the same values of each flush written by pyarrow alone with its defaults, as one
table of step, name and value in the order in which they come. On a machine that does other things too, the
rate per second of processor time says more than that per second.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.series import TENSORS, Series, StepValues
from nemo_fp8_recipes.telemetry.sinks.parquet import ParquetSink

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
STATS = ("amax", "scale", "scale_next", "headroom", "scale_inv_min", "scale_inv_max", "scale_inv_mean",
         "underflow", "saturation", "zeros", "sqnr", "relative_error")  # fmt: skip


def series(layers: int) -> tuple[Series, ...]:
    return tuple(
        Series(f"decoder.layers.{layer}.{linear}", tensor, stat, "delayed", "e4m3")
        for layer in range(layers)
        for linear in LINEARS
        for tensor in TENSORS
        for stat in STATS
    )


def realistic(operands: int, steps: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """fp32 (12 x operands,) of one step after the other."""
    log_amax = generator.uniform(-8, 4, operands)
    largest = np.zeros(operands, dtype=np.float32)
    for _ in range(steps):
        log_amax += generator.normal(0, 0.01, operands)
        amax = (np.exp2(log_amax).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        largest = np.maximum(amax, largest * np.float32(0.999))
        scale = np.float32(448) / largest
        block = np.exp2(np.ceil(np.log2(amax / 448))).astype(np.float32)
        columns = (
            amax, scale, scale, largest / amax, block / 32, block,
            block * generator.uniform(0.2, 0.3, operands), generator.uniform(0, 1e-3, operands),
            np.zeros(operands), np.full(operands, 1e-4),
            generator.normal(30, 0.2, operands), generator.normal(0.025, 0.001, operands),
        )  # fmt: skip
        yield np.stack(columns, axis=1).astype(np.float32).reshape(-1)


def random_bits(operands: int, steps: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    for _ in range(steps):
        yield generator.integers(0, 1 << 32, 12 * operands, dtype=np.uint32).view(np.float32)


class Written(NamedTuple):
    """How long it took: seconds that the training waits, seconds in all, of a processor, and of the peer."""

    values: int
    waited: float
    total: float
    processor: float
    peer: float


def write(path: Path, names: tuple[Series, ...], steps: Iterator[np.ndarray], flush_every: int) -> Written:
    sink = ParquetSink(path, {"recipe": {"name": "delayed"}})
    waited = total = processor = peer = 0.0
    count = 0
    held: list[np.ndarray] = []
    for values in steps:
        count += 1
        held.append(values)
        before, cpu = time.perf_counter(), time.process_time()
        sink.values(StepValues(10 * count, names, values))
        if count % flush_every == 0:
            sink.flush()
            waited += time.perf_counter() - before
            sink._finish_merging()  # so that what merging costs is counted, and beside nothing else
        total += time.perf_counter() - before
        processor += time.process_time() - cpu
        if count % flush_every == 0:
            before = time.perf_counter()
            plain(path.parent / "plain.parquet", names, held, count)
            peer += time.perf_counter() - before
            held = []
    before, cpu = time.perf_counter(), time.process_time()
    sink.close()
    total += time.perf_counter() - before
    processor += time.process_time() - cpu
    return Written(count * len(names), waited, total, processor, peer)


def plain(path: Path, names: tuple[Series, ...], held: list[np.ndarray], count: int) -> None:
    tags = pa.array([one.tag for one in names])
    codes = pa.array(np.tile(np.arange(len(names), dtype=np.int32), len(held)))
    columns = {
        "step": np.repeat(np.arange(count - len(held), count, dtype=np.int64), len(names)),
        "name": pa.DictionaryArray.from_arrays(codes, tags),
        "value": np.concatenate(held),
    }
    pq.write_table(pa.table(columns), path)


def read(path: Path, names: tuple[Series, ...], expected: int, generator: np.random.Generator) -> list[float]:
    """Seconds to read each of some series."""
    seconds = []
    for index in generator.integers(0, len(names), 15):
        one = names[index]
        before = time.perf_counter()
        table = store.read(path, one.module, one.tensor, one.stat)
        seconds.append(time.perf_counter() - before)
        assert table.num_rows == expected
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="logged steps (10000: the full size)")
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--flush-every", type=int, default=10, help="as telemetry.flush_every")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--kinds", nargs="+", choices=("realistic", "random"), default=["realistic", "random"]
    )
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary directory")
    arguments = parser.parse_args()
    names = series(arguments.layers)
    print(f"{len(names):,} series x {arguments.steps:,} steps = {len(names) * arguments.steps:,} values, "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for kind in arguments.kinds:
        rates, cpu_rates, ratios, reads, sizes = [], [], [], [], []
        for number in range(arguments.runs):
            top = Path(tempfile.mkdtemp(dir=arguments.directory))
            try:
                make = realistic if kind == "realistic" else random_bits
                made = make(len(names) // 12, arguments.steps, np.random.default_rng(number))
                done = write(top / "run", names, made, arguments.flush_every)
                rates.append(done.values / done.total / 1e6)
                cpu_rates.append(done.values / done.processor / 1e6)
                ratios.append(done.total / done.peer)
                files = list((top / "run" / "telemetry").iterdir())
                sizes.append(sum(file.stat().st_size for file in files) / done.values)
                reads += read(top / "run", names, arguments.steps, np.random.default_rng(number))
                print(
                    f"  run {number + 1}: {done.total:.1f} s, of which training waits {done.waited:.1f} s "
                    f"and merging takes the rest; {len(files)} files"
                )
            finally:
                shutil.rmtree(top)
        print(f"{kind:<10}      {'min':>8} {'median':>8} {'max':>8}")
        for title, numbers in (
            ("M values/s", rates),
            ("M/s processor", cpu_rates),
            ("bytes/value", sizes),
            ("ms a series", [1e3 * one for one in reads]),
            ("x plain write", ratios),
        ):
            print(
                f"  {title:<13} {min(numbers):>8.2f} {statistics.median(numbers):>8.2f} {max(numbers):>8.2f}"
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"peak memory of this process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
