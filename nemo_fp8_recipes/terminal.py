"""The console that commands print to."""

from __future__ import annotations

import os
import sys

from rich.console import Console

__all__ = ["Terminal"]


class Terminal(Console):
    """Rich's console, whose reader may go away (`| head`) without ending the command.

    Rich would exit with 1, which says that a check failed, and in the middle of a training job. Here the rest
    is not shown, and the command goes on to its own exit status.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what is left in its buffer, and later prints
        os.close(nowhere)
