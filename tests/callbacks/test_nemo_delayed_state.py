"""Amax histories out of a pickle that is not run, and damaged ones."""

from __future__ import annotations

import pickle

import pytest

from nemo_fp8_recipes.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("emulated")


def test_tensors_come_out_and_damage_is_one_clear_error() -> None:
    import torch

    from nemo_fp8_recipes.callbacks.nemo_delayed_state import read_extra_state

    def stored(content: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    scale = torch.tensor([2.0, 4.0, 8.0])
    content = pickle.dumps({"scale_fwd": scale, "extra_fp8_variables": {"num_gemms": 1}})
    found = read_extra_state(stored(content))
    assert set(found) == {"scale_fwd"}
    assert torch.equal(found["scale_fwd"], scale)
    magic = bytes.fromhex("8a0a6cfc9c46f920")  # torch's own, before the storage
    assert magic in content
    for damaged in (content.replace(magic, bytes(8)), content[:-30], pickle.dumps(print)):
        with pytest.raises(CheckpointError, match="is not what Transformer Engine writes"):
            read_extra_state(stored(damaged))
