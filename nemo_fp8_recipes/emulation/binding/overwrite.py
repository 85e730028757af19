"""Writing to tensors that the caller holds."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["overwrite"]


def overwrite(target: Tensor, value: Tensor) -> None:
    """`target.copy_(value)`, also to what was made in inference mode, as the compiled module writes: torch
    refuses that outside the mode, and a scale made in an evaluation lives on in training.
    """
    if target.is_inference():
        with torch.inference_mode():
            target.copy_(value)
    else:
        target.copy_(value)
