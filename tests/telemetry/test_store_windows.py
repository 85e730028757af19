"""Windows in the store: only what is new is stored, and every one is read back whole, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_fp8_recipes.errors import ReportError
from nemo_fp8_recipes.telemetry import store
from nemo_fp8_recipes.telemetry.rows import Rows
from nemo_fp8_recipes.telemetry.series import Series, StepValues
from nemo_fp8_recipes.telemetry.store import StoreWriter
from nemo_fp8_recipes.telemetry.store import windows as windows_module
from nemo_fp8_recipes.telemetry.store import writer as writer_module
from nemo_fp8_recipes.telemetry.store.windows import moved
from tests.telemetry.examples import METADATA, write_version_1

LENGTH = 16
MOVES = {
    "every update": lambda step, row: step,
    "ten updates": lambda step, row: 10 * step,
    "as many as there are": lambda step, row: LENGTH * step,
    "not at all": lambda step, row: 0,
    "each its own way": lambda step, row: (row + 1) * step,
    "now and then": lambda step, row: step // 3,
    "back": lambda step, row: (step * 7) % 5,
}


def names(count: int) -> tuple[Series, ...]:
    return tuple(
        Series(f"decoder.layers.{row}.fc", "input", "amax_history", "delayed", "e4m3") for row in range(count)
    )


def entries(count: int, seed: int = 0) -> np.ndarray:
    """fp32 (count, many), with runs of equal ones, zeros, NaN of several kinds and Inf."""
    generator = np.random.default_rng(seed)
    made = generator.choice(np.float32([0, 1, 1, 2, 2.5, 3, -0.0, np.inf, np.nan]), (count, 1 << 11))
    made[:, ::5] = generator.standard_normal((count, made[:, ::5].shape[1]))
    made.view(np.uint32)[:, ::31] = 0x7FC00001  # another NaN
    made[0] = 1  # a tensor that never changes
    made[1, :100] = 0  # one that began late
    return made


def steps(move: str, numbers: range, *, as_rows: bool, count: int = 4) -> list[StepValues]:
    stream, made = entries(count), []
    for number in numbers:
        starts = [MOVES[move](number, row) for row in range(count)]
        matrix = np.stack([stream[row, start : start + LENGTH] for row, start in enumerate(starts)])
        scalars = tuple(Series(one.module, one.tensor, "amax", "delayed", "e4m3") for one in names(count))
        windows = Rows(names(count), matrix) if as_rows else dict(zip(names(count), matrix, strict=True))
        made.append(StepValues(number, scalars, matrix[:, -1].copy(), windows))
    return made


def bits(table: pa.Table) -> dict[tuple[int, str], bytes]:
    """Step and module -> the window."""
    chosen = [row for row in table.to_pylist() if row["values"] is not None]
    found = {(row["step"], row["module"]): np.float32(row["values"]).tobytes() for row in chosen}
    assert len(found) == len(chosen)
    return found


def wanted(*made: StepValues) -> dict[tuple[int, str], bytes]:
    # By way of Python's numbers, as they are read: those know one NaN.
    return {
        (one.step, name.module): np.float32(window.tolist()).tobytes()
        for one in made
        for name, window in one.windows.items()
    }


def stored(run_dir: Path) -> int:
    """Entries in all files."""
    tables = [pq.read_table(part.path) for part in store.parts(run_dir)]
    return sum(len(chunk.flatten()) for table in tables for chunk in table.column("newest").chunks)


def brute_force(old: np.ndarray, new: np.ndarray) -> int | None:
    if len(old) != len(new):
        return None
    for behind in range(len(new)):
        if new[: len(new) - behind].tobytes() == old[behind:].tobytes():
            return behind
    return None


def test_the_fewest_new_entries_are_found() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        length, values = generator.integers(1, 9), generator.integers(1, 4)
        stream = generator.integers(0, values + 1, 20).astype(np.float32)
        start, move = generator.integers(0, 4), generator.integers(0, 8)
        old = stream[start : start + length]
        new = stream[start + move : start + move + length].copy()
        if generator.random() < 0.3:
            new[generator.integers(0, length)] = 9
        expected = brute_force(old, new)
        assert moved(old.tobytes(), new.tobytes(), guess=length) == expected
        guess = int(generator.integers(0, 4))
        by_guess = moved(old.tobytes(), new.tobytes(), guess)
        assert by_guess == expected or (
            by_guess == guess and new[: length - guess].tobytes() == old[guess:].tobytes()
        )
        found.append(expected)
    assert {None, 0, 1, 2, 3} <= set(found)


def test_entries_whose_bytes_look_like_another_one_between_two_are_no_place() -> None:
    old = np.asarray([0x00010001, 0x00010001], dtype=np.uint32)
    new = np.asarray([0x01000100, 0x01000100], dtype=np.uint32)
    assert moved(old.tobytes(), new.tobytes()) is None


def test_windows_of_other_lengths_and_empty_ones_have_nothing_in_common() -> None:
    assert moved(b"", b"") is None
    assert moved(bytes(8), bytes(12)) is None


@pytest.mark.parametrize("as_rows", [True, False])
@pytest.mark.parametrize("move", MOVES)
def test_windows_are_read_back_bit_for_bit(tmp_path: Path, move: str, as_rows: bool) -> None:
    made = steps(move, range(1, 25), as_rows=as_rows)
    writer = StoreWriter(tmp_path, METADATA)
    for begin in range(0, 24, 8):
        writer.write(made[begin : begin + 8])
    assert bits(store.read(tmp_path)) == wanted(*made)
    assert bits(store.read(tmp_path, first_step=6, last_step=19)) == wanted(*made[5:19])
    one = names(4)[2]
    assert bits(store.read(tmp_path, one.module, stat="amax_history", first_step=12)) == {
        key: value for key, value in wanted(*made[11:]).items() if key[1] == one.module
    }
    assert store.read(tmp_path, stat="amax").column("values").null_count == 24 * 4
    assert store.read(tmp_path).schema.equals(store.SCHEMA)


@pytest.mark.parametrize("as_rows", [True, False])
def test_only_what_is_new_is_stored_and_the_first_of_each_file_is_whole(
    tmp_path: Path, as_rows: bool
) -> None:
    made = steps("every update", range(1, 21), as_rows=as_rows)
    writer = StoreWriter(tmp_path, METADATA)
    writer.write(made[:10])
    writer.write(made[10:])
    whole, new = 2 * 4 * LENGTH, 2 * 9 * 4
    assert stored(tmp_path) <= whole + new  # less: a tensor that does not change has nothing new
    for part in store.parts(tmp_path):
        rows = pq.read_table(part.path).to_pylist()
        first = [row for row in rows if row["stat"] == "amax_history" and row["step"] == part.first]
        assert [(row["since"], len(row["newest"])) for row in first] == [(None, LENGTH)] * 4
        others = [row for row in rows if row["stat"] == "amax_history" and row["step"] != part.first]
        assert all(row["since"] == row["step"] - 1 for row in others)


def test_gradient_accumulation_moves_some_windows_further_than_others(tmp_path: Path) -> None:
    made = steps("each its own way", range(1, 12), as_rows=True)
    StoreWriter(tmp_path, METADATA).write(made)
    assert stored(tmp_path) <= 4 * LENGTH + 10 * (1 + 2 + 3 + 4)
    assert bits(store.read(tmp_path)) == wanted(*made)


def test_a_window_of_another_length_is_whole(tmp_path: Path) -> None:
    name, stream = names(1)[0], np.arange(100, dtype=np.float32)
    made = [
        StepValues(step, (), np.zeros(0, np.float32), {name: stream[step : step + length]})
        for step, length in ((1, 4), (2, 4), (3, 6), (4, 6), (5, 4), (6, 1), (7, 1))
    ]
    StoreWriter(tmp_path, METADATA).write(made)
    assert bits(store.read(tmp_path)) == wanted(*made)
    rows = pq.read_table(store.parts(tmp_path)[0].path).to_pylist()
    assert [row["since"] for row in rows] == [None, 1, None, 3, None, None, None]


def test_series_come_and_go(tmp_path: Path) -> None:
    made = []
    for one in steps("every update", range(1, 13), as_rows=True):
        kept = [row for row in range(4) if (one.step + row) % 3]
        matrix = one.windows.matrix[kept]  # type: ignore[attr-defined]  # Rows
        made.append(
            StepValues(
                one.step, (), np.zeros(0, np.float32), Rows(tuple(names(4)[row] for row in kept), matrix)
            )
        )
    StoreWriter(tmp_path, METADATA).write(made)
    assert bits(store.read(tmp_path)) == wanted(*made)
    rows = pq.read_table(store.parts(tmp_path)[0].path).to_pylist()
    assert sum(row["since"] is None for row in rows) == 4  # a row continues the last one there was


def test_merged_files_continue_across_what_were_their_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_MERGE", 4)
    monkeypatch.setattr(writer_module, "_ROW_GROUP_SIZES", (7, 7))  # a series is in several row groups
    made = steps("every update", range(1, 33), as_rows=True)
    writer = StoreWriter(tmp_path, METADATA)
    for begin in range(0, 32, 2):
        writer.write(made[begin : begin + 2])
        writer.compact()
        assert bits(store.read(tmp_path)) == wanted(*made[: begin + 2])
    files = len(store.parts(tmp_path))
    assert files <= 4
    assert stored(tmp_path) <= files * 4 * LENGTH + 31 * 4
    assert bits(store.read(tmp_path, names(4)[1].module, first_step=20)) == {
        key: value for key, value in wanted(*made[19:]).items() if key[1] == names(4)[1].module
    }


@pytest.mark.parametrize("after", [1, 5, 10, 13])
def test_a_resumed_run_goes_on_with_whole_windows(tmp_path: Path, after: int) -> None:
    made = steps("every update", range(1, 17), as_rows=True)
    writer = StoreWriter(tmp_path, METADATA)
    writer.write(made[:10])
    writer.write(made[10:13])
    resumed = StoreWriter(tmp_path, METADATA)
    resumed.truncate_after(after)
    assert bits(store.read(tmp_path)) == wanted(*made[:after])
    resumed.write(made[after:])
    assert bits(store.read(tmp_path)) == wanted(*made)


def test_files_of_version_1_are_read_merged_and_truncated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_MERGE", 4)
    monkeypatch.setattr(writer_module, "_SIMILAR", 1000)
    made = steps("every update", range(1, 9), as_rows=True)
    write_version_1(tmp_path, made[:3])
    write_version_1(tmp_path, made[3:4])
    writer = StoreWriter(tmp_path, METADATA)
    writer.write(made[4:6])
    assert bits(store.read(tmp_path)) == wanted(*made[:6])
    writer.truncate_after(2)
    assert bits(store.read(tmp_path)) == wanted(*made[:2])
    for one in made[2:8]:
        writer.write([one])
    write_version_1(tmp_path, made[2:3])  # which is one of them, as it was
    writer.compact()
    assert bits(store.read(tmp_path)) == wanted(*made)
    assert store.info(tmp_path)["schema_version"] == 2
    assert stored(tmp_path) < 8 * 4 * LENGTH / 2


def test_a_window_that_continues_nothing_is_an_error_and_never_another_window(tmp_path: Path) -> None:
    made = steps("every update", range(1, 9), as_rows=True)
    StoreWriter(tmp_path, METADATA).write(made)
    path = store.parts(tmp_path)[0].path
    table = pq.read_table(path)
    for gone in (1, 4, 7):
        kept = table.filter(pa.compute.field("step") != gone)
        pq.write_table(kept.replace_schema_metadata(table.schema.metadata), path)
        with pytest.raises(ReportError, match=f"step {gone + 1} continues that of step {gone}"):
            store.read(tmp_path)
    for order in itertools.islice(itertools.permutations(range(3)), 1, 6):
        shuffled = table.slice(0, 0)
        parts = [table.slice(begin, length) for begin, length in ((0, 10), (10, 30), (40, 24))]
        shuffled = pa.concat_tables([parts[place] for place in order])
        pq.write_table(shuffled.replace_schema_metadata(table.schema.metadata), path)
        try:
            found = bits(store.read(tmp_path))
        except ReportError:
            continue
        assert found == wanted(*made)


def test_many_windows_are_given_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = steps("every update", range(1, 9), as_rows=True)
    StoreWriter(tmp_path, METADATA).write(made)
    default = windows_module.whole
    monkeypatch.setattr(
        "nemo_fp8_recipes.telemetry.store.reader.whole", lambda *given: default(*given, most=3 * LENGTH)
    )
    table = store.read(tmp_path)
    assert table.column("values").num_chunks > 5
    assert bits(table) == wanted(*made)
