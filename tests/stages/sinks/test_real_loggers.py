"""Sinks on the real libraries: W&B in offline mode, and Lightning's loggers."""

from __future__ import annotations

import csv
import dataclasses
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.telemetry.alerts.alert import Alert
from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks import GuardedSink, build
from tests.telemetry.examples import METADATA, step
from tests.telemetry.test_sinks import scalars

BLOCK, FULL, LAST = 1 << 15, 1, 4
ALERT = Alert(2, "saturation", "warn", "clipped: raise the margin", "m", "input", 4.0, (("m", "input"),))


def alerted(number: int) -> StepValues:
    return dataclasses.replace(step(number), alerts=(dataclasses.replace(ALERT, step=number),))


def expected(number: int) -> dict[str, float]:
    made = step(number)
    return {name.tag: float(value) for name, value in zip(made.series, made.values, strict=True)}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def wandb_records(directory: Path) -> list[Any]:
    """Everything in the file that W&B keeps of an offline run until it is synchronised. Its service writes
    it in a process of its own, and may be behind.
    """
    deadline = time.monotonic() + 60
    while True:
        records = _wandb_records(directory)
        if any(record.HasField("exit") for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.2)


def _wandb_records(directory: Path) -> list[Any]:
    """After a header of 7 bytes LevelDB's log format: blocks of 32 KiB of records, each with checksum, length
    and kind.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    data, position, whole, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if left < 7 or kind == 0:  # the rest of the block is filled up
            position += left
            continue
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            records.append(record)
            whole = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    """The rows that W&B draws curves of."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]


def test_a_wandb_run_of_our_own(tmp_path: Path) -> None:
    (sink,) = build(["wandb"], tmp_path / "run", METADATA)
    sink.metrics(1, {"loss": 5.5})
    sink.values(step(1))
    sink.values(alerted(2))
    sink.close()
    records = wandb_records(tmp_path / "run")
    rows = [row for row in history(records) if "fp8/step" in row]
    assert rows[0]["train/loss"] == 5.5
    assert {key: rows[1][key] for key in expected(1)} == expected(1)
    assert {key: rows[2][key] for key in expected(2)} == expected(2)
    assert [row["fp8/step"] for row in rows] == [1, 1, 2]
    assert rows[2]["alerts/saturation"] == 1
    (raised,) = [record.alert for record in records if record.HasField("alert")]
    assert (raised.title, raised.text) == ("FP8 saturation", "step 2: clipped: raise the margin")
    (run,) = [record.run for record in records if record.HasField("run")][:1]
    assert run.run_group == "run"
    assert any(item.key == "device" for item in run.config.update)


def test_the_wandb_run_of_the_job_keeps_its_steps(tmp_path: Path) -> None:
    import wandb

    run = wandb.init(project="mine", dir=str(tmp_path))
    (sink,) = build([run], tmp_path, METADATA)
    run.log({"mine": 1.0}, step=10)
    sink.values(step(10))
    run.log({"mine": 2.0}, step=11)
    sink.values(step(11))
    run.log({"mine": 3.0}, step=12)
    sink.close()
    run.finish()
    rows = [row for row in history(wandb_records(tmp_path)) if "mine" in row]
    assert [(row["_step"], row["mine"], row.get("fp8/step")) for row in rows] == [
        (10, 1.0, 10),
        (11, 2.0, 11),
        (12, 3.0, None),
    ]
    assert {key: rows[0][key] for key in expected(10)} == expected(10)


def test_the_module_wandb_is_what_megatron_calls_its_writer(tmp_path: Path) -> None:
    import wandb

    wandb.init(project="mine", dir=str(tmp_path))
    (sink,) = build([wandb], tmp_path, METADATA)
    sink.values(step(1))
    wandb.log({"mine": 1.0})
    wandb.finish()
    (row,) = [row for row in history(wandb_records(tmp_path)) if "mine" in row]
    assert {key: row[key] for key in expected(1)} == expected(1)


def test_lightnings_csv_logger(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(str(tmp_path))
    guarded = GuardedSink(build([logger], tmp_path, METADATA)[0])
    guarded.values(step(1))
    guarded.values(alerted(2))
    guarded.close()
    logger.save()
    assert guarded.error is None
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert {key: float(rows[2][key]) for key in expected(2)} == expected(2)
    assert float(rows[2]["alerts/saturation"]) == 1.0


def test_lightnings_tensorboard_logger(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(str(tmp_path))
    (sink,) = build([logger], tmp_path, METADATA)
    sink.values(alerted(3))
    logger.finalize("success")
    found = scalars(Path(logger.log_dir))
    assert {key: found[key][3] for key in expected(3)} == expected(3)


def test_lightnings_wandb_logger(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(project="mine", save_dir=str(tmp_path), offline=True)
    (sink,) = build([logger], tmp_path, METADATA)
    sink.values(step(4))
    logger.experiment.finish()
    (row,) = [row for row in history(wandb_records(tmp_path)) if "trainer/global_step" in row]
    assert row["trainer/global_step"] == 4
    assert {key: row[key] for key in expected(4)} == expected(4)
