"""Which recipe runs on which compute capability, as TE's own checks decide it."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_fp8_recipes.recipes import Recipe, names

__all__ = [
    "CAPABILITIES",
    "Capability",
    "CapabilityRange",
    "any_gemm_layout",
    "posing_device",
    "recipes_for",
    "runs_on",
    "spelled",
]

Capability = tuple[int, int]

BLACKWELL: Capability = (10, 0)


@dataclass(frozen=True)
class CapabilityRange:
    """Compute capabilities from `minimum` up to, not including, `below`; None: no upper end."""

    minimum: Capability
    below: Capability | None = None

    def __contains__(self, capability: Capability) -> bool:
        return capability >= self.minimum and (self.below is None or capability < self.below)

    def __str__(self) -> str:
        if self.below is None:
            return f"{spelled(self.minimum)} and up"
        return f"{spelled(self.minimum)} up to, not including, {spelled(self.below)}"


# transformer_engine/pytorch/quantization.py: _compute_fp8_support, _compute_fp8_block_scaling_support,
# _compute_mxfp8_support, _compute_nvfp4_support. BF16 tensor cores exist since 8.0.
CAPABILITIES: dict[str, CapabilityRange] = {
    "bf16": CapabilityRange((8, 0)),
    "delayed": CapabilityRange((8, 9)),
    "tensorwise": CapabilityRange((8, 9)),
    "blockwise": CapabilityRange((9, 0)),
    "mxfp8": CapabilityRange((10, 0), below=(12, 0)),
    "nvfp4": CapabilityRange((10, 0)),
}


def spelled(capability: Capability) -> str:
    """(9, 0) as "9.0"."""
    return f"{capability[0]}.{capability[1]}"


def runs_on(recipe: str, capability: Capability) -> bool:
    """Whether TE runs the recipe of this name on a GPU of this compute capability."""
    return capability in CAPABILITIES[recipe]


def recipes_for(capability: Capability) -> tuple[str, ...]:
    """The recipes that run on this compute capability."""
    return tuple(name for name in names() if runs_on(name, capability))


def any_gemm_layout(capability: Capability) -> bool:
    """Whether per-tensor FP8 GEMMs take operands in any layout; elsewhere the inner dimension comes first.

    Source: nvte_is_non_tn_fp8_gemm_supported in TE's common/transformer_engine.cpp.
    """
    return (10, 0) <= capability < (12, 0) or capability >= (13, 0)


def posing_device(recipe: Recipe, hardware: str, *others: Recipe) -> str:
    """The device emulation poses as: the one named; for auto an H100, or a B200 where Hopper will not do
    for the job's recipe and the others of its schedule.
    """
    if hardware != "auto":
        return hardware
    return "h100" if all(runs_on(one.name, (9, 0)) for one in (recipe, *others)) else "b200"
