"""Check the documentation against the checkout: links, commands, make targets and configuration overrides.

Run by `make lint`. Prints one line per problem and exits 1 when there is any.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from nemo_fp8_recipes.cli import COMMANDS
from nemo_fp8_recipes.config import compose
from nemo_fp8_recipes.errors import Fp8Error
from nemo_fp8_recipes.launch.slurm.jobs import combinations

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
FENCE = re.compile(r"^(?:    )?```(\w*)\n(.*?)^(?:    )?```", re.MULTILINE | re.DOTALL)
MAKE_TARGET = re.compile(r"^([a-z][\w.-]*):", re.MULTILINE)
# Placeholders in examples (RUN, <run>, …) stand for something only the reader has.
PLACEHOLDER = re.compile(r"<[^>]*>|\.\.\.|…|\$|\bRUN\b|/path/")
COMPOSING = {"train", "show", "doctor"}


def documents() -> list[Path]:
    return sorted(
        path
        for path in ROOT.rglob("*.md")
        if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)
    )


def broken_links(path: Path, text: str) -> Iterator[str]:
    for target in LINK.findall(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        if not (path.parent / target).exists():
            yield f"link to {target}, which does not exist"


def command_lines(text: str) -> Iterator[str]:
    for language, body in FENCE.findall(text):
        if language in ("", "sh", "bash", "console"):
            joined = body.replace("\\\n", " ")
            for line in joined.splitlines():
                yield line.strip().removeprefix("$ ").split("  #")[0].strip()


def wrong_commands(text: str, make_targets: set[str]) -> Iterator[str]:
    names = {command.name for command in COMMANDS}
    for line in command_lines(text):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        if words[:1] == ["make"]:
            target = next((word for word in words[1:] if "=" not in word), None)
            if target is not None and target not in make_targets:
                yield f"make target '{target}' does not exist"
            words = next((shlex.split(word[5:]) for word in words if word.startswith("ARGS=")), [])
            if target == "train":
                yield from wrong_overrides(line, words)
            continue
        if "nemo-fp8" in words:
            words = words[words.index("nemo-fp8") :]
        elif "nemo_fp8_recipes" in words and "-m" in words:
            words = words[words.index("nemo_fp8_recipes") :]
        else:
            continue
        if len(words) > 1 and not words[1].startswith(("-", "<")) and words[1] not in names:
            yield f"command 'nemo-fp8 {words[1]}' does not exist"
        elif len(words) > 1 and words[1] in COMPOSING:
            yield from wrong_overrides(line, words[2:])


def wrong_overrides(line: str, words: list[str]) -> Iterator[str]:
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    if PLACEHOLDER.search(" ".join(overrides)):
        return
    jobs: list[tuple[str, ...]] = [tuple(overrides)]
    if "-m" in words:  # Hydra's multirun: a job for each combination
        by_slurm = ("launcher=slurm",) if "hydra/launcher=submitit_slurm" in overrides else ()
        ours = [word for word in overrides if not word.startswith(("hydra.", "hydra/"))]
        jobs = combinations((*by_slurm, *ours))
    try:
        for job in jobs:
            compose(job)
    except Fp8Error as error:
        yield f"`{line}` does not compose: {error}"


def wrong_python(text: str) -> Iterator[str]:
    for language, body in FENCE.findall(text):
        if language == "python":
            try:
                ast.parse(body)
            except SyntaxError as error:
                yield f"Python example does not parse: {error}"


def main() -> int:
    make_targets = set(MAKE_TARGET.findall((ROOT / "Makefile").read_text()))
    problems = []
    for path in documents():
        text = path.read_text()
        for problem in (*broken_links(path, text), *wrong_commands(text, make_targets), *wrong_python(text)):
            problems.append(f"{path.relative_to(ROOT)}: {problem}")
    print("\n".join(problems) if problems else f"documentation: {len(documents())} files checked, no problem")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
