"""What is compared: every quantiser with its options on every kind of input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.targets.versions import at_least

if TYPE_CHECKING:
    import torch

__all__ = [
    "HADAMARD_KINDS",
    "KINDS",
    "QUANTIZERS",
    "RECIPES",
    "STOCHASTIC_KINDS",
    "Case",
    "cases",
    "make_input",
]

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4")

QUANTIZERS: dict[str, tuple[dict[str, Any], ...]] = {
    "delayed": (
        {"fmt": "e4m3", "scale": 3.5},
        {"fmt": "e5m2", "scale": 3.5},
        {"fmt": "e4m3", "scale": 1e-30},
    ),
    "tensorwise": (
        {"fmt": "e4m3"},
        {"fmt": "e5m2"},
        {"fmt": "e4m3", "power_of_two": True},
        {"fmt": "e4m3", "epsilon": 1e3},
    ),
    "blockwise": (
        *({"fmt": fmt, "dim": dim, "epsilon": 0.0} for fmt in ("e4m3", "e5m2") for dim in (1, 2)),
        {"fmt": "e4m3", "dim": 1, "epsilon": 1e-3},
    ),
    "mxfp8": ({"fmt": "e4m3"}, {"fmt": "e5m2"}),
    "nvfp4": (
        {"two_d": False},
        {"two_d": True},
        {"two_d": False, "hadamard": True},
        {"two_d": False, "stochastic": True},
    ),
}
"""Recipe -> the option sets of its quantiser; "divided" is added where TE's release has that rule."""

KINDS = ("normal", "binades", "zeros", "subnormal", "largest", "special", "every_16_bit_value")
"""normal: N(0, 1). binades: over 24 of them. zeros: signed, whole blocks. subnormal: of the input's type.
largest: at and next to the type's end. special: infinities and NaN among binades. every_16_bit_value: all
finite ones in bf16 and fp16, as many in fp32."""

HADAMARD_KINDS = ("narrow", "narrow_tiles")
"""What the Hadamard transform is compared on: multiples of 1/16 below 128, whose sums are exact in whatever
order a device adds them. narrow_tiles: of a shape that TE's fused kernel takes."""

STOCHASTIC_KINDS = ("normal", "binades")
"""What stochastic rounding is judged on, by its distribution (`stochastic.py`)."""


@dataclass(frozen=True)
class Case:
    """One quantisation.

    Attributes:
        recipe: one of `RECIPES`.
        options: of `QUANTIZERS`.
        kind: one of `KINDS`, or of those for an option.
        dtype: "fp32", "bf16" or "fp16".
    """

    recipe: str
    kind: str
    dtype: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.recipe}[{options}]/{self.kind}/{self.dtype}"


NVFP4_DIVIDES_BEFORE = "2.14"
"""Transformer Engine releases before this one find NVFP4's block scales by a division."""


def cases(recipe: str, te_version: str | None = None) -> Iterator[Case]:
    """Every case of a recipe, for a release of Transformer Engine; None: the newest."""
    older = te_version is not None and not at_least(te_version, NVFP4_DIVIDES_BEFORE)
    rule = {"divided": True} if recipe == "nvfp4" and older else {}
    for options in ({**each, **rule} for each in QUANTIZERS[recipe]):
        kinds: tuple[str, ...] = KINDS
        dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
        if options.get("hadamard"):
            kinds, dtypes = HADAMARD_KINDS, ("bf16",)
        elif options.get("stochastic"):
            kinds = STOCHASTIC_KINDS
        for kind in kinds:
            for dtype in dtypes:
                yield Case(recipe, kind, dtype, options)


def make_input(kind: str, dtype: str) -> torch.Tensor:
    """The input of a case, always the same: [128, 192] on the host, [256, 256] for every 16-bit value and
    whole tiles.
    """
    import torch

    element = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    shape = (256, 256) if kind in ("every_16_bit_value", "narrow_tiles") else (128, 192)
    generator = torch.Generator().manual_seed((*KINDS, *HADAMARD_KINDS).index(kind))
    info = torch.finfo(element)
    x = torch.randn(shape, generator=generator)
    spread = torch.exp2(torch.randint(-12, 12, shape, generator=generator).to(torch.float32))
    if kind == "binades":
        x = x * spread
    elif kind == "zeros":
        x = torch.where(torch.rand(shape, generator=generator) < 0.5, 0.0, x)
        x[:64] = 0.0
        x[32:64] = -0.0
    elif kind == "subnormal":
        return (x.double() * info.tiny / 8).to(element)
    elif kind in HADAMARD_KINDS:
        sixteenths = torch.randint(-255, 256, shape, generator=generator).to(torch.float32)
        outlier = torch.rand(shape, generator=generator) < 1 / 16
        return torch.where(outlier, sixteenths / 2, sixteenths / 16).to(element)
    elif kind == "largest":
        ends = torch.tensor([info.max, -info.max, info.max / 2, info.tiny, info.eps], dtype=torch.float64)
        return ends[torch.randint(0, len(ends), shape, generator=generator)].to(element)
    elif kind == "special":
        odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
        pick = odd[torch.randint(0, len(odd), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < 0.01, pick, x * spread)
        x[0, :] = float("nan")
    elif kind == "every_16_bit_value":
        bits = torch.randperm(1 << 16, generator=generator).to(torch.int32)
        if dtype == "fp32":
            x = (bits << 16).view(torch.float32) * (1 + 2.0**-20)
        else:
            x = bits.to(torch.int16).view(element).to(torch.float32)
        x = x.nan_to_num(nan=1.0, posinf=2.0, neginf=-2.0).view(shape)
    return x.to(element)
