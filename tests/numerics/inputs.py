"""Inputs that reach the corners of the rules."""

from __future__ import annotations

import math

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mixed(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, special: bool = True) -> torch.Tensor:
    """Random values over many binades; with `special`, some zeros, infinities, NaN and extremes too."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values = values * torch.exp2(torch.randint(-12, 12, shape, generator=generator).float())
    if special:
        info = torch.finfo(dtype)
        odd = torch.tensor(
            [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, info.min, info.tiny, -info.tiny / 4],
            dtype=torch.float64,
        )
        pick = torch.randint(0, len(odd), shape, generator=generator)
        chance = torch.rand(shape, generator=generator) < 0.01
        values = torch.where(chance, odd[pick].to(torch.float32), values)
    return values.to(dtype)


def amaxes() -> torch.Tensor:
    """fp32 magnitudes at and next to every boundary a scale rule can have."""
    powers = torch.exp2(torch.arange(-149, 128, dtype=torch.float64)).to(torch.float32)
    fp8 = torch.cat([powers[20:250] * 448.0, powers[20:240] * 57344.0])
    centres = torch.cat([powers, fp8[torch.isfinite(fp8)]])
    up = torch.nextafter(centres, torch.tensor(math.inf))
    down = torch.nextafter(centres, torch.tensor(0.0))
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(4000, generator=generator) * torch.exp2(
        torch.randint(-148, 127, (4000,), generator=generator).float()
    )
    special = torch.tensor([0.0, math.inf, math.nan, torch.finfo(torch.float32).max])
    return torch.cat([centres, up, down, spread, special])
