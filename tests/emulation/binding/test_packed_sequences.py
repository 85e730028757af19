"""Packed sequences under context parallelism, against loops over the chunks of every sequence."""

from __future__ import annotations

import pytest
import torch

from tests.support.te_release import since

LENGTHS = [8, 16]
BOUNDS = torch.tensor([0, 8, 24], dtype=torch.int32)
TOKENS = 24


def held(rank, size):
    """The tokens of a rank: the chunks `rank` and `2 size - 1 - rank` of each sequence."""
    found, begin = [], 0
    for length in LENGTHS:
        chunk = length // (2 * size)
        for which in (rank, 2 * size - 1 - rank):
            found += range(begin + which * chunk, begin + (which + 1) * chunk)
        begin += length
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_tokens_of_a_rank(tex, size):
    seen = []
    for rank in range(size):
        indices = tex.thd_get_partitioned_indices(BOUNDS, TOKENS, size, rank)
        assert indices.dtype == torch.int32
        assert indices.tolist() == held(rank, size)
        seen += indices.tolist()
    assert sorted(seen) == list(range(TOKENS))


@since("2.20")
def test_the_order_of_the_ranks_and_back(tex):
    x = torch.randn(TOKENS, 3, 8)
    by_rank = tex.thd_sequence_order_to_cp_rank_order(x, BOUNDS, 2, TOKENS)
    assert torch.equal(by_rank, x[held(0, 2) + held(1, 2)])
    assert torch.equal(tex.thd_cp_rank_order_to_sequence_order(by_rank, BOUNDS, 2, TOKENS), x)


HALVES = ([*range(4), *range(8, 16)], [*range(4, 8), *range(16, 24)])


@pytest.mark.parametrize("which", [0, 1])
def test_one_half_of_every_sequence(tex, which):
    x = torch.randn(TOKENS, 2, 8)
    assert torch.equal(tex.thd_read_half_tensor(x, BOUNDS, which), x[HALVES[which]])
    both = torch.stack((x, -x))
    assert torch.equal(tex.thd_read_half_tensor(both, BOUNDS, which), both[:, HALVES[which]])


@pytest.mark.parametrize("packed", [True, False])
def test_log_sum_exps_of_the_second_halves(tex, packed):
    heads = 3
    lse = torch.randn(heads, TOKENS) if packed else torch.randn(2, heads, 16)
    half = tex.thd_read_second_half_lse(lse, BOUNDS, packed, 12 if packed else 8)
    if packed:
        assert torch.equal(half, lse[:, HALVES[1]])
    else:
        assert torch.equal(half[0, :, :4], lse[0, :, 4:8])
        assert torch.equal(half[1], lse[1, :, 8:])
    step = torch.randn_like(half)
    before = lse.clone()
    tex.thd_second_half_lse_correction(lse, step, BOUNDS, packed)
    after = tex.thd_read_second_half_lse(lse, BOUNDS, packed, half.shape[-1])
    there = half != 0
    torch.testing.assert_close(after[there], torch.logaddexp(half, step)[there])
    first = HALVES[0] if packed else (slice(None), slice(None), slice(0, 4))
    assert torch.equal(lse[:, first] if packed else lse[first], before[:, first] if packed else before[first])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("second_half", [False, True])
def test_a_step_s_output_is_added_with_its_weight(tex, packed, second_half):
    heads, width = 3, 8
    tokens = HALVES[1] if second_half else list(range(TOKENS))
    out, step = torch.randn(TOKENS, heads, width), torch.randn(len(tokens), heads, width)
    lse = torch.randn(heads, TOKENS)
    step_lse = torch.randn(heads, len(tokens))
    expected = out.clone()
    weight = torch.exp(step_lse - lse[:, tokens]).t()[..., None]
    expected[tokens] += step * weight
    if not packed:
        lse = torch.stack([torch.nn.functional.pad(lse[:, :8], (0, 8)), lse[:, 8:]])
        cut, longest = (4, 8) if second_half else (8, 16)
        first, second = step_lse[:, :cut], step_lse[:, cut:]
        step_lse = torch.stack([torch.nn.functional.pad(first, (0, longest - cut)), second])
    tex.thd_out_correction(out, step, lse, step_lse, BOUNDS, second_half, packed)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("first", "second"),
    [("add", "none"), ("copy", "none"), ("none", "add"), ("none", "copy"), ("add", "copy"), ("copy", "add")],
)
def test_gradients_of_the_halves(tex, first, second):
    grad = torch.randn(TOKENS, 2, 8).bfloat16()
    both = "none" not in (first, second)
    step = torch.randn(TOKENS if both else TOKENS // 2, 2, 8).bfloat16()
    expected = grad.clone()
    for what, tokens in ((first, HALVES[0]), (second, HALVES[1])):
        part = step[tokens] if both else step
        if what == "add":
            expected[tokens] += part
        elif what == "copy":
            expected[tokens] = part
    tex.thd_grad_correction(grad, step, BOUNDS, first, second)
    assert torch.equal(grad, expected)


def test_other_corrections_are_refused(tex):
    grad = torch.randn(TOKENS, 2, 8)
    with pytest.raises(RuntimeError, match="Unsupported Functor"):
        tex.thd_grad_correction(grad, grad, BOUNDS, "add", "add")


@since("2.20")
def test_padding_is_not_copied(tex):
    out, source = torch.zeros(TOKENS, 4), torch.randn(TOKENS, 4)
    valid = torch.tensor([0, 5, 15], dtype=torch.int32)
    tex.thd_copy_valid_tokens_from_per_split_to_rank_local(out, source, BOUNDS, valid)
    kept = [*range(5), *range(8, 18)]
    assert torch.equal(out[kept], source[kept])
    assert out.abs().sum() == source[kept].abs().sum()
