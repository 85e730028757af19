"""The random-number generators of one rank: torch's, the device's, and Megatron's tensor-parallel ones."""

from __future__ import annotations

import torch

__all__ = ["collect", "restore"]

TRACKER = "tracker/"


def collect(device: torch.device) -> dict[str, torch.Tensor]:
    """Generator states, uint8, by name."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[TRACKER + name] = state.get_state() if isinstance(state, torch.Generator) else state
    return {name: state.detach().cpu().clone() for name, state in states.items()}


def restore(states: dict[str, torch.Tensor], device: torch.device) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
    tracker = get_cuda_rng_tracker()
    current = tracker.get_states()
    for name, state in current.items():
        if isinstance(state, torch.Generator):
            state.set_state(states[TRACKER + name])
        else:
            current[name] = states[TRACKER + name]
    tracker.set_states(current)
