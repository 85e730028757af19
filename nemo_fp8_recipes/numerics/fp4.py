"""Casts between fp32 and E2M1, the element format of NVFP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.

Rounding to nearest follows the hardware conversion (`cvt.rn.satfinite.e2m1x2.f32`): ties to the even code,
magnitudes beyond 6 become 6 with their sign, zeros and underflows keep their sign, every NaN becomes +6 (the
format has no NaN). Stochastic rounding follows `stochastic_round_fp4_e2m1` in Transformer Engine's
`util/ptx.cuh`: eight random bits an element.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from nemo_fp8_recipes.numerics.philox import random_bytes

__all__ = [
    "E2M1_MAX",
    "decode_packed",
    "encode",
    "encode_stochastically",
    "pack",
    "random_bits",
    "random_key",
]

E2M1_MAX = 6.0

_SIGN = 0x8
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
_VALUES_OF_BYTES = [(_VALUES[byte & 0xF], _VALUES[byte >> 4]) for byte in range(256)]


def encode(scaled: Tensor) -> Tensor:
    """E2M1 codes of values that are already scaled, rounded to nearest.

    Args:
        scaled: fp32, any shape.

    Returns:
        uint8 of the same shape, one code a byte: the sign in bit 3, below it the magnitude's code 0 to 7.
    """
    magnitude = _saturate(scaled.detach().abs())
    step = _step(magnitude)
    return _codes(magnitude.div_(step).round_().mul_(step), scaled)


def encode_stochastically(scaled: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """E2M1 codes of values that are already scaled, rounded up or down at random.

    The chance to round away from zero is the distance from the lower neighbour, in 256ths of the step
    between neighbours, so the mean is the value itself to within a 256th of a step. Magnitudes beyond 6
    become 6.

    Args:
        scaled: fp32, any shape.
        generator: where the random bits come from; torch's default generator of the device when None. The
            bits are not those of a GPU, whose order is that of its threads.

    Returns:
        uint8 of the same shape, as `encode` gives them.
    """
    bits = random_bits(scaled, generator)
    magnitude = scaled.detach().abs()
    jittered = bits.to(torch.float32).mul_(1.0 / 256.0).mul_(_step(magnitude)).add_(magnitude)
    # The jitter can carry across the end of a region of equal steps; the grid is that of the sum.
    step = _step(jittered)
    return _codes(_saturate(jittered.div_(step).floor_().mul_(step)), scaled)


def random_key(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """What the random bits of one tensor are made from: int64 (1,), drawn from `generator`."""
    return torch.empty(1, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)


def random_bits(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The random bits that `encode_stochastically` draws for a tensor: `philox.random_bytes` under one
    `random_key`, in row-major order.

    Returns:
        uint8 of the tensor's shape.
    """
    return random_bytes(random_key(like.device, generator), like.numel()).view(like.shape)


def decode_packed(packed: Tensor) -> Tensor:
    """The fp32 values of packed E2M1 codes.

    Args:
        packed: uint8 [..., K / 2], as `pack` gives them.

    Returns:
        fp32 [..., K].
    """
    return embedding(packed.to(torch.int32), _pairs(packed)).flatten(-2)


_uploaded: dict[torch.device, Tensor] = {}


def _pairs(packed: Tensor) -> Tensor:
    """The two values of every byte, fp32 (256, 2), where `packed` is. Uploaded once: a copy to a GPU waits
    for it.
    """
    # Tensors of another kind, such as those that only say what they would be, mix with none of torch's own.
    kept = type(packed) is Tensor
    pairs = _uploaded.get(packed.device) if kept else None
    if pairs is None:
        pairs = torch.tensor(_VALUES_OF_BYTES).to(packed.device)
        if kept:
            _uploaded[packed.device] = pairs
    return pairs


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low half.

    Args:
        codes: uint8 below 16 [..., K], K even.

    Returns:
        uint8 [..., K / 2].
    """
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _saturate(magnitude: Tensor) -> Tensor:
    return magnitude.nan_to_num_(nan=E2M1_MAX).clamp_max_(E2M1_MAX)


def _codes(magnitude: Tensor, source: Tensor) -> Tensor:
    """Codes of magnitudes that E2M1 has, with the signs of `source`."""
    # The codes grow by 2, 1 and 1/2 for every 1 in the three regions of equal steps.
    code = torch.minimum(magnitude + 2.0, magnitude * 0.5 + 4.0)
    code = torch.minimum(code, magnitude.mul_(2.0)).to(torch.uint8)
    negative = torch.signbit(source) & ~torch.isnan(source)
    return code.bitwise_or_(negative.to(torch.uint8).mul_(_SIGN))


def _step(magnitude: Tensor) -> Tensor:
    """Distance to the next larger E2M1 magnitude: 0.5 below 2, 1 below 4, 2 from there on."""
    return torch.where(magnitude >= 4.0, 2.0, torch.where(magnitude >= 2.0, 1.0, 0.5))
