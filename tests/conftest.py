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

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nemo_fp8_recipes.emulation import EmulatedDevice

POSING_AS = "b200"

if find_spec("hypothesis"):  # NeMo's and Bridge's environments do without
    from hypothesis import HealthCheck, settings

    # How fast inputs are made and tests run says what else the machine does, and nothing of the code.
    settings.register_profile("any-speed", suppress_health_check=[HealthCheck.too_slow], deadline=None)
    settings.load_profile("any-speed")


@pytest.fixture(scope="session")
def emulated() -> EmulatedDevice:
    """The pytest process poses as a B200 from here to its end; the value is the posing device."""
    from nemo_fp8_recipes import emulation

    if emulation.active() is None:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU; the emulated device is for machines without one")
    return emulation.install(POSING_AS)


@pytest.fixture(scope="module", autouse=True)
def _process_left_as_found() -> Iterator[None]:
    """What Megatron and Transformer Engine leave in the process does not reach the next test module:
    attention settings in the environment, process groups, amax buffers of models that are gone.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("NVTE_")}
    yield
    for name in [name for name in os.environ if name.startswith("NVTE_") and name not in before]:
        del os.environ[name]
    os.environ.update(before)
    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    if "transformer_engine.pytorch.quantization" in sys.modules:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
