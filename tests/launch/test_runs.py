"""`nemo-fp8 runs`: the state that locks confirm, not the one last written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.cli import main
from nemo_fp8_recipes.launch.runs.state import find_runs, read_run_state
from tests.launch.conftest import clean_environment, nemo_fp8

if TYPE_CHECKING:
    import pytest

# Holds a run directory as a training job does, through the training job's own class.
HOLDER = """
import sys, time
from nemo_fp8_recipes.training.run_directory import RunDirectory
run = RunDirectory.create(sys.argv[1], "mxfp8")
made = dict(command=["x"], overrides=[], recipe={"name": "mxfp8"}, device="emulated b200")
run.start(**made, versions={}, config_yaml="")
(run.path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.25}\\n{"step": 6, "lo')
print("ready", flush=True)
sys.stdin.readline()
getattr(run, sys.argv[2])(*eval(sys.argv[3]))
run.close()
"""


def holder(path: Path, method: str = "finish", arguments: str = "[{}]") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), method, arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def checkpoint(path: Path, step: int, *, complete: bool = True) -> None:
    directory = path / "checkpoints" / f"step_{step:06d}"
    directory.mkdir(parents=True)
    if complete:
        (directory / "complete.json").write_text("{}")


def test_a_running_run_and_its_last_whole_line(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    state = read_run_state(tmp_path / "run")
    assert (state.state, state.recipe, state.device) == ("running", "mxfp8", "emulated b200")
    assert (state.last_step, state.last_loss) == (5, 1.25)
    end(process)
    assert read_run_state(tmp_path / "run").state == "finished"


def test_a_killed_run_is_not_running(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "running"
    state = read_run_state(tmp_path / "run")
    assert state.state == "interrupted"
    assert "killed" in str(state.reason)
    assert not state.resumable
    checkpoint(tmp_path / "run", 4)
    checkpoint(tmp_path / "run", 6, complete=False)
    state = read_run_state(tmp_path / "run")
    assert (state.resumable, state.checkpoint_step) == (True, 4)


def test_a_failed_and_an_interrupted_run_say_why(tmp_path: Path) -> None:
    end(holder(tmp_path / "failed", "fail", "[ValueError('boom')]"))
    end(holder(tmp_path / "stopped", "interrupt", "['stopped after step 5 by signal 15']"))
    checkpoint(tmp_path / "stopped", 5)
    failed, stopped = (read_run_state(path) for path in find_runs(tmp_path))
    assert (failed.state, failed.reason, failed.resumable) == ("failed", "ValueError: boom", False)
    assert (stopped.state, stopped.reason) == ("interrupted", "stopped after step 5 by signal 15")
    assert stopped.resumable


def test_looking_changes_nothing_and_takes_no_lock_from_a_job(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for _ in range(20):
        read_run_state(tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    end(process)


def test_a_record_that_cannot_be_read_is_said_and_hides_no_other_run(tmp_path: Path) -> None:
    end(holder(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/run.json").write_text("{half")
    (tmp_path / "not a run").mkdir()
    states = [read_run_state(path) for path in find_runs(tmp_path)]
    assert [state.state for state in states] == ["finished", "unreadable"]
    assert "run.json" in str(states[1].reason)


def listing(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**clean_environment(), "COLUMNS": "200"}
    return subprocess.run(
        nemo_fp8("runs", *words), cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def test_the_command_lists_and_prints_json(tmp_path: Path) -> None:
    end(holder(tmp_path / "runs/one [x]"))
    shown = listing(cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "runs/one [x]" in shown.stdout
    assert "finished" in shown.stdout
    assert "1.2500" in shown.stdout
    document: dict[str, Any] = json.loads(listing("--json", "runs", cwd=tmp_path).stdout)
    assert document["schema_version"] == 1
    (row,) = document["runs"]
    assert (row["path"], row["state"], row["last_step"]) == ("runs/one [x]", "finished", 5)
    one = json.loads(listing("--json", "runs/one [x]", cwd=tmp_path).stdout)
    assert one["runs"] == document["runs"]


def test_nothing_to_list_and_bad_input(tmp_path: Path) -> None:
    assert "No runs in runs." in listing(cwd=tmp_path).stdout
    assert json.loads(listing("--json", cwd=tmp_path).stdout)["runs"] == []
    wrong = listing("--jsn", cwd=tmp_path)
    assert (wrong.returncode, "Did you mean --json?" in wrong.stderr) == (2, True)
    missing = listing("nowhere", cwd=tmp_path)
    assert (missing.returncode, "nowhere is not a directory" in missing.stderr) == (2, True)


def test_it_imports_no_torch(tmp_path: Path) -> None:
    end(holder(tmp_path / "runs/a"))
    script = (
        "import sys; from nemo_fp8_recipes.cli import main; "
        "assert main(['runs']) == 0 and main(['launch', 'launcher=slurm', 'launcher.nproc_per_node=1',"
        "'device=emulated', '--dry-run']) == 0; import nemo_fp8_recipes.commands.data; "
        "assert not {'torch', 'submitit', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_users_script_is_listed_by_what_its_launcher_recorded(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import sys, time\nprint('on', flush=True)\n"
        "time.sleep(float(sys.argv[1]))\nsys.exit(int(sys.argv[2]))\n"
    )
    for name, status in (("good", "0"), ("bad", "3")):
        subprocess.run(
            nemo_fp8("launch", f"run_dir={name}", "--", "job.py", "0", status),
            cwd=tmp_path,
            env=clean_environment(),
            timeout=60,
            check=False,
        )
    assert read_run_state(tmp_path / "good").state == "finished"
    bad = read_run_state(tmp_path / "bad")
    assert (bad.state, bad.exit_code) == ("failed", 3)
    process = subprocess.Popen(
        nemo_fp8("launch", "run_dir=long", "--", "job.py", "60", "0"),
        cwd=tmp_path,
        env=clean_environment(),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"on\n"
    assert read_run_state(tmp_path / "long").state == "running"
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while read_run_state(tmp_path / "long").state == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert read_run_state(tmp_path / "long").state == "interrupted"


def test_records_of_another_form_are_listed_as_unreadable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {
        "no_status": {"recipe": {"name": "mxfp8"}},
        "list": {"status": "finished", "recipe": {"name": ["mxfp8"]}},
        "word": {"status": "finished", "recipe": "mxfp8"},
        "null": {"status": "finished", "recipe": None},
    }
    for name, record in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("unreadable") == len(broken)


def test_a_last_loss_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = "2026-01-01T00:00:00+00:00"
    record = {"schema_version": 1, "status": "finished", "started": started, "recipe": {"name": "mxfp8"}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": NaN}\n')
    assert main(["runs", "--json", str(tmp_path)]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["runs"]
    assert (listed["state"], listed["last_step"], listed["last_loss"]) == ("finished", 7, None)
