"""python -m nemo_fp8_recipes.emulation.conformance PATH_TO_TE_TESTS [file …]"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nemo_fp8_recipes
from nemo_fp8_recipes.emulation.conformance.outcomes import Kept
from nemo_fp8_recipes.emulation.conformance.report import PartResult, left_out, markdown, read
from nemo_fp8_recipes.emulation.conformance.running import ENVIRONMENT, run
from nemo_fp8_recipes.emulation.conformance.suite import SUITE, Part


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every test that needs no real GPU passed, 1 when some did not, 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_fp8_recipes.emulation.conformance",
        description="Run Transformer Engine's own tests on the emulated device and tell what became of them.",
        epilog="Example: python -m nemo_fp8_recipes.emulation.conformance ~/TransformerEngine/tests/pytorch. "
        "Some files import nvdlfw-inspect and triton, and TE's own CI uses pytest 8.2.1: "
        "requirements/conformance.txt has them.",
    )
    parser.add_argument("tests", type=Path, help="tests/pytorch in a source tree of Transformer Engine")
    parser.add_argument("files", nargs="*", help="only these files of the suite, or others")
    parser.add_argument("--output", type=Path, help="write the table here (default: print it)")
    parser.add_argument("--sample", type=int, help="at most this many tests a file; 0: all")
    parser.add_argument("--file-minutes", type=float, default=30, help="stop a file after this long")
    parser.add_argument(
        "--keep",
        type=Path,
        help="keep outcomes here; use those of the same run, and go on where it was stopped",
    )
    parser.add_argument("--workers", type=int, default=1, help="as many files at a time")
    parser.add_argument(
        "--kept-only", action="store_true", help="run nothing, tell what --keep has, of any commit"
    )
    options = parser.parse_args(arguments)
    if options.kept_only and options.keep is None:
        parser.error("--kept-only needs --keep.")
    if not (options.tests / "test_recipe.py").is_file():
        print(f"error: {options.tests} is not tests/pytorch of Transformer Engine.", file=sys.stderr)
        return 2
    options.tests = options.tests.resolve()  # pytest runs in there
    parts = _parts(options.files, options.sample)
    missing = [part.file for part in parts if not (options.tests / part.file).is_file()]
    for file in missing:
        print(f"{file}: not in this source tree", file=sys.stderr)
    if len(missing) == len(parts):
        print("error: none of the files is in this source tree, nothing was run.", file=sys.stderr)
        return 2
    seconds = None if options.kept_only else options.file_minutes * 60
    results, absent, interrupted = [], list(missing), []
    commits: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.workers) as workers:
        there = [part for part in parts if part.file not in missing]
        kept = [_kept(options.keep or Path(scratch), options.tests, part) for part in there]
        run_one = functools.partial(_result, tests=options.tests, seconds=seconds)
        for part, outcomes, done in zip(there, kept, workers.map(run_one, there, kept), strict=True):
            if done is None:
                absent.append(part.file)
                continue
            results.append(done)
            commits.setdefault(outcomes.made_at(), []).append(part.label)
            if not outcomes.whole(of_any_sources=seconds is None):
                interrupted.append(part.label)
            print(
                f"{part.label}: {done.count('passed')} passed, {done.count('failed')} failed, "
                f"{done.count('needs a real GPU')} need a real GPU, {done.count('skipped')} skipped",
                file=sys.stderr,
            )
    notes = _notes(results, options.tests, commits)
    if interrupted:
        labels = ", ".join(f"`{label}`" for label in interrupted)
        notes += ["", f"Interrupted, so that not all of its sample was run: {labels}."]
    if absent:
        notes += ["", f"Not run: {', '.join(f'`{file}`' for file in dict.fromkeys(absent))}."]
    more = [] if options.files else left_out(options.tests)
    table = markdown(results, title="Transformer Engine's own tests, emulated", notes=notes, more=more)
    if options.output is None:
        print(table)
    else:
        options.output.write_text(table, encoding="utf-8")
    return int(any(result.count("failed") for result in results))


def _parts(files: Iterable[str], sample: int | None) -> list[Part]:
    known: dict[str, list[Part]] = {}
    for part in SUITE:
        known.setdefault(part.file, []).append(part)
    parts = [part for file in files for part in known.get(file, [Part(file)])] or list(SUITE)
    if sample is None:
        return parts
    return [dataclasses.replace(part, sample=sample) for part in parts]


def _result(part: Part, kept: Kept, tests: Path, seconds: float | None) -> PartResult | None:
    """Run a part, or what an earlier run of the very same left of it; `seconds` None: run nothing, and take
    what there is of any commit.
    """
    if seconds is not None and not kept.whole():
        kept.begin()
        run(tests, part, seconds, kept)
    entries = kept.entries(of_any_sources=seconds is None)
    return read(part, entries) if entries else None


def _kept(folder: Path, tests: Path, part: Part) -> Kept:
    name = re.sub(r"[^\w.]+", "-", part.label).strip("-")
    return Kept(folder / f"{name}.jsonl", _made_of(tests, part), _commit())


def _made_of(tests: Path, part: Part) -> dict[str, Any]:
    """What decides the outcomes of a part, so that those of anything else are not used for it."""
    return {
        "part": json.loads(json.dumps(dataclasses.asdict(part))),
        "python": sys.version.split()[0],
        "transformer_engine": importlib.metadata.version("transformer-engine"),
        "torch": importlib.metadata.version("torch"),
        "test": hashlib.sha256((tests / part.file).read_bytes()).hexdigest(),
        "sources": _sources(),
        "environment": ENVIRONMENT,
    }


@functools.cache
def _sources() -> str:
    """Digest of what is emulated. Of the runner only the plugin has a say in the outcomes."""
    package = Path(nemo_fp8_recipes.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for name in ("emulation", "numerics") for path in (package / name).rglob("*.*")):
        runner = path.is_relative_to(Path(__file__).parent) and path.name != "plugin.py"
        if path.suffix in (".py", ".cpp", ".hpp") and not runner:
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _commit() -> str:
    """The commit of this package's checkout, marked where something is changed; "" outside a checkout."""
    command = ["git", "-C", str(Path(nemo_fp8_recipes.__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""


def _at(commits: Mapping[str, Sequence[str]]) -> list[str]:
    """Which commit of this package the outcomes are of, and those that are of another one."""
    first, *others = sorted(commits, key=lambda commit: -len(commits[commit]))
    lines = [f"This package was at commit {first}."] if first else []
    for commit in others:
        labels = ", ".join(f"`{label}`" for label in commits[commit])
        lines.append(f"At {commit or 'another one'}: {labels}.")
    return lines


def _notes(results: Sequence[PartResult], tests: Path, commits: Mapping[str, Sequence[str]]) -> list[str]:
    version = importlib.metadata.version("transformer-engine")
    sampled = sum(result.collected > len(result.outcomes) for result in results)
    files = {result.part.file for result in results}
    stamp = tests.parent.parent / "build_tools" / "VERSION.txt"
    source = f"its source tree at {stamp.read_text().strip()}" if stamp.is_file() else "a source tree"
    return [
        f"Transformer Engine {version}, torch {importlib.metadata.version('torch')}. Made by",
        "`python -m nemo_fp8_recipes.emulation.conformance PATH_TO_TE/tests/pytorch`.",
        f"The tests are those of {source}. Nothing of this ran on a GPU.",
        *(_at(commits) if commits else []),
        "",
        f"{sampled} of the {len(results)} rows, of {len(files)} files, are sampled (column *run*): the tests",
        "are spread evenly over the parameters of every test function. *Needs a real GPU* is only what uses",
        "fused attention, CUDA graphs, userbuffers, several real GPUs, or a kernel that there is only",
        "compiled.",
    ]


if __name__ == "__main__":
    sys.exit(main())
