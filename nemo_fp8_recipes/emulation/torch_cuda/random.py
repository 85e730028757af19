"""The device's random state. Device tensors are host tensors and draw from the host generator, so that
generator plays the device's default one: saving, seeding and restoring "the CUDA state" acts on the numbers
that are drawn.

On a GPU the two states are separate, so a program that seeds only one of them sees different numbers there.
"""

# ruff: noqa: ARG001 -- the signatures are torch's

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nemo_fp8_recipes.emulation.ledger import PatchLedger
from nemo_fp8_recipes.emulation.torch_cuda.placement import host

__all__ = ["apply"]


def apply(ledger: PatchLedger) -> None:
    """Stand in for `torch.cuda`'s random functions and default generators."""
    generator = torch.default_generator

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return generator.get_state()

    def get_rng_state_all() -> list[torch.Tensor]:
        return [generator.get_state()]

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        generator.set_state(new_state)

    def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
        for state in new_states:
            generator.set_state(state)

    def manual_seed(seed: int) -> None:
        generator.manual_seed(int(seed))

    def manual_seed_all(seed: int) -> None:
        generator.manual_seed(int(seed))

    def seed() -> None:
        generator.seed()

    def seed_all() -> None:
        generator.seed()

    def initial_seed() -> int:
        return generator.initial_seed()

    reason = "the host generator plays the device's"
    for function in (
        get_rng_state,
        get_rng_state_all,
        set_rng_state,
        set_rng_state_all,
        manual_seed,
        manual_seed_all,
        seed,
        seed_all,
        initial_seed,
    ):
        ledger.set(torch.cuda, function.__name__, function, reason)
        ledger.set(torch.cuda.random, function.__name__, function, reason)
    ledger.set(torch.cuda, "default_generators", (generator,), reason)
    ledger.set(torch, "Generator", _posing_generator(torch.Generator), reason)


def _posing_generator(real: type) -> type:
    """torch.Generator that takes the posing device. Every generator is an instance of it, whoever made it."""

    class Kind(type(real)):  # type: ignore[misc]  # the metaclass is known at run time only
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

    class Generator(real, metaclass=Kind):
        def __new__(cls, device: Any = "cpu") -> Any:
            return real(host(device))

    Generator.__module__, Generator.__qualname__ = real.__module__, real.__qualname__
    return Generator
