"""Warnings of Megatron-Core, Transformer Engine and torch that say nothing about the user's job.

Each is ignored by its own words and with a reason; every other warning is shown.
"""

from __future__ import annotations

import warnings

__all__ = ["ignore_known_warnings"]

# Beginning of the message, category.
ALWAYS: tuple[tuple[str, type[Warning]], ...] = (
    # Megatron-Core's layer specs without Transformer Engine, which this job does not use.
    ("Apex is not installed", UserWarning),
    # Megatron-Core complains about the default of its own cuda_graph_scope.
    ("full scope is deprecated", UserWarning),
    # Megatron-Core's checkpoint format builds on torch's ShardedTensor.
    ("Please use DTensor instead", FutureWarning),
    # Megatron-Core and Transformer Engine call these by the names that older torch releases know.
    (r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated", FutureWarning),
    ("`load_state_dict` is deprecated", FutureWarning),
)
EMULATED: tuple[tuple[str, type[Warning]], ...] = (
    # GPU memory of BF16 weights beside their MXFP8 copies.
    ("mxfp8 without using reuse_grad_buf_for_mxfp8_param_ag", UserWarning),
    # Advice on how kernels and communication overlap: there are neither.
    ("To guarantee overlapping TP and SP collectives", UserWarning),
    ("When using (sequence|async tensor) parallelism it is recommended to set the environment", UserWarning),
)


def ignore_known_warnings(*, emulated: bool) -> None:
    """Install the filters for the rest of the process; call it before Megatron-Core is imported."""
    for message, category in (*ALWAYS, *(EMULATED if emulated else ())):
        warnings.filterwarnings("ignore", message=message, category=category)
