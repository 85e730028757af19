"""Probes: what each family of recipes leaves behind, read from Transformer Engine's own state."""

from __future__ import annotations

from nemo_fp8_recipes.telemetry.probes.base import Probe, Reading, ReadingSpec
from nemo_fp8_recipes.telemetry.probes.blocks import BlockProbe
from nemo_fp8_recipes.telemetry.probes.delayed import DelayedProbe
from nemo_fp8_recipes.telemetry.probes.elements import ElementProbe
from nemo_fp8_recipes.telemetry.probes.nvfp4 import Nvfp4Probe
from nemo_fp8_recipes.telemetry.probes.tensorwise import TensorwiseProbe

__all__ = [
    "BlockProbe",
    "DelayedProbe",
    "ElementProbe",
    "Nvfp4Probe",
    "Probe",
    "Reading",
    "ReadingSpec",
    "TensorwiseProbe",
]
