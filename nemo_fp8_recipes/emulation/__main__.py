"""Run a program that knows nothing of this package on the emulated device.

    python -m nemo_fp8_recipes.emulation [--device h100] script.py [arguments]
    python -m nemo_fp8_recipes.emulation [--device h100] -m module [arguments]

Under torchrun: torchrun --nproc-per-node 2 -m nemo_fp8_recipes.emulation script.py
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_fp8_recipes.emulation.devices import DEVICES
from nemo_fp8_recipes.emulation.installation import install
from nemo_fp8_recipes.errors import EmulationError, Fp8Error


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse our options, install the device, become the program."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_fp8_recipes.emulation",
        usage="%(prog)s [--device NAME] (script.py | -m module) [arguments]",
        description="Run a program on the emulated device.",
        epilog="Example: python -m nemo_fp8_recipes.emulation --device b200 pretrain.py --steps 10",
    )
    parser.add_argument(
        "--device", default="h100", help=f"GPU to pose as: {', '.join(DEVICES)} (default: h100)"
    )
    parser.add_argument("--quiet", action="store_true", help="do not announce the emulated device")
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module")
    parser.add_argument("program", help="the script, or with -m the module")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="the program's own arguments")
    options = parser.parse_args(arguments)
    try:
        _require_program(options.program, module=options.module)
        device = install(options.device)
    except Fp8Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if not options.quiet:
        print(f"[{device.label}] CPU numerics of {device.display_name}; times say nothing.", file=sys.stderr)
    sys.argv = [options.program, *options.rest]
    if options.module:
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(options.program, run_name="__main__")
    return 0


def _require_program(program: str, *, module: bool) -> None:
    """Put the program's directory first on the path; raises `EmulationError` where there is none."""
    sys.path[0] = str(Path.cwd() if module else Path(program).resolve().parent)
    if module:
        try:
            found = importlib.util.find_spec(program) is not None
        except ModuleNotFoundError:
            found = False
    else:
        found = Path(program).exists()
    if not found:
        raise EmulationError(f"There is no {'module' if module else 'script'} {program!r}.", value=program)


if __name__ == "__main__":
    sys.exit(main())
