"""Transformer Engine's own tests under the emulated device.

    python -m nemo_fp8_recipes.emulation.conformance PATH_TO_TE/tests/pytorch [--output table.md]

TE ships its tests in its source tree, not in the wheel; they are written for CUDA devices. `suite.py` says
which files are run and what may excuse a test, `plugin.py` runs them, `report.py` makes the table.
"""
