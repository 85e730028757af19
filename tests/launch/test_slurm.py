"""A real SLURM of two nodes on this machine: jobs submitted as a user does it, ending in every way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_fp8_recipes.launch.hydra_text import override
from tests.launch.conftest import HOSTILE, clean_environment, nemo_fp8
from tests.launch.slurm_cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

BASE = ("launcher=slurm", "device=emulated", "launcher.nproc_per_node=2")
# A model that takes a fraction of a second a step.
SMALL = (
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.seq_length=32",
    "data=mock",
    "training.micro_batch_size=1",
    "training.global_batch_size=4",
    "training.eval_batches=0",
)


@dataclass(frozen=True)
class Submitted:
    """A job as the command reported it."""

    status: int
    output: str
    errors: str
    jobs: dict[str, Path]
    """Job id -> run directory."""

    @property
    def only(self) -> tuple[str, Path]:
        assert self.jobs, self.errors
        ((job_id, run_dir),) = self.jobs.items()
        return job_id, run_dir


Submit = Callable[..., Submitted]


@pytest.fixture
def submit(cluster: Cluster, in_tmp: Path) -> Iterator[Submit]:
    """Run `nemo-fp8 launch launcher=slurm …` in the test's directory; at the end what still runs is ended."""

    def run(*words: str, wait: bool = False) -> Submitted:
        waiting = ("launcher.wait=true",) if wait else ()
        done = subprocess.run(
            nemo_fp8("launch", *BASE, *waiting, *words),
            cwd=in_tmp,
            env={**clean_environment(), **_slurm_variables(cluster)},
            capture_output=True,
            text=True,
            timeout=400,
        )
        jobs = dict(re.findall(r"^Submitted job (\S+): (.*)$", done.stdout, re.MULTILINE))
        return Submitted(
            done.returncode, done.stdout, done.stderr, {key: in_tmp / path for key, path in jobs.items()}
        )

    yield run
    cluster.run("scancel", "-u", "root")
    until(lambda: not cluster.run("squeue", "-h").stdout.strip(), 60, "jobs that do not end")


def _slurm_variables(cluster: Cluster) -> dict[str, str]:
    return {key: cluster.environment[key] for key in ("SLURM_CONF", "PATH")}


def record(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def output(run_dir: Path) -> str:
    return (run_dir / ".launch/slurm.out").read_text()


def runs(cluster: Cluster, run_dir: Path) -> dict[str, Any]:
    done = subprocess.run(
        nemo_fp8("runs", "--json", str(run_dir)),
        env={**clean_environment(), **_slurm_variables(cluster)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    (row,) = json.loads(done.stdout)["runs"]
    return row


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def logged_steps(run_dir: Path) -> int:
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("tasks", ["node", "gpu"])
def test_two_nodes_of_two_processes_train_one_model(cluster: Cluster, submit: Submit, tasks: str) -> None:
    done = submit(
        "fp8_recipe=tensorwise",
        *SMALL,
        "launcher.nodes=2",
        f"launcher.tasks={tasks}",
        "training.steps=3",
        wait=True,
    )
    job_id, run_dir = done.only
    assert done.status == 0, done.errors + output(run_dir)
    assert run_dir.name == f"tensorwise-{job_id}"
    assert record(run_dir)["status"] == "finished"
    assert "4 process(es): data 4" in output(run_dir)
    assert len(losses(run_dir)) == 3
    ranks = [json.loads(path.read_text()) for path in sorted((run_dir / ".launch/ranks").iterdir())]
    assert [(one["rank"], one["exit_code"]) for one in ranks] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    nodes = {path.stem.split("-")[0] for path in (run_dir / ".launch/nodes").iterdir()}
    assert nodes == {"n1", "n2"}
    assert sorted(path.name for path in run_dir.parent.parent.iterdir()) == ["runs"]
    assert os.listdir(run_dir.parent) == [run_dir.name]
    assert runs(cluster, run_dir)["state"] == "finished"


def test_an_array_compares_recipes_each_in_its_own_run_directory(cluster: Cluster, submit: Submit) -> None:
    done = submit(
        "-m",
        "fp8_recipe=delayed,tensorwise,blockwise",
        *SMALL,
        "model.hidden_size=128",
        "launcher.nproc_per_node=1",
        "training.steps=2",
        wait=True,
    )
    assert done.status == 0, done.errors
    assert len(done.jobs) == 3
    number = next(iter(done.jobs)).split("_")[0]
    expected = {
        f"{name}-{number}_{index}" for index, name in enumerate(("delayed", "tensorwise", "blockwise"))
    }
    assert {path.name for path in done.jobs.values()} == expected
    for run_dir in done.jobs.values():
        recipe = record(run_dir)["recipe"]["name"]
        assert run_dir.name.startswith(recipe)
        assert record(run_dir)["status"] == "finished"
        assert f"recipe         {recipe}" in output(run_dir)
    first = {run_dir.name: losses(run_dir)[2] for run_dir in done.jobs.values()}
    assert len(set(first.values())) == 3


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the job below, run with torchrun from its first step to its last."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    words = ("launcher=torchrun", "launcher.nproc_per_node=2", "device=emulated", "run_dir=run", *LONG)
    done = subprocess.run(
        nemo_fp8("launch", *words),
        cwd=directory,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return losses(directory / "run")


LONG = (
    "fp8_recipe=delayed",
    *SMALL,
    "training.steps=200",
    "training.save_every=1000",
    "telemetry.enabled=false",
)


def test_a_job_whose_time_is_nearly_up_saves_requeues_and_ends_with_the_same_losses(
    cluster: Cluster, submit: Submit, uninterrupted: dict[int, float]
) -> None:
    """SLURM's signal to the batch shell before the time limit, sent as soon as there are steps."""
    job_id, run_dir = submit(*LONG).only
    until(lambda: logged_steps(run_dir) >= 5, 120, "no steps")
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    cluster.wait(job_id, "PENDING", seconds=90)
    saved = max(losses(run_dir))
    assert 5 <= saved < 200
    state = runs(cluster, run_dir)
    assert (state["state"], state["checkpoint_step"]) == ("queued", saved)
    assert record(run_dir)["status"] == "interrupted"
    cluster.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")  # SLURM would wait two minutes
    job = cluster.wait(job_id, "COMPLETED", "FAILED", seconds=200)
    assert job["JobState"] == "COMPLETED", output(run_dir)
    assert job["Restarts"] == "1"
    assert record(run_dir)["resumes"][0]["step"] == saved
    assert losses(run_dir) == uninterrupted


STEPS = """
import os, pathlib, signal, sys, time
run = pathlib.Path(os.environ["NEMO_FP8_RUN_DIR"])
print("attempt", os.environ.get("SLURM_RESTART_COUNT", "0"), flush=True)
if os.environ["NEMO_FP8_RESUME"]:
    sys.exit(0 if (run / "saved").read_text() == "here" else 5)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
while not stop:
    time.sleep(0.1)
(run / "saved").write_text("here")
sys.exit(143)
"""


def test_the_time_limit_itself_leads_to_a_second_attempt_that_goes_on(
    cluster: Cluster, submit: Submit, in_tmp: Path
) -> None:
    (in_tmp / "steps.py").write_text(STEPS)
    words = ("launcher.nproc_per_node=1", "launcher.time=1", "launcher.signal_seconds=30")
    job_id, run_dir = submit(*words, "--", "steps.py").only
    cluster.wait(job_id, "RUNNING", seconds=60)
    assert runs(cluster, run_dir)["state"] == "running"
    cluster.wait(job_id, "PENDING", seconds=120)
    assert (run_dir / "saved").exists()
    cluster.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")
    job = cluster.wait(job_id, "COMPLETED", "FAILED", "TIMEOUT", seconds=120)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(run_dir)
    assert runs(cluster, run_dir)["state"] == "finished"


def test_scancel_with_sigterm_saves_and_leaves_a_resumable_run(cluster: Cluster, submit: Submit) -> None:
    job_id, run_dir = submit(*LONG, "run_dir=run").only
    until(lambda: logged_steps(run_dir) >= 3, 120, "no steps")
    cluster.run("scancel", "--signal=TERM", job_id)
    job = cluster.wait(job_id, "FAILED", "COMPLETED", "PENDING", "CANCELLED", seconds=90)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "143:0"), output(run_dir)
    assert record(run_dir)["status"] == "interrupted"
    state = runs(cluster, run_dir)
    assert (state["state"], state["resumable"]) == ("interrupted", True)
    assert state["checkpoint_step"] == state["last_step"]
    again = submit(*LONG, "run_dir=run")
    assert again.status == 2
    assert "--resume" in again.errors
    resumed = submit(*LONG, "run_dir=run", "--resume", wait=True)
    assert resumed.status == 0, output(run_dir)
    assert max(losses(run_dir)) == 200


POISON = "import os\nopen(os.environ['TORCH_MARK'], 'a').close()\nraise ImportError('torch was imported')\n"


def test_a_node_with_the_wrong_gpu_ends_the_job_before_torch_is_imported(
    cluster: Cluster, submit: Submit, in_tmp: Path
) -> None:
    """A script plays nvidia-smi: an H100 where a B200 was asked for. torch leaves a mark when imported."""
    tools = in_tmp / "tools"
    (tools / "torch").mkdir(parents=True)
    (tools / "torch/__init__.py").write_text(POISON)
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0'\n")
    (tools / "nvidia-smi").chmod(0o755)
    words = (
        "device=native",
        "hardware=b200",
        "fp8_recipe=mxfp8",
        "preflight.ignore=[]",
        "launcher.gpus_per_node=0",
        f"launcher.pre_commands=['export PATH={tools}:$PATH PYTHONPATH={tools}']",
        f"+launcher.environment.TORCH_MARK={in_tmp}/mark",
        "launcher.nodes=2",
    )
    done = submit(*words, wait=True)
    _, run_dir = done.only
    assert done.status == 2, output(run_dir)
    assert "hardware=b200 has compute capability 10.0, but node n1 has NVIDIA H100 80GB HBM3 (9.0)" in output(
        run_dir
    )
    assert not (in_tmp / "mark").exists()
    assert not (run_dir / "run.json").exists()
    state = runs(cluster, run_dir)
    assert (state["state"], "failed" in state["reason"]) == ("failed", True)
    control = subprocess.run(
        nemo_fp8("train", "fp8_recipe=tensorwise", "device=emulated"),
        env={**clean_environment(), "PYTHONPATH": str(tools), "TORCH_MARK": f"{in_tmp}/mark"},
        cwd=in_tmp,
        capture_output=True,
        timeout=120,
    )
    assert control.returncode != 0
    assert (in_tmp / "mark").exists()


def test_a_job_that_would_fail_is_not_submitted(cluster: Cluster, submit: Submit, in_tmp: Path) -> None:
    done = submit("fp8_recipe=mxfp8", "hardware=h100")
    assert done.status == 2
    assert "mxfp8" in done.errors
    assert os.listdir(in_tmp) == []


def test_sbatchs_refusal_is_said_and_leaves_nothing(cluster: Cluster, submit: Submit, in_tmp: Path) -> None:
    done = submit("launcher.partition=nowhere", "fp8_recipe=tensorwise")
    assert done.status == 2
    assert "invalid partition" in done.errors.lower()
    assert os.listdir(in_tmp) == []
    assert not cluster.run("squeue", "-h").stdout.strip()


KILLED = """
import os, signal, time
if os.environ["RANK"] == "3":
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


@pytest.mark.parametrize("tasks", ["node", "gpu"])
def test_a_killed_rank_ends_the_whole_job_in_bounded_time(submit: Submit, in_tmp: Path, tasks: str) -> None:
    (in_tmp / "killed.py").write_text(KILLED)
    started = time.monotonic()
    done = submit("launcher.nodes=2", f"launcher.tasks={tasks}", "--", "killed.py", wait=True)
    assert done.status == 137
    assert time.monotonic() - started < 150


SHOW = """
import json, os, sys
json.dump({"arguments": sys.argv[1:], "probe": os.environ["PROBE"]}, open("seen.json", "w"))
"""


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "newline"])
def test_hostile_values_in_every_field_reach_slurm_and_the_job_unchanged(
    cluster: Cluster, submit: Submit, in_tmp: Path, name: str
) -> None:
    text = HOSTILE[name]
    (in_tmp / "show.py").write_text(SHOW)
    run_dir = in_tmp / "in" / text.replace("/", "")
    if "\\" in text:
        refused = submit(override("run_dir", str(run_dir)), "--", "show.py", text)
        assert "without backslashes" in refused.errors
        run_dir = in_tmp / "in" / "plain"
    done = submit(
        override("launcher.comment", text),
        override("launcher.job_name", text),
        override("run_dir", str(run_dir)),
        f"+{override('launcher.environment.PROBE', text)}",
        "launcher.nproc_per_node=1",
        "launcher.wait=true",
        "--",
        "show.py",
        text,
    )
    assert done.status == 0, done.errors + output(run_dir)
    assert json.loads((in_tmp / "seen.json").read_text()) == {"arguments": [text], "probe": text}
    (job_id,) = done.jobs
    shown = cluster.run("scontrol", "show", "job", job_id).stdout
    assert f"   Comment={text}" in shown.replace(" \n", "\n") + "\n" or f"   Comment={text.rstrip()}" in shown
    assert f"JobName={text}\n" in shown or f"JobName={text.strip()}\n" in shown
    assert not (in_tmp / "INJECTED").exists()
    assert not (run_dir / "INJECTED").exists()


def test_a_full_disk_ends_the_job_and_leaves_no_run_that_looks_well(
    cluster: Cluster, submit: Submit, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """SLURM's own output is on the full disk too, so what can be said of the reason may be lost with it."""
    small = tmp_path_factory.mktemp("small")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        done = submit(*LONG, f"run_dir={small}/run", "training.save_every=2", wait=True)
        assert done.status not in (0, 124, 143)
        state = runs(cluster, small / "run")
        assert state["state"] in ("failed", "interrupted")
        complete = list((small / "run/checkpoints").glob("*/complete.json"))
        assert state["checkpoint_step"] == max((int(path.parent.name[5:]) for path in complete), default=None)
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
