"""The random Hadamard transform that NVFP4 applies to inputs and gradients before the weight gradient.

Follows Transformer Engine's `hadamard_transform/hadamard_transform.cu` and `pytorch/tensor/nvfp4_tensor.py`.
It spreads an outlier over its block of 16. Both operands of the GEMM are transformed along the dimension that
is summed over, so the transforms cancel in the product.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from nemo_fp8_recipes.errors import RecipeError

__all__ = ["SIGN_MASK", "SIZE", "matrix", "random_hadamard_transform"]

SIZE = 16
SIGN_MASK = 0b1101_0111_1110_1000
"""Which elements of a block change their sign before the transform (bit i: element i): drawn once, by
Transformer Engine, so that all ranks and steps agree."""


def matrix(sign_mask: int, device: torch.device | None = None) -> Tensor:
    """diag(signs) @ H / 4 with the Hadamard matrix H of Sylvester's construction; orthogonal.

    Args:
        sign_mask: bit i set: the sign of element i is changed. 0 is the plain transform.
        device: where to make it.

    Returns:
        fp32 [16, 16] of 0.25 and -0.25.
    """
    return torch.tensor(_entries(sign_mask)).to(device)


@cache
def _entries(sign_mask: int) -> list[list[float]]:
    def minus(row: int, column: int) -> int:
        return ((row & column).bit_count() + (sign_mask >> row)) & 1

    size = range(SIZE)
    return [[-(SIZE**-0.5) if minus(row, column) else SIZE**-0.5 for column in size] for row in size]


def random_hadamard_transform(x: Tensor, sign_mask: int = SIGN_MASK) -> Tensor:
    """Transform every block of 16 along the last dimension.

    Summed in fp32, then rounded to x's dtype, as Transformer Engine does where fast math is off. The products
    are exact; the sum is too unless a block's magnitudes spread over more than twelve binades, and only then
    can the order of summation show. Here it is that of the fast transform: sums and differences of neighbours
    at distance 1, then 2, 4 and 8.

    Args:
        x: bf16, fp16 or fp32 [..., K], K a multiple of 16.
        sign_mask: see `matrix`.

    Returns:
        x's shape and dtype.

    Raises:
        RecipeError: K is not a multiple of 16.
    """
    if x.shape[-1] % SIZE:
        raise RecipeError(
            f"The Hadamard transform works on blocks of {SIZE}, and the last dimension is {x.shape[-1]}.",
            key="shape",
            value=tuple(x.shape),
        )
    factors = matrix(sign_mask, x.device)[:, 0]
    blocks = x.detach().to(torch.float32).reshape(-1, SIZE) * factors
    distance = 1
    while distance < SIZE:
        first, second = blocks.view(-1, SIZE // (2 * distance), 2, distance).unbind(2)
        blocks = torch.stack((first + second, first - second), dim=2)
        distance *= 2
    return blocks.to(x.dtype).view(x.shape)
