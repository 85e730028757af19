"""Running Python in processes of its own: for what changes a process for good, and for several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["ProcessFailedError", "run_emulated", "run_python", "run_ranks"]

_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH")
_REPORT = "@@result "


class ProcessFailedError(AssertionError):
    """The process ended with an error; the message holds its output."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A small environment: no launcher variables of the test runner's own, one thread a process."""
    env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    env.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", TOKENIZERS_PARALLELISM="false")
    env.update(extra or {})
    return env


def run_python(
    code: str,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    check: bool = True,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a snippet in a fresh interpreter with `tests/` importable; its output is captured as text."""
    return _finish(
        [sys.executable, "-c", _PRELUDE + textwrap.dedent(code)],
        env=env,
        timeout=timeout,
        check=check,
        cwd=cwd,
    )


def run_emulated(
    code: str,
    *,
    device: str = "h100",
    env: Mapping[str, str] | None = None,
    timeout: float = 180,
    cwd: Path | None = None,
    first: str = "",
) -> Any:
    """Run a snippet in a fresh process that poses as `device`; what it passed to `result(…)` comes back.

    `result` takes one JSON-able value and may be called once; without a call the value is None. `first` is a
    line that is run before the process poses.
    """
    install = f"{first}\nfrom nemo_fp8_recipes import emulation\nemulation.install({device!r})\n"
    done = run_python(install + textwrap.dedent(code), env=env, timeout=timeout, cwd=cwd)
    return _reported(done.stdout)


def run_ranks(
    code: str,
    *,
    ranks: int = 2,
    device: str = "h100",
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
    tmp_path: Path,
) -> list[Any]:
    """Run a snippet under torchrun in `ranks` processes that pose as `device`; each rank's `result(…)`, by
    rank.
    """
    script = tmp_path / "ranks.py"
    install = f"from nemo_fp8_recipes import emulation\nemulation.install({device!r})\n"
    report = f"_reports = {str(tmp_path)!r}\n"
    script.write_text(_PRELUDE + report + install + textwrap.dedent(code))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        str(script),
    ]
    _finish(command, env=env, timeout=timeout, check=True, cwd=tmp_path)
    paths = [tmp_path / f"rank{rank}.json" for rank in range(ranks)]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


_PRELUDE = f"""\
import json as _json, os as _os, sys as _sys
_sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
_reports = None
def result(value):
    if _reports is None:
        print({_REPORT!r} + _json.dumps(value), flush=True)
    else:
        with open(_os.path.join(_reports, "rank" + _os.environ["RANK"] + ".json"), "w") as file:
            _json.dump(value, file)
"""


def _reported(output: str) -> Any:
    lines = [line for line in output.splitlines() if line.startswith(_REPORT)]
    return json.loads(lines[-1].removeprefix(_REPORT)) if lines else None


def _finish(
    command: list[str],
    *,
    env: Mapping[str, str] | None,
    timeout: float,
    check: bool,
    cwd: Path | None,
) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        command,
        env=environment(env),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # with a launcher's workers, which would wait for ever
        output, errors = process.communicate()
        raise ProcessFailedError(
            f"still running after {timeout} s\n--- stdout\n{output[-4000:]}\n--- stderr\n{errors[-8000:]}"
        ) from None
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check and done.returncode != 0:
        raise ProcessFailedError(
            f"exit status {done.returncode}\n--- stdout\n{done.stdout[-4000:]}\n"
            f"--- stderr\n{done.stderr[-8000:]}"
        )
    return done
