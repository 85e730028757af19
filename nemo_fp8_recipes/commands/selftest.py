"""`nemo-fp8 selftest`: Transformer Engine's kernels on this GPU against our numerics, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.commands.arguments import take_flags, take_options
from nemo_fp8_recipes.errors import ConfigError, nearest
from nemo_fp8_recipes.selftest.cases import RECIPES, cases, make_input

if TYPE_CHECKING:
    from nemo_fp8_recipes.selftest.compare import Verdict
    from nemo_fp8_recipes.selftest.vectors import Recorded

__all__ = ["HELP", "run"]

DISAGREES = 1
NO_GPU = 3

HELP = """
usage: nemo-fp8 selftest [--recipe NAME]... [--export FILE] [--json]
       nemo-fp8 selftest --check FILE [--json]

On a GPU node: quantise generated tensors of every nasty kind (zeros, subnormals, infinities, NaN, every
16-bit value) with Transformer Engine's own kernels and with this package's numerics, and compare codes and
scales bit for bit; likewise the fused amax update of delayed scaling. Stochastic rounding has no bits to
compare: its codes must be neighbours of their values, and go up as often as the distance says. Says which
recipes agree on this device with this release.

  --recipe NAME   only this recipe: delayed, tensorwise, blockwise, mxfp8, nvfp4
  --export FILE   keep what the kernels made (.npz): the format is in nemo_fp8_recipes/selftest/vectors.py
  --check FILE    compare such a file with the numerics of this machine; needs no GPU
  --json          one JSON document

exit status: 0 everything that this device can run agrees, 1 something differs, 2 bad arguments, 3 there is no
GPU (nothing was compared)

example:
  nemo-fp8 selftest --export h100.npz
  nemo-fp8 selftest --check h100.npz
"""


def run(arguments: list[str]) -> int:
    valued = ("--recipe", "--export", "--check")
    options, rest = take_options(arguments, valued)
    flags, overrides = take_flags(rest, ("--json", *valued))
    if overrides:
        raise ConfigError(f"selftest takes no argument '{overrides[0]}'.", value=overrides[0])
    if "--check" in options:
        for other in ("--recipe", "--export"):
            if other in options:
                raise ConfigError(
                    f"--check compares everything in its file, and takes no {other}.", key=other
                )
    chosen = options.get("--recipe", list(RECIPES))
    for name in chosen:
        if name not in RECIPES:
            close = nearest(name, RECIPES)
            hint = f"Did you mean {close}?" if close else None
            raise ConfigError(
                f"There is no quantiser of recipe '{name}'.",
                key="--recipe",
                value=name,
                allowed=RECIPES,
                hint=hint,
            )
    if "--check" in options:
        return _check(Path(options["--check"][-1]), as_json="--json" in flags)
    export = Path(options["--export"][-1]) if "--export" in options else None
    if export is not None and not export.parent.is_dir():
        raise ConfigError(f"There is no directory {export.parent}.", key="--export", value=str(export))
    import torch

    from nemo_fp8_recipes import emulation

    if not torch.cuda.is_available():
        print(
            "nemo-fp8 selftest: there is no GPU that torch can use here, so there are no kernels to compare "
            "with. Run it on a GPU node; with --check FILE it compares what one exported.",
            file=sys.stderr,
        )
        return NO_GPU
    device = emulation.label() or torch.cuda.get_device_name()
    return _compare(chosen, export, device=device, as_json="--json" in flags)


def _compare(chosen: list[str], export: Path | None, *, device: str, as_json: bool) -> int:
    from nemo_fp8_recipes.selftest import native, vectors
    from nemo_fp8_recipes.selftest.compare import Verdict, compare, compare_update
    from nemo_fp8_recipes.targets.transformer_engine import installed_version
    from nemo_fp8_recipes.training.versions import installed_versions

    recorded: list[Recorded] = []
    verdicts: dict[str, Verdict] = {}
    for recipe in chosen:
        reason = native.why_not(recipe)
        if reason is not None:
            verdicts[recipe] = Verdict(not_run=reason)
            continue
        for case in cases(recipe, installed_version()):
            x = make_input(case.kind, case.dtype)
            recorded.append((case, x, native.native(case, x)))
    verdicts |= compare(recorded)
    if "delayed" in chosen and verdicts["delayed"].not_run is None:
        verdicts["amax update"] = compare_update(native.update)
    versions = installed_versions()
    if export is not None:
        vectors.write(export, recorded, device=device, versions=versions)
    return _tell(verdicts, device, versions, as_json=as_json)


def _check(path: Path, *, as_json: bool) -> int:
    from nemo_fp8_recipes.selftest import vectors
    from nemo_fp8_recipes.selftest.compare import compare

    about, recorded = vectors.read(path)
    return _tell(compare(recorded), about["device"], about["versions"], as_json=as_json)


def _tell(verdicts: dict[str, Verdict], device: str, versions: dict[str, Any], *, as_json: bool) -> int:
    differs = any(verdict.differing for verdict in verdicts.values())
    if as_json:
        found = {
            name: {"compared": verdict.compared, "differing": verdict.differing, "not_run": verdict.not_run}
            for name, verdict in verdicts.items()
        }
        print(
            json.dumps(
                {"schema_version": 1, "device": device, "versions": versions, "recipes": found}, indent=1
            )
        )
        return DISAGREES if differs else 0
    print(f"{device}, " + ", ".join(f"{name} {version or '-'}" for name, version in versions.items()))
    for name, verdict in verdicts.items():
        if verdict.not_run is not None:
            print(f"  {name:12} not run: {verdict.not_run}")
        elif verdict.differing:
            print(f"  {name:12} DIFFERS in {len(verdict.differing)} of {verdict.compared} cases")
            for case, told in list(verdict.differing.items())[:5]:
                print(f"      {case}: {told}")
        else:
            print(f"  {name:12} agrees bit for bit in {verdict.compared} cases")
    return DISAGREES if differs else 0
