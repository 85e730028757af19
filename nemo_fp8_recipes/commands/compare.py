"""`nemo-fp8 compare`: recipes trained side by side, and one table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.commands.arguments import take_flags, take_options
from nemo_fp8_recipes.comparison import Comparison, Plan, compare, execute, make_plan
from nemo_fp8_recipes.comparison.plan import BASELINE, COMPARISON_FILE
from nemo_fp8_recipes.comparison.progress import Display
from nemo_fp8_recipes.comparison.table import render
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.terminal import Terminal
from nemo_fp8_recipes.training.display import make_console
from nemo_fp8_recipes.training.files import atomic_write_json
from nemo_fp8_recipes.training.run_directory import read_run

__all__ = ["HELP", "run"]

FAILED = 1

HELP = """
usage: nemo-fp8 compare fp8_recipe=NAME,NAME,... [group=choice] [group.key=value] ... [options]
       nemo-fp8 compare RUN RUN ... [options]

Train the same model on the same data from the same seed with each recipe, one run after the other, each in
a run directory of its own, and print one table: loss, difference from BF16, held-out loss, step time, share
of the GEMMs that is quantised, SQNR and underflow where telemetry has them. BF16 is run first as the
baseline. All runs are checked before the first one starts; one that fails does not stop the others. With run
directories instead of recipes nothing is trained, and the table is made of what they hold.

  run_dir=PATH             directory of the comparison; default: runs/compare-<time>
  --run 'NAME key=value'   one more run, for options that not every recipe has; may be repeated
  --baseline NAME          compare with this recipe (or, of run directories, with this one) instead of bf16
  --no-baseline            compare with none
  --resume                 go on in run_dir: finished runs are kept, others start from their newest checkpoint
  --json                   print one JSON document; progress goes to stderr

examples:
  nemo-fp8 compare fp8_recipe=mxfp8,blockwise,delayed training.steps=100
  nemo-fp8 compare --run 'delayed fp8_recipe.amax_history_len=16' --run delayed training.steps=100
  nemo-fp8 compare runs/mxfp8-20260101-120000 runs/blockwise-20260101-130000 --no-baseline

Ctrl-C ends the run in progress as it would end nemo-fp8 train; go on with --resume. Exit status 1: a run
failed.
"""


def run(arguments: list[str]) -> int:
    """Compare the recipes or run directories that `arguments` name."""
    options, rest = take_options(arguments, {"--run", "--baseline"})
    flags, words = take_flags(rest, {"--json", "--resume", "--no-baseline"})
    baseline = _baseline(options.get("--baseline", []), flags)
    directories = [Path(word) for word in words if "=" not in word and not word.startswith("~")]
    if directories:
        if len(directories) < len(words) or "--run" in options or "--resume" in flags:
            raise ConfigError("Give recipes to train or run directories to read, not both.")
        return _show(_of_directories(directories, baseline), as_json="--json" in flags)
    plan = make_plan(
        words,
        more=options.get("--run", []),
        baseline=BASELINE if baseline is None and "--no-baseline" not in flags else baseline,
        resume="--resume" in flags,
    )
    return _run(plan, resume="--resume" in flags, as_json="--json" in flags)


def _baseline(given: list[str], flags: set[str]) -> str | None:
    if len(given) > 1 or (given and "--no-baseline" in flags):
        raise ConfigError("--baseline is given twice, or with --no-baseline.", key="--baseline", value=given)
    return given[0] if given else None


def _run(plan: Plan, *, resume: bool, as_json: bool) -> int:
    console = Terminal(stderr=True, highlight=False) if as_json else make_console(quiet=False)
    with Display(plan, console) as display:
        status = execute(plan, display, resume=resume)
    runs = {variant.label: (variant.recipe, variant.path) for variant in plan.variants}
    comparison = compare(runs, plan.baseline)
    atomic_write_json(plan.directory / COMPARISON_FILE, comparison.to_dict())
    shown = _show(comparison, as_json=as_json)
    if status:
        console.print(
            f"Stopped. Go on with the same command and run_dir={plan.directory} --resume",
            markup=False,
            soft_wrap=True,
        )
    return status or shown


def _of_directories(directories: list[Path], baseline: str | None) -> Comparison:
    """Runs that are there already, named as their directories, or by path where two names are the same."""
    names = [path.resolve().name for path in directories]
    labels = [
        name if names.count(name) == 1 else str(path) for name, path in zip(names, directories, strict=True)
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{label} is given twice.", value=label)
    runs = {
        label: (str(read_run(path)["recipe"].get("name")), path)
        for label, path in zip(labels, directories, strict=True)
    }
    return compare(runs, _which(runs, baseline))


def _which(runs: Mapping[str, tuple[str, Path]], baseline: str | None) -> str | None:
    """The label of the baseline: named by label, path or recipe; by default the one run in BF16, if any."""
    if baseline is not None:
        where = Path(baseline).resolve()
        for label, (_, path) in runs.items():
            if baseline == label or where == path.resolve():
                return label
    recipe = recipes.resolve(baseline or BASELINE).canonical
    found = [label for label, (name, _) in runs.items() if name == recipe]
    if len(found) == 1:
        return found[0]
    if baseline is None:
        return None
    raise ConfigError(
        f"--baseline {baseline} is {'none' if not found else 'more than one'} of the runs.",
        key="--baseline",
        value=baseline,
        allowed=list(runs),
    )


def _show(comparison: Comparison, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(comparison.to_dict(), indent=1, allow_nan=False))
    else:
        render(comparison, make_console(quiet=False))
    failed = any(outcome.status in ("failed", "not started") for outcome in comparison.outcomes)
    return FAILED if failed else 0
