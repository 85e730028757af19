"""How tests get the emulated device.

It changes a process for good (torch.cuda, torch's constructors, Transformer Engine's binding), and one
process poses as one GPU. So:

* The pytest process poses as a **B200**, from the first test that asks for it: all four FP8 recipes run on
  it.
  A test module that needs Transformer Engine or Megatron-Core says so at its top, and imports them inside its
  tests and fixtures (or below the line):

      pytestmark = pytest.mark.usefixtures("emulated")

  Blockwise runs there as it does on a Blackwell GPU: with power-of-two scales, through MXFP8 GEMMs.

* What needs another GPU, a fresh process, or several ranks, runs in subprocesses:

      from tests.support.processes import run_emulated, run_ranks
      loss = run_emulated("... result(loss.item())", device="h100")
      by_rank = run_ranks("... result([...])", ranks=2, device="h100", tmp_path=tmp_path)

* A test module that must see torch without the device (native behaviour, "imports no torch") uses
  `run_python`.

On a machine whose GPU works, tests that ask for the emulated device are skipped; there the same stack runs
natively.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nemo_fp8_recipes.emulation import EmulatedDevice

POSING_AS = "b200"


@pytest.fixture(scope="session")
def emulated() -> EmulatedDevice:
    """The pytest process poses as a B200 from here to its end; the value is the posing device."""
    from nemo_fp8_recipes import emulation

    if emulation.active() is None:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU; the emulated device is for machines without one")
    return emulation.install(POSING_AS)
