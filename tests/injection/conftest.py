"""Megatron-Core on the emulated device, and Transformer Engine's global state fresh for every test."""

from __future__ import annotations

import sys

import pytest

from . import gpt


@pytest.fixture(scope="module")
def megatron(emulated):
    """Megatron's process groups, for models of `gpt.build`."""
    with gpt.process_group():
        yield


@pytest.fixture
def trace(megatron):
    """`with trace() as observed`: what the emulated device computes."""
    from nemo_fp8_recipes.emulation import trace

    return trace


@pytest.fixture(autouse=True)
def _fresh_global_state():
    """Models of earlier tests stay registered with Transformer Engine's delayed-scaling buffers otherwise."""
    yield
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is not None:
        quantization.FP8GlobalStateManager.reset()
