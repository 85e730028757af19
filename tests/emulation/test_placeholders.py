"""What is left of Triton where it is not installed says so when it is used."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from nemo_fp8_recipes.emulation.placeholders import placeholders

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed")


def test_a_launched_kernel_names_itself() -> None:
    with placeholders(("triton",)):
        import triton

    @triton.autotune(configs=[triton.Config({"BLOCK": 128})], key=["n"])
    @triton.jit
    def doubled(x: torch.Tensor, n: int) -> None:
        raise AssertionError("it was launched")

    with pytest.raises(NotImplementedError, match="Triton kernel doubled cannot run: the device is emulated"):
        doubled[(4,)](torch.zeros(4), 4)


def test_a_number_is_not_made_up() -> None:
    with placeholders(("triton",)):
        import triton

    for use in (
        lambda: min(128, triton.next_power_of_2(100)),
        lambda: 2 * triton.cdiv(100, 8),
        lambda: triton.cdiv(100, 8) - 1,
    ):
        with pytest.raises(NotImplementedError, match=r"triton is not installed \(triton\.\w+\(…\)"):
            use()


@pytest.mark.usefixtures("emulated")
def test_a_function_of_transformer_engine_that_is_only_a_kernel() -> None:
    import transformer_engine.pytorch  # noqa: F401 -- before its submodules
    from transformer_engine.pytorch.triton.mhc import mhc_fused_sinkhorn

    with pytest.raises(NotImplementedError, match="Triton kernel _mhc_sinkhorn"):
        mhc_fused_sinkhorn(torch.zeros(2, 2, 4, 4))
