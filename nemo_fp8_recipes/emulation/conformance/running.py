"""Running the tests of one part, in a pytest of their own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from nemo_fp8_recipes.emulation.conformance.outcomes import Kept
from nemo_fp8_recipes.emulation.conformance.report import STOPPED
from nemo_fp8_recipes.emulation.conformance.suite import Part

__all__ = ["ENVIRONMENT", "run"]

# Attention in FP8 falls to TE's unfused attention, which is plain torch, once it may emulate FP8.
ENVIRONMENT = {"NVTE_UnfusedDPA_Emulate_FP8": "1"}

_RANKS = Path(__file__).parent / "ranks"
"""Its `sitecustomize` makes the processes that a test starts under torchrun pose as the device too."""


def run(tests: Path, part: Part, seconds: float, kept: Kept) -> None:
    """Run the tests of a part that `kept` tells nothing of, for at most so many seconds, and add what became
    of them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        ended, status = "", 0
        before = any("id" in entry for entry in kept.entries())
        environment = _environment(tests, part, Path(scratch))
        with log.open("w", encoding="utf-8") as out:
            if part.prepare:
                first = [sys.executable, "-m", "nemo_fp8_recipes.emulation", "--device", part.device]
                subprocess.run(
                    [*first, *part.prepare], cwd=tests, env=environment, stdout=out, stderr=out, check=False
                )
            process = subprocess.Popen(
                _command(tests, part, kept.path),
                cwd=tests,
                env=environment,
                stdout=out,
                stderr=out,
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                ended = f"{STOPPED} {seconds / 60:.1f} minutes"
            finally:
                if process.poll() is None:
                    _kill(process)
        entries = kept.entries()
        fine = (0, 1, 5) if before else (0, 1)  # pytest's own: all passed, some failed, none was left
        said = log.read_text(encoding="utf-8", errors="replace")
        if status not in fine and not ended:
            ran = sum("id" in entry for entry in entries)
            ended = f"pytest ended with status {status} after {ran} tests: {said[-300:]}"
        if not any("id" in entry for entry in entries):
            ended = ended or said[-500:]
        if ended:
            kept.add([{"id": part.file, "outcome": "failed", "message": ended}])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With the ranks that a test may have started."""
    family = psutil.Process(process.pid)
    for one in [family, *family.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def _command(tests: Path, part: Part, outcomes: Path) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "nemo_fp8_recipes.emulation.conformance.plugin"]
    command += ["-p", "no:cacheprovider", "-p", "no:randomly", "--rootdir", str(tests), part.file]
    command += ["--emulated-device", part.device, "--emulated-devices", str(part.processes)]
    command += ["--outcomes", str(outcomes), "--sample", str(part.sample)]
    if part.keyword:
        command += ["-k", part.keyword]
    if part.file.startswith("debug/"):
        command += ["--feature_dirs", _debug_features(), "--configs_dir", _debug_configs(tests)]
    return command


def _environment(tests: Path, part: Part, scratch: Path) -> dict[str, str]:
    environment = {**os.environ, **ENVIRONMENT, **dict(part.environment)}
    environment["NVTE_TEST_NVINSPECT_FEATURE_DIRS"] = _debug_features()
    environment["NVTE_TEST_CHECKPOINT_ARTIFACT_PATH"] = str(scratch / "checkpoints")
    environment.setdefault("NVTE_TEST_NVINSPECT_CONFIGS_DIR", _debug_configs(tests))
    paths = [str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    if part.processes > 1:
        paths.insert(0, str(_RANKS))
        environment["NEMO_FP8_RANKS_POSE_AS"] = part.device
        # Tests call `torchrun` by its name.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def _debug_configs(tests: Path) -> str:
    return f"{tests / 'debug' / 'test_configs'}/"


def _debug_features() -> str:
    found = importlib.util.find_spec("transformer_engine")
    return str(Path(found.origin).parent / "debug" / "features") if found and found.origin else ""
