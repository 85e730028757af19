"""A real SLURM of two nodes on this machine: jobs submitted as a user does it, ending in every way."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_fp8_recipes.cli import main
from nemo_fp8_recipes.launch.hydra_text import override
from tests.launch.conftest import HOSTILE, clean_environment, nemo_fp8
from tests.launch.slurm_cluster import Cluster
from tests.launch.slurm_jobs import LONG, SMALL, STEPS_OF_LONG, logged_steps, losses, record, runs, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

BASE = ("launcher=slurm", "device=emulated", "launcher.nproc_per_node=1")
# A script that needs no torch: one task a process, no torchrun.
LIGHT = ("launcher.tasks=gpu",)


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
def submit(cluster: Cluster, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submit]:
    """`nemo-fp8 launch launcher=slurm …` in the test's directory; at the end what still runs is ended."""
    for name in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(name)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*words: str, wait: bool = False) -> Submitted:
        waiting = ("launcher.wait=true",) if wait else ()
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = main(["launch", *BASE, *waiting, *words])
        jobs = dict(re.findall(r"^Submitted job (\S+): (.*)$", output.getvalue(), re.MULTILINE))
        return Submitted(
            status, output.getvalue(), errors.getvalue(), {key: in_tmp / path for key, path in jobs.items()}
        )

    yield run
    cluster.run("scancel", "-u", "root")
    until(lambda: not cluster.run("squeue", "-h").stdout.strip(), 60, "jobs that do not end")


def output(run_dir: Path) -> str:
    return (run_dir / ".launch/slurm.out").read_text()


def test_two_nodes_of_two_processes_train_one_model(cluster: Cluster, submit: Submit, in_tmp: Path) -> None:
    """One task a GPU, on token files whose indices rank 0 builds for all."""
    (in_tmp / "text").mkdir()
    for number in range(40):
        (in_tmp / f"text/{number}.txt").write_text(f"document {number} " * 20)
    assert main(["data", "--output", "corpus", "text"]) == 0
    done = submit(
        "fp8_recipe=tensorwise",
        *SMALL,
        "data=megatron_indexed",
        "data.blend=[corpus]",
        "launcher.nodes=2",
        "launcher.nproc_per_node=2",
        "launcher.tasks=gpu",
        "training.steps=3",
        wait=True,
    )
    job_id, run_dir = done.only
    assert done.status == 0, done.errors + output(run_dir)
    assert run_dir.name == f"tensorwise-{job_id}"
    assert record(run_dir)["status"] == "finished"
    assert "4 process(es): data 4" in output(run_dir)
    assert "megatron_indexed: 1 file(s), 40 documents" in output(run_dir)
    assert len(losses(run_dir)) == 3
    _assert_ranks_and_nodes(run_dir, ranks=4)
    assert os.listdir(run_dir.parent) == [run_dir.name]
    assert runs(run_dir)["state"] == "finished"


def _assert_ranks_and_nodes(run_dir: Path, ranks: int) -> None:
    found = [json.loads(path.read_text()) for path in sorted((run_dir / ".launch/ranks").iterdir())]
    assert [(one["rank"], one["exit_code"]) for one in found] == [(rank, 0) for rank in range(ranks)]
    nodes = {path.stem.split("-")[0] for path in (run_dir / ".launch/nodes").iterdir()}
    assert nodes == {"n1", "n2"}


def test_a_torchrun_on_each_of_two_nodes(submit: Submit) -> None:
    done = submit(
        "fp8_recipe=blockwise",
        *SMALL,
        "model.hidden_size=128",
        "launcher.nodes=2",
        "training.steps=2",
        wait=True,
    )
    _, run_dir = done.only
    assert done.status == 0, done.errors + output(run_dir)
    assert "2 process(es): data 2" in output(run_dir)
    _assert_ranks_and_nodes(run_dir, ranks=2)
    (node, _) = (json.loads(path.read_text()) for path in sorted((run_dir / ".launch/nodes").iterdir()))
    variables = {row["name"]: row["value"] for row in node["environment"]}
    assert variables["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] == "0"


RECIPE = """
import json, os, pathlib
run = pathlib.Path(os.environ["NEMO_FP8_RUN_DIR"])
kept = {name: value for name, value in os.environ.items() if name.startswith("NVTE_")}
(run / "seen.json").write_text(json.dumps(kept))
"""


def test_an_array_has_a_run_directory_and_an_environment_for_each_recipe(
    submit: Submit, in_tmp: Path
) -> None:
    (in_tmp / "recipe.py").write_text(RECIPE)
    done = submit("-m", "fp8_recipe=delayed,tensorwise,blockwise", *LIGHT, "--", "recipe.py", wait=True)
    assert done.status == 0, done.errors
    number = next(iter(done.jobs)).split("_")[0]
    names = ("delayed", "tensorwise", "blockwise")
    expected = {f"{name}-{number}_{index}" for index, name in enumerate(names)}
    assert {path.name for path in done.jobs.values()} == expected
    seen = {
        path.name.split("-")[0]: json.loads((path / "seen.json").read_text()) for path in done.jobs.values()
    }
    assert seen == {
        "delayed": {},
        "tensorwise": {"NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES": "0"},
        "blockwise": {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"},
    }
    assert all((path / ".launch/slurm.out").exists() for path in done.jobs.values())


def test_a_job_whose_time_is_nearly_up_saves_requeues_and_ends_with_the_same_losses(
    cluster: Cluster, submit: Submit, uninterrupted: dict[int, float]
) -> None:
    """SLURM's signal to the batch shell before the time limit, sent as soon as there are steps."""
    job_id, run_dir = submit(*LONG).only
    until(lambda: logged_steps(run_dir) >= 5, 120, "no steps")
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    cluster.wait(job_id, "PENDING", seconds=90)
    saved = max(losses(run_dir))
    assert 5 <= saved < STEPS_OF_LONG
    state = runs(run_dir)
    assert (state["state"], state["checkpoint_step"]) == ("queued", saved)
    assert record(run_dir)["status"] == "interrupted"
    cluster.start_again(job_id)
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


# Python as slow to start as from a cold network file system; it says when it begins to.
SLOW_PYTHON = """#!/bin/bash
if [ -z "$NEMO_FP8_ONLY_CHECK" ]; then
  echo "$SLURM_PROCID" >> {here}/begun-$SLURM_RESTART_COUNT
  sleep 4
fi
exec {python} "$@"
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_notice_while_the_tasks_start_sends_the_job_back_having_done_nothing(
    cluster: Cluster, submit: Submit, in_tmp: Path, nodes: int
) -> None:
    """Told by the batch shell, and by a signal to the tasks themselves, before their Python runs."""
    (in_tmp / "job.py").write_text("open('ran', 'a').write('x')")
    python = in_tmp / "python"
    python.write_text(SLOW_PYTHON.format(here=in_tmp, python=sys.executable))
    python.chmod(0o755)
    words = (*LIGHT, f"launcher.nodes={nodes}", f"launcher.python={python}")
    job_id, run_dir = submit(*words, "--", "job.py").only
    begun = in_tmp / "begun-"
    until(lambda: begun.exists() and len(begun.read_text().split()) == nodes, 120, "no tasks")
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    cluster.run("scancel", "--signal=USR1", job_id)
    job = cluster.wait(job_id, "PENDING", "COMPLETED", "FAILED", seconds=90)
    assert job["JobState"] == "PENDING", output(run_dir)
    assert not (in_tmp / "ran").exists()
    assert runs(run_dir)["state"] == "queued"
    cluster.start_again(job_id)
    job = cluster.wait(job_id, "COMPLETED", "FAILED", seconds=120)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(run_dir)
    assert (in_tmp / "ran").read_text() == "x" * nodes
    assert not list((run_dir / ".launch").glob("notice*"))


def test_a_notice_before_the_tasks_start_sends_the_job_back(
    cluster: Cluster, submit: Submit, in_tmp: Path
) -> None:
    (in_tmp / "job.py").write_text("open('ran', 'a').write('x')")
    words = (*LIGHT, "launcher.pre_commands=['touch begun; sleep 3']")
    job_id, run_dir = submit(*words, "--", "job.py").only
    until((in_tmp / "begun").exists, 120, "it did not begin")
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    job = cluster.wait(job_id, "PENDING", "COMPLETED", "FAILED", seconds=90)
    assert job["JobState"] == "PENDING", output(run_dir)
    assert not (in_tmp / "ran").exists()
    cluster.start_again(job_id)
    job = cluster.wait(job_id, "COMPLETED", "FAILED", seconds=120)
    assert job["JobState"] == "COMPLETED", output(run_dir)
    assert (in_tmp / "ran").read_text() == "x"


def test_the_time_limit_itself_leads_to_a_second_attempt_that_goes_on(
    cluster: Cluster, submit: Submit, in_tmp: Path
) -> None:
    (in_tmp / "steps.py").write_text(STEPS)
    words = (*LIGHT, "launcher.time=1", "launcher.signal_seconds=20")
    job_id, run_dir = submit(*words, "--", "steps.py").only
    cluster.wait(job_id, "RUNNING", seconds=60)
    assert runs(run_dir)["state"] == "running"
    cluster.wait(job_id, "PENDING", seconds=120)
    assert (run_dir / "saved").exists()
    cluster.start_again(job_id)
    job = cluster.wait(job_id, "COMPLETED", "FAILED", "TIMEOUT", seconds=120)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(run_dir)
    assert runs(run_dir)["state"] == "finished"


def test_scancel_with_sigterm_saves_and_leaves_a_resumable_run(cluster: Cluster, submit: Submit) -> None:
    job_id, run_dir = submit(*LONG, "run_dir=run").only
    until(lambda: logged_steps(run_dir) >= 3, 120, "no steps")
    cluster.run("scancel", "--signal=TERM", job_id)
    job = cluster.wait(job_id, "FAILED", "COMPLETED", "PENDING", "CANCELLED", seconds=90)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "143:0"), output(run_dir)
    assert record(run_dir)["status"] == "interrupted"
    state = runs(run_dir)
    assert (state["state"], state["resumable"]) == ("interrupted", True)
    assert state["checkpoint_step"] == state["last_step"]
    again = submit(*LONG, "run_dir=run")
    assert again.status == 2
    assert "--resume" in again.errors
    resumed = submit(*LONG, "run_dir=run", "--resume", wait=True)
    assert resumed.status == 0, output(run_dir)
    assert max(losses(run_dir)) == STEPS_OF_LONG


POISON = "import os\nopen(os.environ['TORCH_MARK'], 'a').close()\nraise ImportError('torch was imported')\n"


def test_a_node_with_the_wrong_gpu_ends_the_job_before_torch_is_imported(
    cluster: Cluster, submit: Submit, in_tmp: Path
) -> None:
    """A script plays nvidia-smi: an H100 where a B200 was asked for. torch leaves a mark when imported."""
    tools = in_tmp / "tools"
    (tools / "torch").mkdir(parents=True)
    (tools / "torch/__init__.py").write_text(POISON)
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0, 81559'\n")
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
    state = runs(run_dir)
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
import os, pathlib, signal, time
here, rank = pathlib.Path(__file__).parent, os.environ["RANK"]
(here / f"started-{rank}").touch()
if rank == "3":
    # Not before the others run: a task that SLURM ends while its Python starts has no status of ours.
    while len(list(here.glob("started-*"))) < 4:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


@pytest.mark.parametrize("tasks", ["node", "gpu"])
def test_a_killed_rank_ends_the_whole_job_in_bounded_time(submit: Submit, in_tmp: Path, tasks: str) -> None:
    (in_tmp / "killed.py").write_text(KILLED)
    started = time.monotonic()
    words = ("launcher.nodes=2", "launcher.nproc_per_node=2", f"launcher.tasks={tasks}")
    done = submit(*words, "--", "killed.py", wait=True)
    assert done.status == 137
    assert time.monotonic() - started < 150


SHOW = """
import json, os, sys
with open(sys.argv[1], "w") as file:
    json.dump({"arguments": sys.argv[2:], "probe": os.environ["PROBE"]}, file)
"""


def test_hostile_values_in_every_field_reach_slurm_and_the_job_unchanged(
    cluster: Cluster, submit: Submit, in_tmp: Path
) -> None:
    submitted: dict[str, tuple[str, Path]] = {}
    for name, text in HOSTILE.items():
        if name == "newline":
            continue  # refused: tests/launch/test_batch_script.py
        here = in_tmp / name
        here.mkdir()
        (here / "show.py").write_text(SHOW)
        run_dir = here / "in" / text.replace("/", "")
        if "\\" in text:
            refused = submit(override("run_dir", str(run_dir)), "--", f"{here}/show.py", text)
            assert "without backslashes" in refused.errors
            run_dir = here / "in" / "plain"
        done = submit(
            *LIGHT,
            override("launcher.comment", text),
            override("launcher.job_name", text),
            override("run_dir", str(run_dir)),
            f"+{override('launcher.environment.PROBE', text)}",
            "--",
            f"{here}/show.py",
            f"{here}/seen.json",
            text,
        )
        assert done.status == 0, (name, done.errors)
        submitted[name] = (next(iter(done.jobs)), run_dir)
    for name, (job_id, run_dir) in submitted.items():
        text = HOSTILE[name]
        job = cluster.wait(job_id, "COMPLETED", "FAILED", seconds=120)
        assert job["JobState"] == "COMPLETED", (name, output(run_dir))
        seen = json.loads((in_tmp / name / "seen.json").read_text())
        assert seen == {"arguments": [text], "probe": text}, name
        shown = cluster.run("scontrol", "show", "job", job_id).stdout
        comments = (f"   Comment={text}", f"   Comment={text.rstrip()}")
        assert any(one in shown.replace(" \n", "\n") + "\n" for one in comments), name
        assert f"JobName={text}\n" in shown or f"JobName={text.strip()}\n" in shown, name
    assert not list(in_tmp.rglob("INJECTED"))


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
        state = runs(small / "run")
        assert state["state"] in ("failed", "interrupted")
        complete = list((small / "run/checkpoints").glob("*/complete.json"))
        assert state["checkpoint_step"] == max((int(path.parent.name[5:]) for path in complete), default=None)
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
