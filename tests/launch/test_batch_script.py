"""The batch script as bash runs it: every value arrives as it was given, whatever characters it holds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_fp8_recipes.errors import ConfigError, Fp8Error
from nemo_fp8_recipes.launch.arguments import parse
from nemo_fp8_recipes.launch.hydra_text import override
from nemo_fp8_recipes.launch.slurm.submit import dry_run
from tests.launch.conftest import HOSTILE

BASE = ("launcher=slurm", "device=emulated", "launcher.nproc_per_node=2")

# Stands in for srun and module: keeps its arguments, each ended by NUL, in a numbered file, and one variable.
RECORDER = """#!/bin/sh
number=$(ls "$RECORD" | grep -c '^{name}\\.[0-9]')
printf '%s\\0' "$@" > "$RECORD/{name}.$number"
printf '%s' "$PROBE" > "$RECORD/{name}.probe"
"""


def script(*words: str) -> str:
    return dry_run(parse([*BASE, *words]))


def execute(text: str, directory: Path) -> list[list[str]]:
    """Run a batch script with recorders for srun and module; the arguments of each call, in order."""
    tools = directory / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("srun", "module"):
        (tools / name).write_text(RECORDER.format(name=name))
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "RECORD": str(tools),
        "SLURM_JOB_ID": "42",
        "HOME": str(directory),
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        ["bash"], input=text, cwd=directory, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not (directory / "INJECTED").exists()
    calls = sorted(tools.glob("srun.[0-9]*"), key=lambda path: int(path.suffix[1:]))
    return [call.read_bytes().decode().split("\0")[:-1] for call in calls]


def after(words: Sequence[str], marker: str) -> list[str]:
    return list(words[list(words).index(marker) + 1 :])


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_overrides_reach_the_nodes_unchanged(in_tmp: Path, text: str) -> None:
    words = [override("run_dir", str(in_tmp / "run") + text), override("data.pattern", text)]
    check, run = execute(script(*words), in_tmp)
    assert after(run, "--on-node") == [*BASE, *words]
    assert after(check, "--on-node") == [*BASE, *words]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_script_arguments_reach_the_nodes_unchanged(in_tmp: Path, text: str) -> None:
    (in_tmp / "my script.py").write_text("")
    _, run = execute(script("--", "my script.py", text, "-x", text), in_tmp)
    assert after(run, "--") == [str(in_tmp / "my script.py"), text, "-x", text]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_of_variables_modules_and_names_stay_values(in_tmp: Path, text: str) -> None:
    words = [f"+{override('launcher.environment.PROBE', text)}"]
    words.append(f"launcher.modules=[{override('', text)[1:]}]")
    words.append(override("launcher.rendezvous_host", text))
    words.append(override("launcher.python", text))
    calls = execute(script(*words), in_tmp)
    assert (in_tmp / "tools/srun.probe").read_bytes().decode() == text
    assert [call[call.index("-m") - 1] for call in calls] == [text, text]
    (module,) = (in_tmp / "tools").glob("module.[0-9]*")
    assert module.read_bytes().decode().split("\0")[:-1] == ["load", text]


@pytest.mark.parametrize("text", [text for text in HOSTILE.values() if "\n" not in text])
def test_hostile_container_values_stay_one_argument(in_tmp: Path, text: str) -> None:
    words = [override("launcher.container_image", text)]
    if "," not in text:
        words.append(f"launcher.container_mounts=[{override('', '/a:' + text)[1:]}]")
    _, run = execute(script(*words), in_tmp)
    assert f"--container-image={text}" in run
    if "," not in text:
        assert f"--container-mounts={in_tmp}:{in_tmp},/a:{text}" in run


DIRECTIVES = (
    "account",
    "partition",
    "qos",
    "reservation",
    "constraint",
    "time",
    "memory",
    "comment",
    "job_name",
)


@pytest.mark.parametrize("key", DIRECTIVES)
def test_an_option_of_sbatch_cannot_hold_two_lines(in_tmp: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"launcher\.{key}=.*one line"):
        script(override(f"launcher.{key}", "a\n#SBATCH --account=other"))


@pytest.mark.parametrize("text", [text for text in HOSTILE.values() if "\n" not in text])
def test_options_of_sbatch_stay_one_comment_to_bash(in_tmp: Path, text: str) -> None:
    written = script(*(override(f"launcher.{key}", text) for key in DIRECTIVES))
    head = written.split("set -eo pipefail")[0].splitlines()
    assert all(line.startswith("#") or not line for line in head)
    execute(written, in_tmp)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain-1.2:3", "#SBATCH --comment=plain-1.2:3"),
        ('say "hi"', '#SBATCH --comment="say \\"hi\\""'),
        ("a # b", '#SBATCH --comment="a # b"'),
        ("back\\slash \\", '#SBATCH --comment="back\\\\slash \\\\"'),
        ("it's", '#SBATCH --comment="it\'s"'),
    ],
)
def test_an_option_is_written_as_sbatchs_reader_wants_it(in_tmp: Path, text: str, line: str) -> None:
    """Worked out by hand from what a real sbatch made of them: a backslash counts within quotes too."""
    assert line in script(override("launcher.comment", text)).splitlines()


def test_everything_that_was_asked_for_is_in_the_script(in_tmp: Path) -> None:
    written = script(
        "launcher.account=acct",
        "launcher.partition=h100",
        "launcher.qos=high",
        "launcher.nodes=3",
        "launcher.time=1-04:30:00",
        "launcher.exclusive=true",
        "launcher.cpus_per_task=16",
        "launcher.gpus_per_node=8",
        "launcher.sbatch_arguments=['--mail-type=END',--contiguous]",
        "launcher.srun_arguments=['--cpu-bind=none']",
        "launcher.requeue=false",
        "launcher.signal_seconds=90",
        "launcher.pre_commands=['echo \"as it is\" $HOME']",
    )
    for line in (
        "#SBATCH --account=acct",
        "#SBATCH --partition=h100",
        "#SBATCH --qos=high",
        "#SBATCH --nodes=3",
        "#SBATCH --time=1-04:30:00",
        "#SBATCH --exclusive",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --mail-type=END",
        "#SBATCH --contiguous",
        "#SBATCH --no-requeue",
        "#SBATCH --signal=B:USR1@90",
        f"#SBATCH --chdir={os.getcwd()}",
        'echo "as it is" $HOME',
    ):
        assert line in written.splitlines()
    assert "scontrol requeue" not in written
    check, run = execute(written.replace("--requeue", ""), in_tmp)
    assert {"--nodes=3", "--cpus-per-task=16", "--cpu-bind=none", "--kill-on-bad-exit=1"} <= set(run)
    assert "--kill-on-bad-exit=0" in check
    assert "--ntasks-per-node=1" in check


def test_one_task_a_gpu(in_tmp: Path) -> None:
    written = script("launcher.tasks=gpu", "launcher.nodes=2", "launcher.nproc_per_node=4")
    check, run = execute(written, in_tmp)
    assert {"--ntasks=8", "--ntasks-per-node=4"} <= set(run)
    assert {"--ntasks=2", "--ntasks-per-node=1"} <= set(check)


def test_gpus_come_from_the_hardware_and_none_are_asked_for_when_emulated(in_tmp: Path) -> None:
    native = dry_run(parse(["launcher=slurm", "hardware=gb200", "fp8_recipe=mxfp8"]))
    assert "#SBATCH --gpus-per-node=4" in native
    assert "gpus-per-node" not in script("hardware=gb200")
    with pytest.raises(ConfigError, match=r"launcher\.nproc_per_node needs a value"):
        dry_run(parse(["launcher=slurm"]))


def test_an_array_has_one_task_for_each_combination(in_tmp: Path) -> None:
    sweep = "fp8_recipe=delayed,tensorwise,blockwise"
    written = script("-m", sweep, "training.seed=1,2", "launcher.array_parallel=2")
    assert "#SBATCH --array=0-5%2" in written
    assert "# task 0: fp8_recipe=delayed training.seed=1" in written
    assert "# task 5: fp8_recipe=blockwise training.seed=2" in written
    _, run = execute(written, in_tmp)
    assert after(run, "--on-node")[0] == "-m"
    assert sweep in run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "launcher.nodes=1,2"], "share launcher.nodes"),
        (["-m", "fp8_recipe=delayed,tensorwise", "run_dir=/x"], "is one directory, and there are 2 jobs"),
        (["-m", "fp8_recipe=delayed,tensorwize"], "tensorwise"),
        (["fp8_recipe=delayed,tensorwise"], "several values"),
    ],
)
def test_sweeps_that_cannot_be(in_tmp: Path, words: list[str], said: str) -> None:
    with pytest.raises(Fp8Error, match=said):
        script(*words)


@pytest.mark.parametrize(
    ("status", "told", "restarts", "requeued"),
    [
        (143, True, 0, True),
        (143, True, 20, False),
        (143, False, 0, False),
        (0, True, 0, False),
        (1, True, 0, False),
    ],
)
def test_a_job_goes_back_into_the_queue_only_when_its_time_was_up_and_it_saved(
    in_tmp: Path, status: int, told: bool, restarts: int, requeued: bool
) -> None:
    """SLURM's signal to the batch shell is sent by the stand-in for srun, which then ends as the job does."""
    tools = in_tmp / "tools"
    tools.mkdir()
    signal = 'kill -USR1 "$PPID"; sleep 1' if told else "sleep 0"
    (tools / "srun").write_text(
        f'#!/bin/sh\n[ -n "$NEMO_FP8_ONLY_CHECK" ] && exit 0\ntrap : USR1\n{signal}\nexit {status}\n'
    )
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tools}/requeued\n')
    for name in ("srun", "scontrol"):
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "SLURM_JOB_ID": "42",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(
        ["bash"], input=script("training.save_every=10"), cwd=in_tmp, env=environment, text=True, timeout=60
    )
    assert done.returncode == status
    assert (tools / "requeued").exists() is requeued


def test_a_failing_check_ends_the_job_before_it_starts(in_tmp: Path) -> None:
    tools = in_tmp / "tools"
    tools.mkdir()
    (tools / "srun").write_text(f'#!/bin/sh\n[ -n "$NEMO_FP8_ONLY_CHECK" ] && exit 2\ntouch {tools}/ran\n')
    (tools / "srun").chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "42"}
    done = subprocess.run(["bash"], input=script(), cwd=in_tmp, env=environment, text=True, timeout=60)
    assert done.returncode == 2
    assert not (tools / "ran").exists()
