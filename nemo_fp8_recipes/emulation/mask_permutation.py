"""Moving tokens to their experts and back by a routing mask, as Transformer Engine's Triton kernels do.

Follows `common/triton/permutation.py` of Transformer Engine: what `moe_permute` and `moe_unpermute` with a
mask and `moe_sort_chunks_by_index` run on. Sums over a token's experts are made in FP32 in the kernels'
order, the last expert first; a compiled kernel may fuse a product with the sum, which rounds once less.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["replace_kernels"]


def replace_kernels(module: ModuleType) -> None:
    """Put the functions of this file in the place of those that launch kernels.

    Args:
        module: `transformer_engine.pytorch.triton.permutation`.
    """
    for function in (
        make_row_id_map,
        permute_with_mask_map,
        unpermute_with_mask_map,
        unpermute_with_mask_map_bwd_with_merging_probs,
        make_chunk_sort_map,
        sort_chunks_by_map,
    ):
        setattr(module, function.__name__, _called_as(getattr(module, function.__name__), function))


def _called_as(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, given its arguments by the names that they have in `original`: releases differ in them."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def named(*args: Any, **kwargs: Any) -> Any:
        return function(**signature.bind(*args, **kwargs).arguments)

    return named


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """Where each token's copies go: rows are ordered by expert, then by token.

    Args:
        routing_map: [num_tokens, num_experts], 1 or True where a token is sent to an expert.

    Returns:
        int32 [num_tokens, 2 * num_experts + 1]: a token's rows, the last first; from column num_experts on
        their experts; in the last column their number. -1 fills what is left.
    """
    import torch

    routed = routing_map.to(torch.bool)
    rows = (routed.mT.reshape(-1).cumsum(0) - 1).view(num_experts, num_tokens).mT
    rows, experts = torch.where(routed, rows, -1).sort(dim=1, descending=True, stable=True)
    experts = torch.where(rows < 0, -1, experts)
    return torch.cat([rows, experts, routed.sum(1, keepdim=True)], dim=1).to(torch.int32)


def _copies(
    row_id_map: Tensor, num_experts: int, pad_offsets: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each place in `row_id_map` the tokens that use it, and their rows and experts there."""
    count = row_id_map[:, -1]
    for place in range(int(count.max()) if count.numel() else 0):
        tokens = (count > place).nonzero()[:, 0]
        rows = row_id_map[tokens, place].long()
        experts = row_id_map[tokens, num_experts + place].long()
        yield tokens, rows if pad_offsets is None else rows + pad_offsets[experts].long(), experts


def permute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    scale: Tensor | None,
    num_tokens: int,  # noqa: ARG001 -- the kernels' arguments
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
    scale_hidden_dim: int,
    pad_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Copy tokens, and their block scales and probabilities, to their rows.

    Args:
        inp: [num_tokens, hidden_size].
        probs: [num_tokens, num_experts]; a copy of probability 0 is padding and becomes 0.
        scale: [num_tokens, scale_hidden_dim].
        pad_offsets: [num_experts], what is added to an expert's rows; rows between are 0.

    Returns:
        [num_out_tokens, hidden_size], the permuted `scale`, the permuted `probs` [num_out_tokens].
    """
    output = inp.new_zeros((num_out_tokens, hidden_size))
    permuted_probs = None if probs is None else probs.new_zeros((num_out_tokens,))
    permuted_scale = None if scale is None else scale.new_zeros((num_out_tokens, scale_hidden_dim))
    for tokens, rows, experts in _copies(row_id_map, num_experts, pad_offsets):
        if scale is not None and permuted_scale is not None:
            _bits(permuted_scale)[rows] = _bits(scale)[tokens]
        if probs is not None and permuted_probs is not None:
            prob = probs[tokens, experts]
            permuted_probs[rows] = prob
            tokens, rows = tokens[prob != 0], rows[prob != 0]  # the other rows stay 0
        _bits(output)[rows] = _bits(inp)[tokens]
    return output, permuted_scale, permuted_probs


def unpermute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None,
    permuted_probs: Tensor | None,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
    pad_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum a token's copies, weighted where there are `merging_probs` [num_tokens, num_experts].

    Args:
        inp: [rows, hidden_size].
        permuted_probs: [rows], to be sent back to their tokens.

    Returns:
        [num_tokens, hidden_size] in the type of `inp`, and the probabilities [num_tokens, num_experts].
    """
    import torch

    total = inp.new_zeros((num_tokens, hidden_size), dtype=torch.float32)
    probs = None if permuted_probs is None else permuted_probs.new_zeros((num_tokens, num_experts))
    for tokens, rows, experts in _copies(row_id_map, num_experts, pad_offsets):
        copies = inp[rows].float()
        if merging_probs is not None:
            copies = copies * merging_probs[tokens, experts, None].float()
        total[tokens] += copies
        if probs is not None and permuted_probs is not None:
            probs[tokens, experts] = permuted_probs[rows]
    return total.to(inp.dtype), probs


def unpermute_with_mask_map_bwd_with_merging_probs(
    fwd_output_grad: Tensor,
    row_id_map: Tensor,
    fwd_input: Tensor,
    merging_probs: Tensor,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
    pad_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute_with_mask_map`.

    Returns:
        That of its input [num_out_tokens, hidden_size], that of `merging_probs` [num_tokens, num_experts].
    """
    grad = fwd_output_grad.new_zeros((num_out_tokens, hidden_size))
    probs_grad = merging_probs.new_zeros((num_tokens, num_experts))
    for tokens, rows, experts in _copies(row_id_map, num_experts, pad_offsets):
        upstream = fwd_output_grad[tokens].float()
        grad[rows] = (upstream * merging_probs[tokens, experts, None].float()).to(grad.dtype)
        probs_grad[tokens, experts] = (fwd_input[rows].float() * upstream).sum(1).to(probs_grad.dtype)
    return grad, probs_grad


def make_chunk_sort_map(
    split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int
) -> Tensor:
    """Where the rows of chunks go that are put in another order.

    Args:
        split_sizes: [num_splits], rows of each chunk.
        sorted_indices: [num_splits], the chunks in their new order.

    Returns:
        int32 [num_tokens]: each row's new place; rows that are in no chunk stay.
    """
    import torch

    sizes, order = split_sizes.tolist(), sorted_indices.tolist()[:num_splits]
    starts = [sum(sizes[:chunk]) for chunk in range(num_splits)]
    moved = torch.arange(num_tokens, dtype=torch.int32)
    place = 0
    for chunk in order:
        moved[starts[chunk] : starts[chunk] + sizes[chunk]] = torch.arange(place, place + sizes[chunk])
        place += sizes[chunk]
    return moved


def sort_chunks_by_map(
    inp: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    num_tokens: int,
    hidden_size: int,
    is_forward: bool,
) -> tuple[Tensor, Tensor | None]:
    """Move rows [num_tokens, hidden_size] and `probs` [num_tokens] to, or back from, their places."""
    places = row_id_map.long()

    def moved(rows: Tensor, *width: int) -> Tensor:
        output = rows.new_empty((num_tokens, *width))
        if is_forward:
            _bits(output)[places] = _bits(rows)
        else:
            _bits(output)[:] = _bits(rows)[places]
        return output

    return moved(inp, hidden_size), None if probs is None else moved(probs)


def _bits(tensor: Tensor) -> Tensor:
    """Torch moves the rows of 8-bit floats by another type only."""
    import torch

    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
