"""The command line: `nemo-fp8 <command> [overrides]`. Thin: each command lives in `commands/`."""

from __future__ import annotations

import errno
import importlib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from nemo_fp8_recipes import __version__, dependencies
from nemo_fp8_recipes.errors import ConfigError, Fp8Error, nearest

__all__ = ["COMMANDS", "main"]

INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, the module that runs it, and the line `--help` shows."""

    name: str
    summary: str

    @property
    def module(self) -> str:
        return f"nemo_fp8_recipes.commands.{self.name}"


class CommandModule(Protocol):
    HELP: str

    def run(self, arguments: list[str]) -> int: ...


COMMANDS = (
    Command("train", "pre-train a model with the recipe and log what it did"),
    Command("compare", "train recipes side by side, or read finished runs, and print one table"),
    Command("show", "print what a recipe composes to: recipe, TE object, Megatron fields"),
    Command("doctor", "check recipe, hardware, shapes and versions before the job starts"),
    Command("args", "print Megatron-LM's flags and environment for a recipe"),
    Command("data", "make the token files of data=megatron_indexed from text"),
    Command("launch", "start a job with torchrun or SLURM, the same command line on every node"),
    Command("runs", "list run directories: running, finished, failed and why, resumable"),
    Command("manifest", "show what each module of a run really did, and how two runs differ"),
    Command("report", "show what a finished or running run logged"),
    Command("selftest", "on a GPU node: compare the kernels with our numerics, bit for bit"),
)


def usage() -> str:
    width = max(len(command.name) for command in COMMANDS)
    commands = "\n".join(f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS)
    return (
        "usage: nemo-fp8 <command> [key=value ...] [--debug]\n\n"
        "FP8 recipes for NeMo and Megatron.\n\n"
        f"commands:\n{commands}\n\n"
        "  nemo-fp8 <command> --help   options and an example\n"
        "  nemo-fp8 --version\n\n"
        "example:\n  nemo-fp8 train fp8_recipe=mxfp8 training.steps=200\n"
    )


def _find(name: str) -> Command:
    for command in COMMANDS:
        if command.name == name:
            return command
    names = [command.name for command in COMMANDS]
    close = nearest(name, names)
    raise ConfigError(
        f"There is no command '{name}'.",
        allowed=names,
        hint=f"Did you mean '{close}'?" if close else "See nemo-fp8 --help.",
    )


def _ours(arguments: Sequence[str]) -> list[str]:
    """The words before `--`: what follows belongs to the user's own script."""
    return list(arguments[: arguments.index("--")] if "--" in arguments else arguments)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if arguments[0] == "--version":
        print(f"nemo-fp8 {__version__}")
        return 0
    command = _find(arguments[0])
    dependencies.require()
    module = cast("CommandModule", importlib.import_module(command.module))
    if any(argument in ("-h", "--help") for argument in _ours(arguments)):
        print(module.HELP.strip())
        return 0
    return module.run(arguments[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on an error the user can put right, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    ours = _ours(arguments)
    debug = "--debug" in ours or "debug=true" in ours
    arguments = [argument for argument in ours if argument != "--debug"] + arguments[len(ours) :]
    try:
        status = _dispatch(arguments)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
        return status
    except Fp8Error as error:
        if debug:
            traceback.print_exc()
        for line in (error, *getattr(error, "__notes__", ())):
            print(f"nemo-fp8: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("nemo-fp8: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`nemo-fp8 show … | head`): not an error of ours.
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or error.filename is not None:
            raise
        # Files of ours are written under errors of their own: this was the output.
        if debug:
            traceback.print_exc()
        print(f"nemo-fp8: Cannot write the output: {error.strerror}.", file=sys.stderr)
        sys.stdout = None  # Python would try once more at its end
        return Fp8Error.exit_code


if __name__ == "__main__":
    sys.exit(main())
