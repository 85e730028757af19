"""Putting the emulated device in place, and taking it away."""

from __future__ import annotations

import os
import sys
import types
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from nemo_fp8_recipes.emulation.devices import EmulatedDevice, device
from nemo_fp8_recipes.emulation.ledger import Patch, PatchLedger
from nemo_fp8_recipes.errors import EmulationError

__all__ = ["active", "emulated", "install", "label", "patches", "uninstall"]

_active: EmulatedDevice | None = None
_ledger = PatchLedger()
_imported_before: set[str] = set()


def active() -> EmulatedDevice | None:
    """The posing device of this process, or None."""
    return _active


def label() -> str | None:
    """What records say of the device: "emulated h100"; None where nothing is emulated."""
    return None if _active is None else _active.label


def patches() -> tuple[Patch, ...]:
    """Everything the emulated device changed in other modules, with the reasons."""
    return tuple(_ledger)


def install(name: str = "h100") -> EmulatedDevice:
    """Make this process run on the emulated device, posing as the GPU `name`.

    Call it before Transformer Engine or Megatron-Core is imported; it imports `transformer_engine.pytorch`.
    Calling it again for the same GPU changes nothing.

    Raises:
        EmulationError: unknown GPU; another one is installed; CUDA works here; Transformer Engine or
        Megatron-Core is
            imported already; Transformer Engine is missing or of a release that is not emulated.
    """
    global _active
    wanted = device(name)
    if _active is not None:
        if _active == wanted:
            return _active
        raise EmulationError(
            f"This process poses as {_active.name} already and cannot change to {wanted.name}.",
            key="hardware",
            value=name,
            allowed=[_active.name],
            hint="Use another process; Transformer Engine keeps what it found out about the device.",
        )
    # Idle OpenMP threads spin by default. The step is made of short operations, so on a machine that other
    # programs use too, spinning made it more than ten times slower. Read when torch loads its OpenMP.
    passive = "OMP_WAIT_POLICY" not in os.environ
    if passive:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        import torch
    except ImportError as error:
        raise EmulationError(
            f"The emulated device needs PyTorch, which cannot be imported: {error}.",
            hint="pip install 'nemo-fp8-recipes[cpu]' brings the emulated stack: torch 2.6 or later, "
            "megatron-core 0.15 or 0.16, transformer-engine 2.20 (or 2.11, 2.14, 2.17).",
        ) from error

    if torch.cuda.is_available():
        raise EmulationError(
            "CUDA works on this machine: the emulated device is for machines without a GPU.",
            hint="To emulate here all the same, hide the GPUs with CUDA_VISIBLE_DEVICES= (empty).",
        )
    if "transformer_engine.pytorch" in sys.modules or "transformer_engine_torch" in sys.modules:
        raise EmulationError(
            "Transformer Engine is imported already; the emulated device must be installed before it.",
            hint="Call nemo_fp8_recipes.emulation.install() first, or start the program with "
            "python -m nemo_fp8_recipes.emulation.",
        )
    from nemo_fp8_recipes.emulation import bridge, distributed, megatron, nemo, telemetry, torch_cuda
    from nemo_fp8_recipes.emulation.te_import import import_transformer_engine

    megatron.require_not_imported()
    _imported_before.clear()
    _imported_before.update(sys.modules)
    if passive:
        _ledger.add(
            "os.environ['OMP_WAIT_POLICY']",
            "idle OpenMP threads that spin slow the emulated step down",
            _let_threads_spin,
        )
    try:
        torch_cuda.apply(_ledger, wanted)
        distributed.apply(_ledger)
        megatron.apply(_ledger)
        bridge.apply(_ledger)
        nemo.apply(_ledger)
        telemetry.apply(_ledger)
        import_transformer_engine(_ledger, wanted)
    except BaseException:
        _ledger.undo()
        raise
    _active = wanted
    return wanted


def uninstall() -> tuple[str, ...]:
    """Take back every change, in reverse order: of torch, of Transformer Engine, of `sys.modules`.

    What cannot be restored is other packages that were imported meanwhile (Megatron-Core, a program's own
    modules): they keep what they looked up at import, functions of the posing device and Transformer Engine's
    classes. They are named by a `RuntimeWarning` and returned; use a new process for what comes next.

    Returns:
        The modules that keep something of the emulated device, sorted.
    """
    global _active
    changed = _ledger.stand_ins()
    _ledger.undo()
    _active = None
    left = _keepers(changed)
    if left:
        packages = sorted({name.split(".")[0] for name in left})
        warnings.warn(
            f"The emulated device is gone, but {len(left)} modules of {', '.join(packages)} were imported on "
            "it and keep what they looked up: they do not work with another device in this process.",
            RuntimeWarning,
            stacklevel=2,
        )
    return left


def _let_threads_spin() -> None:
    os.environ.pop("OMP_WAIT_POLICY", None)


def _keepers(changed: Collection[int]) -> tuple[str, ...]:
    """Modules imported since `install` in whose names something of ours, or of TE, is left."""
    own = ("torch", "transformer_engine", "transformer_engine_torch", __name__.split(".")[0])
    found = []
    for name, module in list(sys.modules.items()):
        if name in _imported_before or name.split(".")[0] in own or not isinstance(module, types.ModuleType):
            continue
        for value in vars(module).values():
            home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "")
            from_te = isinstance(home, str) and home.split(".")[0].startswith("transformer_engine")
            if id(value) in changed or from_te:
                found.append(name)
                break
    return tuple(sorted(found))


@contextmanager
def emulated(name: str = "h100") -> Iterator[EmulatedDevice]:
    """`install` for the duration of a block.

    In a process that poses as the same GPU already it changes nothing and leaves the device in place. What
    `uninstall` says of leaving holds here too.
    """
    outermost = _active is None
    posing = install(name)
    try:
        yield posing
    finally:
        if outermost:
            uninstall()
