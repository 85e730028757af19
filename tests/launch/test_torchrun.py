"""torchrun for real, with a stand-in for the job: what reaches each rank, and how a job ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launch.conftest import Launch, clean_environment, nemo_fp8

pytestmark = pytest.mark.slow

TWO = ("launcher=torchrun", "launcher.nproc_per_node=2", "device=emulated")

JOB = """
import json, os, signal, sys, time
rank = int(os.environ.get("RANK", "0"))
print("rank", rank, "of", os.environ.get("WORLD_SIZE", "1"), flush=True)
kept = {k: v for k, v in os.environ.items() if k.startswith(("NEMO_FP8_", "NVTE_", "PROBE", "OMP_"))}
with open(f"seen-{rank}.json", "w") as file:
    json.dump({"arguments": sys.argv[1:], "environment": kept, "torch": "torch" in sys.modules}, file)
mode = sys.argv[1]
if mode == "killed" and rank == 1:
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "fails" and rank == 1:
    raise ValueError("boom")
if mode == "stops":
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    open(f"ready-{rank}", "w").close()
    while not received:
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, before)
    time.sleep(2)  # saving takes its time, and a second SIGTERM must not cut it short
    open(f"saved-{rank}", "w").close()
    sys.exit(143)
if mode in ("killed", "fails", "hangs"):
    time.sleep(600)
"""


@pytest.fixture
def job(in_tmp: Path) -> Path:
    path = in_tmp / "job.py"
    path.write_text(JOB)
    return path


def seen(directory: Path, rank: int) -> dict[str, Any]:
    return json.loads((directory / f"seen-{rank}.json").read_text())


def ranks(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((run_dir / ".launch/ranks").glob("*.json"))]


def test_every_rank_gets_the_arguments_and_the_recipes_variables(job: Path, launch: Launch) -> None:
    done = launch(
        *TWO,
        "fp8_recipe=blockwise",
        "fp8_recipe.use_f32_scales=true",
        "launcher.job_id=42",
        "+launcher.environment.PROBE='x y'",
        "--",
        "job.py",
        "ok",
        "a b",
        "$(touch INJECTED)",
    )
    assert done.returncode == 0, done.stderr
    directory = job.parent
    for rank in (0, 1):
        one = seen(directory, rank)
        assert one["arguments"] == ["ok", "a b", "$(touch INJECTED)"]
        assert not one["torch"]
        environment = one["environment"]
        assert environment["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] == "1"
        assert environment["PROBE"] == "x y"
        assert environment["NEMO_FP8_RUN_DIR"] == str(directory / "runs/blockwise-42")
        assert environment["NEMO_FP8_JOB_ID"] == "42"
    launched = directory / "runs/blockwise-42/.launch"
    assert (launched / "logs/rank_1.log").read_text() == "rank 1 of 2\n"
    assert "rank 0 of 2" in done.stdout
    assert "rank 1 of 2" not in done.stdout
    assert os.listdir(directory / "runs") == ["blockwise-42"]
    (node,) = (json.loads(path.read_text()) for path in (launched / "nodes").iterdir())
    recorded = {row["name"]: (row["value"], row["origin"]) for row in node["environment"]}
    assert recorded["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] == ("1", "recipe")
    assert recorded["PROBE"] == ("x y", "launcher.environment")
    assert node["exit_code"] == 0
    again = launch(*TWO, "fp8_recipe=blockwise", "launcher.job_id=42", "--", "job.py", "ok")
    assert again.returncode == 2
    assert "holds a run already" in again.stderr


def test_a_failing_rank_ends_the_job_with_its_status_and_its_words(job: Path, launch: Launch) -> None:
    started = time.monotonic()
    done = launch(*TWO, "run_dir=run", "--", "job.py", "fails")
    assert done.returncode == 1
    assert time.monotonic() - started < 120
    assert "rank 1 failed with exit status 1" in done.stderr
    assert "ValueError: boom" in done.stderr


def test_a_killed_rank_ends_the_others_in_bounded_time(job: Path, launch: Launch) -> None:
    started = time.monotonic()
    done = launch(*TWO, "run_dir=run", "--", "job.py", "killed")
    assert done.returncode == 137
    assert time.monotonic() - started < 120
    for record in ranks(job.parent / "run"):
        with pytest.raises(ProcessLookupError):
            os.kill(record["pid"], 0)


def test_a_hung_job_leaves_the_stacks_of_all_ranks_and_fails(job: Path, launch: Launch) -> None:
    done = launch(*TWO, "run_dir=run", "launcher.hang_timeout_minutes=0.25", "--", "job.py", "hangs")
    assert done.returncode == 124
    for rank in (0, 1):
        stacks = (job.parent / f"run/.launch/stacks/rank_{rank}.txt").read_text()
        assert f'"{job}", line {1 + JOB.splitlines().index("    time.sleep(600)")}' in stacks


@pytest.mark.parametrize(
    ("number", "launcher", "count"),
    [
        (signal.SIGTERM, TWO, 2),
        (signal.SIGINT, ("launcher=local",), 1),
        (signal.SIGUSR1, ("launcher=local",), 1),
    ],
)
def test_the_wish_to_stop_reaches_every_rank_once_and_lets_it_save(
    job: Path, number: signal.Signals, launcher: tuple[str, ...], count: int
) -> None:
    directory = job.parent
    process = subprocess.Popen(
        nemo_fp8("launch", *launcher, "run_dir=run", "--", "job.py", "stops"),
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not all((directory / f"ready-{rank}").exists() for rank in range(count)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        if number is signal.SIGTERM:  # SLURM's proctrack/linuxproc sends it to every process itself
            for _ in range(2):
                for record in ranks(directory / "run"):
                    os.kill(record["pid"], signal.SIGTERM)
                time.sleep(0.5)
        status = process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert status == (130 if number is signal.SIGINT else 143)
    assert sorted(path.name for path in directory.glob("saved-*")) == [
        f"saved-{rank}" for rank in range(count)
    ]


@pytest.mark.parametrize("victim", ["launcher", "torchrun", "both"])
def test_when_what_started_it_is_killed_nothing_of_the_job_stays(job: Path, victim: str) -> None:
    process = subprocess.Popen(
        nemo_fp8("launch", *TWO, "run_dir=run", "--", "job.py", "hangs"),
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(job.parent.glob("seen-*.json"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    torchrun = _parent(ranks(job.parent / "run")[0]["pid"])
    if victim == "both":
        os.kill(torchrun, signal.SIGSTOP)  # so that it has no time to end its workers
    if victim != "torchrun":
        process.kill()
    if victim != "launcher":
        os.kill(torchrun, signal.SIGKILL)
    assert process.wait(60) != 0
    left = {record["pid"] for record in ranks(job.parent / "run")}
    deadline = time.monotonic() + 60
    while left:
        left = {pid for pid in left if Path(f"/proc/{pid}").exists() and not _is_zombie(pid)}
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_two_nodes_meet_at_the_rendezvous_and_share_one_run_directory(job: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = ("launcher=torchrun", "launcher.nproc_per_node=1", "device=emulated", "launcher.nodes=2")
    words += (f"launcher.rendezvous=127.0.0.1:{port}", "launcher.job_id=7", "fp8_recipe=tensorwise")
    nodes = [
        subprocess.Popen(
            nemo_fp8("launch", *words, "--", "job.py", "ok"),
            env={**clean_environment(), "SLURMD_NODENAME": name},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    said = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert os.listdir(job.parent / "runs") == ["tensorwise-7"]
    assert len(ranks(job.parent / "runs/tensorwise-7")) == 2
    shown = [out for out, _ in said if "rank 0 of 2" in out]
    assert len(shown) == 1


def test_several_nodes_need_what_they_share(launch: Launch) -> None:
    done = launch("launcher=torchrun", "launcher.nodes=2", "launcher.nproc_per_node=1", "--dry-run")
    assert done.returncode == 2
    assert "launcher.rendezvous needs a value" in done.stderr


def test_dry_run_prints_what_a_shell_would_run_and_makes_nothing(in_tmp: Path, launch: Launch) -> None:
    done = launch(*TWO, 'run_dir="my run\'s dir"', "fp8_recipe=mxfp8", "--dry-run")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout, comments=True)
    assert words[words.index("-m") + 1] == "torch.distributed.run"
    assert "--nproc-per-node=2" in words
    assert words[-1] == f"run_dir='{in_tmp}/my run\\'s dir'"  # for bash it is one word, quoted for Hydra
    assert os.listdir(in_tmp) == []


def test_what_dry_run_prints_runs_in_a_shell(in_tmp: Path, launch: Launch) -> None:
    (in_tmp / "script.py").write_text("import os, sys; print('ran', sys.argv[1:], os.environ.get('RANK'))")
    words = ("fp8_recipe=mxfp8", "--", "script.py", "it's", "$HOME")
    printed = launch(*words[:1], "--dry-run", *words[1:])
    done = subprocess.run(["sh", "-c", printed.stdout], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ran [\"it's\", '$HOME']")
    assert os.listdir(in_tmp) == ["script.py"]


def test_a_whole_training_job_on_two_ranks_and_its_resumption(in_tmp: Path, launch: Launch) -> None:
    words = (
        *TWO,
        "run_dir=run",
        "fp8_recipe=delayed",
        "data=mock",
        "model.num_layers=1",
        "model.seq_length=32",
    )
    words += ("training.global_batch_size=8", "training.eval_batches=0", "training.steps=6")
    words += ("training.save_every=2", "telemetry.enabled=false")
    first = launch(*words, "training.stop_at_step=3")
    assert first.returncode == 0, first.stderr
    refused = launch(*words)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    second = launch(*words, "--resume")
    assert second.returncode == 0, second.stderr
    rows = [json.loads(line) for line in (in_tmp / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    record = json.loads((in_tmp / "run/run.json").read_text())
    assert (record["status"], record["resumes"][0]["step"]) == ("finished", 3)
    assert sorted(path.name for path in in_tmp.iterdir()) == ["run"]
