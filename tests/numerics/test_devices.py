"""The numerics run on any device and never wait for it.

Fake tensors have shapes and devices but no data: reading a value on the host, branching on one, or mixing in
a tensor of another device is an error.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_fp8_recipes.numerics import E4M3, E5M2, blockwise, delayed, hadamard, mxfp8, nvfp4, tensorwise


def update_history(x: torch.Tensor) -> None:
    histories = [torch.zeros(16, width, device=x.device) for width in (3, 2)]
    scales = [torch.ones(width, device=x.device) for width in (3, 2)]
    delayed.update_amax_and_scale(
        histories, scales, torch.ones(5, device=x.device), algorithm="max", fp8_max=448.0
    )


def whole(x: torch.Tensor) -> torch.Tensor:
    """Only whole blocks of 16."""
    return x[:, : x.shape[1] // 16 * 16].contiguous()


def square(x: torch.Tensor) -> nvfp4.Blocks:
    return nvfp4.quantize_2d(whole(x), torch.ones(1, device=x.device))


WORK: dict[str, Callable[[torch.Tensor], object]] = {
    "tensorwise": lambda x: tensorwise.quantize_current(x, E4M3, epsilon=1e-6, power_of_two=True),
    "delayed": lambda x: delayed.quantize_delayed(x, E5M2, torch.ones(1, device=x.device)),
    "history": update_history,
    "1x128": lambda x: blockwise.dequantize_1d(*blockwise.quantize_1d(x, E4M3), E4M3),
    "128x1": lambda x: blockwise.dequantize_1d_columnwise(*blockwise.quantize_1d_columnwise(x, E5M2), E5M2),
    "128x128": lambda x: blockwise.dequantize_2d(*blockwise.quantize_2d(x, E4M3, epsilon=0.1), E4M3),
    "1x32": lambda x: mxfp8.dequantize_rowwise(*mxfp8.quantize_rowwise(x, E4M3), E4M3),
    "32x1": lambda x: mxfp8.dequantize_columnwise(*mxfp8.quantize_columnwise(x, E5M2), E5M2),
    "1x16": lambda x: nvfp4.quantize_1d(whole(x), torch.ones(1, device=x.device), stochastic=True),
    "16x16": lambda x: nvfp4.dequantize(*square(x), torch.ones(1, device=x.device)),
    "hadamard": lambda x: hadamard.random_hadamard_transform(whole(x)),
    "32x32": lambda x: mxfp8.dequantize_2d(*mxfp8.quantize_2d(x, E4M3), E4M3),
}


def test_a_host_read_would_be_noticed() -> None:
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.ones(1).item()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [(256, 128), (130, 70)])
@pytest.mark.parametrize("name", WORK)
def test_no_host_read_and_no_other_device(name: str, shape: tuple[int, int], device: str) -> None:
    with FakeTensorMode():
        result = WORK[name](torch.empty(shape, dtype=torch.bfloat16, device=device))
        tensors = result if isinstance(result, tuple) else () if result is None else (result,)
        assert all(tensor.device.type == device for tensor in tensors)
