"""Extra states of delayed scaling from other trainers' checkpoints: restored, and never run."""

from __future__ import annotations

import os
import pickle
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.support.te_release import RELEASE, since

pytestmark = pytest.mark.usefixtures("emulated")


def trained(recipe: Any) -> Any:
    """A linear that has made one step with a Transformer Engine recipe object."""
    import torch
    import transformer_engine.pytorch as te

    module = te.Linear(32, 32, params_dtype=torch.bfloat16)
    with te.autocast(enabled=True, recipe=recipe):
        output = module(torch.randn(32, 32, dtype=torch.bfloat16))
    output.sum().backward()
    return module


def as_tensor(state: Any) -> Any:
    import torch

    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


@pytest.mark.parametrize("by_megatron", [False, True], ids=["te", "megatron"])
def test_histories_and_scales_come_back(by_megatron: bool) -> None:
    import torch
    import transformer_engine.pytorch as te

    import nemo_fp8_recipes as fp8
    from nemo_fp8_recipes.injection.extra_state import loadable_extra_state
    from nemo_fp8_recipes.injection.te_object import megatron_te_object

    recipe = fp8.load("delayed", amax_history_len=4)
    saved = trained(megatron_te_object(recipe) if by_megatron else recipe.te())
    state, fresh = saved.get_extra_state(), te.Linear(32, 32, params_dtype=torch.bfloat16)
    with _refused():
        fresh.set_extra_state(state)
    with loadable_extra_state():
        fresh.set_extra_state(state)
    for direction in ("scaling_fwd", "scaling_bwd"):
        ours, theirs = fresh.fp8_meta[direction], saved.fp8_meta[direction]
        assert torch.equal(ours.amax_history, theirs.amax_history)
        assert torch.equal(ours.scale, theirs.scale)
        assert theirs.amax_history.abs().sum() > 0
    with _refused():
        fresh.set_extra_state(state)


def _refused() -> AbstractContextManager[Any]:
    """Pickles are refused since 2.16.1 and 2.17.1; earlier releases load every one."""
    refuses = RELEASE not in ("2.11", "2.14")
    return pytest.raises(RuntimeError, match="Refusing to load") if refuses else nullcontext()


class Runs:
    """Pickles as a call of `os.system`."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.file}'",)


@since("2.17")
def test_a_state_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    import torch
    import transformer_engine.pytorch as te

    from nemo_fp8_recipes.injection.extra_state import is_safe, loadable_extra_state

    file = tmp_path / "ran"
    state = as_tensor({"recipe": Runs(file), "scale_fwd": torch.ones(3)})
    with loadable_extra_state(), pytest.raises(RuntimeError, match="Refusing to load"):
        te.Linear(32, 32, params_dtype=torch.bfloat16).set_extra_state(state)
    assert not file.exists()
    inside_a_storage = torch.storage._load_from_bytes
    hidden = pickle.dumps(_Call(inside_a_storage, pickle.dumps(Runs(file))))
    assert not is_safe(hidden)
    assert not is_safe(pickle.dumps(sorted))
    assert not is_safe(b"\x80\x04garbage")
    assert not file.exists()


class _Call:
    """Pickles as a call of any function with one argument."""

    def __init__(self, function: Any, argument: Any) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> Any:
        return self.call
