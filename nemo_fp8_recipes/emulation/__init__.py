"""The emulated device: Transformer Engine, Megatron-Core and torch code written for CUDA, run on a machine
without it.

    from nemo_fp8_recipes import emulation
    emulation.install("b200")               # before Transformer Engine or Megatron-Core is imported

or, for a program that knows nothing of this package: `python -m nemo_fp8_recipes.emulation --device b200
script.py`.

It stands in for two things: the CUDA runtime as torch shows it (`torch_cuda/`, `distributed.py`), and
Transformer Engine's compiled module (`binding/`). It is about numerics, never about speed, and everything
recorded says `emulated`.
"""

from __future__ import annotations

from nemo_fp8_recipes.emulation import devices
from nemo_fp8_recipes.emulation.devices import DEVICES, EmulatedDevice
from nemo_fp8_recipes.emulation.installation import active, emulated, install, label, patches, uninstall
from nemo_fp8_recipes.emulation.selection import NativeDevice, check_hardware, should_start, switch
from nemo_fp8_recipes.emulation.trace import trace

__all__ = [
    "DEVICES",
    "EmulatedDevice",
    "NativeDevice",
    "active",
    "check_hardware",
    "devices",
    "emulated",
    "install",
    "label",
    "patches",
    "should_start",
    "switch",
    "trace",
    "uninstall",
]
