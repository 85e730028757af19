"""The store: what is written is read back, nothing twice, and no crash leaves half of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_fp8_recipes.errors import ReportError
from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.series import Series, StepValues
from nemo_fp8_recipes.telemetry.store import StoreWriter
from nemo_fp8_recipes.telemetry.store import merge as merge_module
from nemo_fp8_recipes.telemetry.store import writer as writer_module
from nemo_fp8_recipes.telemetry.store.table import NAMES
from tests.telemetry.examples import METADATA, step, write_version_1

ROOT = Path(__file__).parents[2]


def rows(table: pa.Table) -> dict[tuple[int, str, str, str], float | list[float]]:
    """(step, module, tensor, stat) -> value or window; fails on a row that is there twice."""
    found: dict[tuple[int, str, str, str], float | list[float]] = {}
    for row in table.to_pylist():
        key = (row["step"], row["module"], row["tensor"], row["stat"])
        assert key not in found
        found[key] = row["value"] if row["values"] is None else row["values"]
    return found


def expected(*steps: StepValues) -> dict[tuple[int, str, str, str], float | list[float]]:
    found: dict[tuple[int, str, str, str], float | list[float]] = {}
    for values in steps:
        for s, value in zip(values.series, values.values, strict=True):
            found[values.step, s.module, s.tensor, s.stat] = float(value)
        for s, window in values.windows.items():
            found[values.step, s.module, s.tensor, s.stat] = window.tolist()
    return found


def write(run_dir: Path, *numbers: int, window: int = 0) -> StoreWriter:
    writer = StoreWriter(run_dir, METADATA)
    writer.write([step(number, window=window) for number in numbers])
    return writer


def test_what_was_written_is_read_back_exactly(tmp_path: Path) -> None:
    write(tmp_path, 1, 10, 20, window=5)
    table = store.read(tmp_path)
    assert table.schema.equals(store.SCHEMA)
    assert rows(table) == expected(*(step(n, window=5) for n in (1, 10, 20)))


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    values = np.asarray([np.nan, np.inf, -np.inf, 1e-45, 3.4028235e38, -0.0], dtype=np.float32)
    names = tuple(Series("m", "input", f"s{i}", "delayed", "e4m3") for i in range(len(values)))
    StoreWriter(tmp_path, METADATA).write([StepValues(1, names, values)])
    back = {row["stat"]: np.float32(row["value"]) for row in store.read(tmp_path).to_pylist()}
    for name, value in zip(names, values, strict=True):
        assert back[name.stat].tobytes() == value.tobytes() or np.isnan(back[name.stat]) == np.isnan(value)
        assert np.signbit(back[name.stat]) == np.signbit(value)


def test_a_nan_value_is_not_a_missing_one(tmp_path: Path) -> None:
    names = (Series("m", "input", "amax", "delayed", "e4m3"),)
    StoreWriter(tmp_path, METADATA).write([StepValues(1, names, np.asarray([np.nan], dtype=np.float32))])
    assert store.read(tmp_path).column("value").null_count == 0


def test_filters_choose_series_and_steps(tmp_path: Path) -> None:
    write(tmp_path, 1, 10).write([step(20), step(30)])
    table = store.read(
        tmp_path, "decoder.layers.1.mlp.linear_fc1", ["weight"], "scale", first_step=10, last_step=20
    )
    assert [(row["step"], row["tensor"], row["stat"]) for row in table.to_pylist()] == [
        (10, "weight", "scale"),
        (20, "weight", "scale"),
    ]


def test_an_absent_store_is_empty(tmp_path: Path) -> None:
    assert store.read(tmp_path).num_rows == 0
    assert store.steps(tmp_path) is None
    assert store.info(tmp_path) == {}


def test_the_files_say_what_they_are(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    assert store.info(tmp_path) == {"schema_version": 2, **METADATA}
    assert [part.path.name for part in store.parts(tmp_path)] == ["steps-0000000001-0000000010.parquet"]


@pytest.mark.parametrize("after", [0, 5, 10, 15, 20, 35, 99])
def test_truncation_leaves_the_steps_up_to_it(tmp_path: Path, after: int) -> None:
    write(tmp_path, 1, 10, 20).write([step(30), step(40)])
    writer = StoreWriter(tmp_path, METADATA)
    writer.truncate_after(after)
    kept = [n for n in (1, 10, 20, 30, 40) if n <= after]
    assert rows(store.read(tmp_path)) == expected(*(step(n) for n in kept))
    assert store.steps(tmp_path) == ((kept[0], kept[-1]) if kept else None)


def test_a_resumed_run_has_no_gap_and_no_duplicate(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30, 40)
    resumed = StoreWriter(tmp_path, METADATA)
    resumed.truncate_after(25)
    resumed.write([step(30), step(40), step(50)])
    assert rows(store.read(tmp_path)) == expected(*(step(n) for n in (10, 20, 30, 40, 50)))


def test_truncation_that_crashed_half_way_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = write(tmp_path, 10, 20, 30)
    unlink = Path.unlink

    def crash(path: Path, **keywords: bool) -> None:
        if path.suffix == ".parquet":
            raise KeyboardInterrupt
        unlink(path, **keywords)

    monkeypatch.setattr(Path, "unlink", crash)
    with pytest.raises(KeyboardInterrupt):
        writer.truncate_after(20)
    monkeypatch.undo()
    # The old part still covers everything, so the store reads as before.
    assert rows(store.read(tmp_path)) == expected(step(10), step(20), step(30))
    StoreWriter(tmp_path, METADATA).truncate_after(20)
    assert rows(store.read(tmp_path)) == expected(step(10), step(20))


def test_many_small_files_are_merged_without_changing_a_row(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, METADATA)
    steps = [step(n, window=3) for n in range(1, 41)]
    for values in steps:
        writer.write([values])
        writer.compact()
    assert len(list((tmp_path / "telemetry").iterdir())) < 20
    assert rows(store.read(tmp_path)) == expected(*steps)
    first = (
        store.read(tmp_path, "decoder.layers.0.mlp.linear_fc1", "input", "amax").column("step").to_pylist()
    )
    assert first == sorted(first)


def test_parts_that_a_crashed_merge_left_are_not_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StoreWriter(tmp_path, METADATA)
    steps = [step(n) for n in range(1, 17)]
    for values in steps:
        writer.write([values])

    def crash(path: Path, **keywords: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", crash)
    with pytest.raises(KeyboardInterrupt):
        writer.compact()
    monkeypatch.undo()
    assert len(list((tmp_path / "telemetry").glob("*.parquet"))) == 17
    assert rows(store.read(tmp_path)) == expected(*steps)


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(pq.ParquetWriter):  # type: ignore[misc]  # pyarrow has no types
        def write_table(self, *_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

    writer = StoreWriter(tmp_path, METADATA)
    monkeypatch.setattr(writer_module.pq, "ParquetWriter", Full)
    with pytest.raises(OSError, match="No space left"):
        writer.write([step(1)])
    assert list((tmp_path / "telemetry").iterdir()) == []


def test_large_parts_are_merged_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "PIECE_ROWS", 20)
    monkeypatch.setattr(writer_module, "_ROW_GROUP_SIZES", (7, 11))
    writer = StoreWriter(tmp_path, METADATA)
    # Modules and statistics come and go; every other step has windows.
    steps = [step(n, layers=1 + n % 5, window=3 if n % 2 else 0) for n in range(1, 49)]
    for first in range(0, 48, 3):
        writer.write(steps[first : first + 3])
    writer.compact()
    assert len(store.parts(tmp_path)) == 1
    table = store.read(tmp_path)
    assert rows(table) == expected(*steps)
    keys = [tuple(row[name] for name in (*NAMES, "step")) for row in table.to_pylist()]
    assert keys == sorted(keys)
    assert len(list(merge_module.merged([store.parts(tmp_path)[0].path]))) > 1


def test_merging_starts_from_the_newest_and_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_MERGE", 3)
    monkeypatch.setattr(writer_module, "_SIMILAR", 2)
    writer = StoreWriter(tmp_path, METADATA)
    for number in range(1, 12):
        writer.write([step(number)])
    writer.compact()
    # Three of one step make one of three, and as the files are alike in size, so do three of those.
    assert [(part.first, part.last) for part in store.parts(tmp_path)] == [(1, 11)]
    assert rows(store.read(tmp_path)) == expected(*(step(n) for n in range(1, 12)))


@pytest.mark.parametrize("layout", ["v1", "v1 without statistics"])
def test_a_store_of_an_earlier_release_is_read(tmp_path: Path, layout: str) -> None:
    """Larger row groups, without statistics or with those of every column, and metadata of its own."""
    steps = [step(n, window=3) for n in (1, 2, 3)]
    write_version_1(tmp_path, steps, row_group_size=1 << 16, write_statistics=layout == "v1")
    StoreWriter(tmp_path, METADATA).write([step(4)])
    assert rows(store.read(tmp_path)) == expected(*steps, step(4))
    one = store.read(tmp_path, "decoder.layers.1.mlp.linear_fc1", "weight", "amax", first_step=2)
    assert one.column("step").to_pylist() == [2, 3, 4]


def test_one_series_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_ROW_GROUP_SIZES", (2, 2))
    StoreWriter(tmp_path, METADATA).write([step(1, layers=50)])
    asked: list[int] = []
    read = pq.ParquetFile.read_row_groups

    def counted(file: pq.ParquetFile, groups: list[int], **keywords: object) -> pa.Table:
        asked.extend(groups)
        return read(file, groups, **keywords)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    table = store.read(tmp_path, "decoder.layers.7.mlp.linear_fc1", "input", "amax")
    assert table.num_rows == 1
    assert len(asked) == 1
    # Names between which there are rows, but which are none themselves, and names behind the last one.
    for module in ("decoder.layers.7.mlp.linear_fc", "decoder.layers.7.mlp.linear_fc2", "a", "z"):
        assert store.read(tmp_path, module).num_rows == 0
    two = store.read(tmp_path, ["decoder.layers.49.mlp.linear_fc1", "decoder.layers.0.mlp.linear_fc1"])
    assert two.num_rows == 2 * 6
    assert store.read(tmp_path, stat="amax").num_rows == 50 * 3


def test_reading_goes_on_while_the_store_grows_and_merges(tmp_path: Path) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []
    seen: list[int] = []

    def reader() -> None:
        while not stop.is_set():
            try:
                found = rows(store.read(tmp_path, stat="amax"))
                seen.append(len(found))
            except BaseException as error:  # noqa: BLE001 - handed to the main thread
                failures.append(error)
                return

    thread = threading.Thread(target=reader)
    thread.start()
    writer = StoreWriter(tmp_path, METADATA)
    for number in range(1, 60):
        writer.write([step(number)])
        writer.compact()
    stop.set()
    thread.join()
    assert failures == []
    assert seen == sorted(seen)


def test_kill_at_any_moment_loses_the_unflushed_tail_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.telemetry.crash_program", str(tmp_path / "run"), "12", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    # The moments were of every kind: while a file was written, and after files had been merged.
    assert seen["steps"] > 50
    assert seen["merged"] > 0
    assert seen["leftovers"] > 0


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = store.parts(tmp_path)[0].path
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ReportError, match=path.name) as raised:
        store.read(tmp_path)
    assert ".." not in str(raised.value)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = store.parts(tmp_path)[0].path
    table = pq.read_table(path)
    key = b"nemo_fp8_recipes.telemetry"
    newer = table.schema.metadata[key].replace(b'"schema_version": 2', b'"schema_version": 3')
    pq.write_table(table.replace_schema_metadata({key: newer}), path)
    with pytest.raises(ReportError, match="schema version 3"):
        store.read(tmp_path)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "telemetry").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "telemetry" / "steps-0000000001-0000000001.parquet")
    with pytest.raises(ReportError, match="no telemetry"):
        store.read(tmp_path)


def test_a_value_takes_less_than_four_bytes(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, METADATA)
    generator = np.random.default_rng(0)
    names = tuple(
        Series(f"decoder.layers.{layer}.{module}", tensor, f"stat{index}", "delayed", "e4m3")
        for layer in range(16)
        for module in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
        for tensor in ("input", "weight", "grad_output")
        for index in range(12)
    )
    steps = [
        StepValues(n, names, np.exp(generator.standard_normal(len(names))).astype(np.float32))
        for n in range(1, 21)
    ]
    writer.write(steps)
    size = sum(path.stat().st_size for path in (tmp_path / "telemetry").iterdir())
    assert size / (len(steps) * len(names)) < 4.0
