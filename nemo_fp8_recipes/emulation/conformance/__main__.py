"""python -m nemo_fp8_recipes.emulation.conformance PATH_TO_TE_TESTS [file …]"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nemo_fp8_recipes
from nemo_fp8_recipes.emulation.conformance.report import STOPPED, PartResult, markdown, read
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
    parser.add_argument("--kept-only", action="store_true", help="run nothing, tell what --keep has")
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
    results = []
    absent = list(missing)
    for part in parts:
        if part.file not in missing:
            seconds = None if options.kept_only else options.file_minutes * 60
            done = _result(options.tests, part, seconds, options.keep)
            if done is None:
                absent.append(part.file)
                continue
            results.append(done)
            print(
                f"{part.label}: {done.count('passed')} passed, {done.count('failed')} failed, "
                f"{done.count('needs a real GPU')} need a real GPU, {done.count('skipped')} skipped",
                file=sys.stderr,
            )
    notes = _notes(results, options.tests)
    if absent:
        notes += ["", f"Not run: {', '.join(f'`{file}`' for file in absent)}."]
    table = markdown(results, title="Transformer Engine's own tests, emulated", notes=notes)
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


def _result(tests: Path, part: Part, seconds: float | None, keep: Path | None) -> PartResult | None:
    """Run a part, or read what an earlier run of the very same kept of it; `seconds` None: run nothing."""
    if keep is None:
        return None if seconds is None else read(part, _run(tests, part, seconds, []))
    made_of = _made_of(tests, part)
    kept = keep / f"{part.file.replace('/', '-')}.{part.device}.json"
    before: list[dict[str, Any]] = []
    if kept.exists():
        stored = json.loads(kept.read_text(encoding="utf-8"))
        if isinstance(stored, dict) and stored["made_of"] == made_of:
            before = stored["outcomes"]
    whole = bool(before) and not _stopped(before)
    if whole or seconds is None:
        return read(part, before) if before else None
    entries = _run(tests, part, seconds, [entry for entry in before if not _stopped([entry])])
    keep.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"made_of": made_of, "outcomes": entries}, indent=1), encoding="utf-8")
    return read(part, entries)


def _stopped(entries: Iterable[Mapping[str, Any]]) -> bool:
    return any(str(entry.get("message", "")).startswith(STOPPED) for entry in entries)


# Of the runner itself only the plugin has a say in the outcomes; the part is noted beside the digest.
_TELLING = ("report.py", "suite.py")


def _made_of(tests: Path, part: Part) -> dict[str, Any]:
    """What decides the outcomes of a part, so that those of anything else are not used for it."""
    package = Path(nemo_fp8_recipes.__file__).parent
    sources = [path for name in ("emulation", "numerics") for path in (package / name).rglob("*.*")]
    sources = sorted(
        path for path in sources if path.suffix in (".py", ".cpp", ".hpp") and path.name not in _TELLING
    )
    digest = hashlib.sha256()
    for path in [tests / part.file, *sources]:
        digest.update(path.read_bytes())
    return {
        "part": json.loads(json.dumps(dataclasses.asdict(part))),
        "python": sys.version.split()[0],
        "transformer_engine": importlib.metadata.version("transformer-engine"),
        "torch": importlib.metadata.version("torch"),
        "sources": digest.hexdigest(),
    }


def _run(
    tests: Path, part: Part, seconds: float, before: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Run the tests of a part that `before` tells nothing of; what it tells comes first in the answer."""
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = Path(scratch) / "outcomes.jsonl"
        outcomes.write_text("".join(f"{json.dumps(entry)}\n" for entry in before), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "nemo_fp8_recipes.emulation.conformance.plugin",
        ]
        command += ["-p", "no:cacheprovider", "-p", "no:randomly", "--rootdir", str(tests), part.file]
        command += [
            "--emulated-device",
            part.device,
            "--outcomes",
            str(outcomes),
            "--sample",
            str(part.sample),
        ]
        if part.keyword:
            command += ["-k", part.keyword]
        configs = f"{tests / 'debug' / 'test_configs'}/"
        features = _debug_features()
        if part.file.startswith("debug/"):
            command += ["--feature_dirs", features, "--configs_dir", configs]
        environment = {**os.environ, **_ENVIRONMENT, **dict(part.environment)}
        environment["NVTE_TEST_NVINSPECT_FEATURE_DIRS"] = features
        environment.setdefault("NVTE_TEST_NVINSPECT_CONFIGS_DIR", configs)
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        log = Path(scratch) / "log"
        ended = ""
        status = 0
        with log.open("w", encoding="utf-8") as out:
            try:
                status = subprocess.run(
                    command, cwd=tests, env=environment, stdout=out, stderr=out, timeout=seconds, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                ended = f"{STOPPED} {seconds / 60:.1f} minutes"
        entries = [json.loads(line) for line in outcomes.read_text(encoding="utf-8").splitlines()]
        fine = (0, 1, 5) if before else (0, 1)  # pytest's own: all passed, some failed, none was left
        if status not in fine and not ended:
            ran = sum("id" in entry for entry in entries)
            ended = f"pytest ended with status {status} after {ran} tests: "
            ended += log.read_text(encoding="utf-8", errors="replace")[-300:]
        if not any("id" in entry for entry in entries):
            ended = ended or log.read_text(encoding="utf-8", errors="replace")[-500:]
        if ended:
            entries.append({"id": part.file, "outcome": "failed", "message": ended})
        return entries


# Attention in FP8 falls to TE's unfused attention, which is plain torch, once it may emulate FP8.
_ENVIRONMENT = {"NVTE_UnfusedDPA_Emulate_FP8": "1"}


def _debug_features() -> str:
    from importlib.util import find_spec

    found = find_spec("transformer_engine")
    return str(Path(found.origin).parent / "debug" / "features") if found and found.origin else ""


def _notes(results: Sequence[PartResult], tests: Path) -> list[str]:
    version = importlib.metadata.version("transformer-engine")
    sampled = sum(result.collected > len(result.outcomes) for result in results)
    stamp = tests.parent.parent / "build_tools" / "VERSION.txt"
    source = f"its source tree at {stamp.read_text().strip()}" if stamp.is_file() else "a source tree"
    return [
        f"Transformer Engine {version}, torch {importlib.metadata.version('torch')}. Made by",
        "`python -m nemo_fp8_recipes.emulation.conformance PATH_TO_TE/tests/pytorch`.",
        f"The tests are those of {source}. Nothing of this ran on a GPU.",
        "",
        f"{sampled} of the {len(results)} files are sampled (column *run*): the tests are spread evenly over",
        "the parameters of every test function. *Needs a real GPU* is only what uses fused attention, CUDA",
        "graphs, userbuffers, several real GPUs, or a kernel that exists only compiled.",
    ]


if __name__ == "__main__":
    sys.exit(main())
