"""The fused router through TE's own functions, against plain torch and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.te_release import RELEASE, since

SCORES = {
    "softmax": lambda x: torch.softmax(x, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
}
FUNCTIONS = ["softmax", "sigmoid", pytest.param("sqrtsoftplus", marks=since("2.14"))]


@pytest.fixture
def router(te):
    from transformer_engine.pytorch import router

    return router


def reference(logits, topk, name, *, pre_softmax=False, bias=None, groups=None, group_topk=None, factor=None):
    scores = logits.double() if name == "softmax" and not pre_softmax else SCORES[name](logits.double())
    looked_at = scores if bias is None else scores + bias.double()
    if groups:
        best = looked_at.view(len(logits), groups, -1).topk(topk // group_topk, dim=-1).values.sum(-1)
        there = torch.zeros_like(best).scatter_(1, best.topk(group_topk, dim=-1).indices, 1.0).bool()
        looked_at = looked_at.masked_fill(~there.repeat_interleave(logits.shape[1] // groups, 1), -torch.inf)
    chosen = looked_at.topk(topk, dim=-1).indices
    best = scores.gather(1, chosen)
    if name == "softmax" and not pre_softmax:
        best = torch.softmax(best, dim=-1)
    elif name != "softmax" and topk > 1:
        best = best / (best.sum(dim=-1, keepdim=True) + 1e-20)
    probs = torch.zeros_like(scores).scatter(1, chosen, best * (factor or 1.0))
    return probs, torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


@pytest.mark.parametrize("topk", [1, 4, 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_softmax": True},
        {"factor": 2.5},
        {"bias": True},
        {"groups": 4, "group_topk": 2},
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_topk_forward_and_backward(router, name, topk, options):
    if options.get("bias") and name == "softmax":
        pytest.skip("a bias goes with sigmoid scores")
    if options.get("groups") and topk < 4:
        pytest.skip("fewer experts than groups")
    torch.manual_seed(5)
    options = {**options, "bias": torch.randn(64) * 0.1 if options.get("bias") else None}
    logits = torch.randn(9, 64, requires_grad=True)
    expected, routed = reference(logits, topk, name, **options)
    probs, routing_map = router.fused_topk_with_score_function(
        logits,
        topk,
        options.get("pre_softmax", False),
        options.get("groups"),
        options.get("group_topk"),
        options.get("factor"),
        name,
        options["bias"],
    )
    assert torch.equal(routing_map, routed)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-5, atol=1e-6)
    dy = torch.randn_like(probs)
    (grad,) = torch.autograd.grad(probs, logits, dy)
    (wanted,) = torch.autograd.grad(expected, logits, dy.double())
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scores_and_the_auxiliary_loss(router, name):
    logits = torch.randn(12, 8, requires_grad=True)
    routing_map, scores = router.fused_compute_score_for_moe_aux_loss(logits, 2, name)
    expected = SCORES[name](logits.double())
    if name != "softmax":
        expected = expected / (expected.sum(dim=-1, keepdim=True) + 1e-20)
    torch.testing.assert_close(scores.double(), expected)
    assert torch.equal(routing_map.int().sum(1), torch.full((12,), 2))
    tokens = routing_map.sum(0).int()
    loss = router.fused_moe_aux_loss(scores, tokens, 12, 8, 2, 0.01)
    wanted = (expected.sum(0) * tokens).sum() * (8 * 0.01 / (2 * 12 * 12))
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-7)
    (grad,) = torch.autograd.grad(loss, logits)
    (expected_grad,) = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-8)


def test_ties_go_to_the_lane_that_a_warp_prefers(tex):
    """Halves of the warp are compared from 16 apart to 1 apart: even columns win over odd ones."""
    logits = torch.zeros(1, 64)
    _, routed, _ = tex.fused_topk_with_score_function_fwd(logits, 4, False, None, None, None, "sigmoid", None)
    # Lane 0 holds the columns 0 and 32; after it come the lanes whose bits, reversed, are smallest.
    assert routed[0].nonzero().flatten().tolist() == [0, 16, 32, 48]


def searched_by_a_warp(scores, count, *, skips_nan):
    """Columns and scores as 32 lanes find them, one largest after the other.

    Args:
        skips_nan: the search of up to 8 since 2.17, for which no score is above -infinity until one is.
    """
    columns, values, infinity = [], [], float("inf")
    for _ in range(count):
        lanes = []
        for lane in range(32):
            own = range(lane, len(scores), 32)
            value, column = -infinity, lane if lane < len(scores) else 0
            if not skips_nan and own and own[0] not in columns:
                value = scores[own[0]]
            for place in own if skips_nan else own[1:]:
                seen = -infinity if place in columns else scores[place]
                if seen > value:
                    value, column = seen, place
            lanes.append((value, column))
        for apart in (16, 8, 4, 2, 1):
            lanes = [max_of(lanes[lane], lanes[lane ^ apart]) for lane in range(32)]
        values.append(lanes[0][0])
        columns.append(lanes[0][1])
    return columns, values


def max_of(mine, other):
    return other if other[0] > mine[0] else mine


@since("2.14")
@pytest.mark.parametrize("experts", [12, 32, 70])
@pytest.mark.parametrize("count", [1, 4, 8, 9, 12])
def test_nan_is_taken_where_the_kernel_takes_it(tex, experts, count):
    skips = RELEASE != "2.14" and count <= 8
    logits = torch.randn(64, experts)
    logits[torch.rand(64, experts) < 0.2] = float("nan")
    logits[:4, count // 2 :] = float("nan")  # fewer numbers than are asked for
    probs, routed, kept = tex.fused_topk_with_score_function_fwd(
        logits, count, False, None, None, None, "sigmoid", None
    )
    for row in range(64):
        columns, values = searched_by_a_warp(kept[row].tolist(), count, skips_nan=skips)
        assert sorted(set(columns)) == routed[row].nonzero().flatten().tolist()
        if len(set(columns)) < count:  # several lanes write the first column: any of them may be the last
            continue
        taken = torch.tensor(values)
        wanted = taken / (taken.sum() + 1e-20) if count > 1 else taken
        torch.testing.assert_close(probs[row, columns], wanted, equal_nan=True)
    numbers = ~logits.isnan()
    if skips:
        assert not routed[numbers.sum(1) >= count][logits[numbers.sum(1) >= count].isnan()].any()


@pytest.mark.parametrize("pre_softmax", [False, True])
def test_a_masked_expert(tex, pre_softmax):
    """Since 2.17 the sum of a lane begins with exp(-inf - -inf) where its first logit is -infinity."""
    logits = torch.randn(4, 40)
    logits[1, 3] = logits[2, 35] = -torch.inf
    probs, routed, _ = tex.fused_topk_with_score_function_fwd(
        logits, 4, pre_softmax, None, None, None, "softmax", None
    )
    spoiled = [1] if pre_softmax and RELEASE not in ("2.11", "2.14") else []
    assert (~probs.isfinite()).any(dim=1).nonzero().flatten().tolist() == spoiled
    good = torch.tensor([row for row in range(4) if row not in spoiled])
    assert torch.equal(routed[good], torch.zeros(4, 40).scatter(1, logits.topk(4).indices, 1).bool()[good])


@since("2.17")
def test_sixteen_and_more_take_the_first_of_equals(tex):
    logits = torch.zeros(1, 64)
    logits[0, 40] = 1.0
    _, routed, _ = tex.fused_topk_with_score_function_fwd(
        logits, 16, False, None, None, None, "sigmoid", None
    )
    assert routed[0].nonzero().flatten().tolist() == [*range(15), 40]


@since("2.17")
def test_a_routing_map_in_bits(router):
    logits = torch.randn(5, 20, requires_grad=True)
    probs, bits = router.fused_topk_with_score_function(
        logits, 3, False, None, None, None, "sigmoid", None, routing_map_format="bitmap_u8"
    )
    plain, routed = router.fused_topk_with_score_function(logits, 3, False, None, None, None, "sigmoid", None)
    unpacked = np.unpackbits(bits.numpy(), axis=1, bitorder="little")[:, :20].astype(bool)
    assert np.array_equal(unpacked, routed.numpy())
    grads = [torch.autograd.grad(out.square().sum(), logits)[0] for out in (probs, plain)]
    assert torch.equal(*grads)


@since("2.20")
def test_dense_indices(router):
    logits = torch.randn(5, 20, requires_grad=True)
    indices = torch.empty(5, 3, dtype=torch.int32)
    probs, filled = router.fused_topk_with_score_function(
        logits, 3, False, None, None, None, "softmax", None, topk_indices=indices
    )
    assert torch.equal(filled.long(), logits.topk(3, dim=-1).indices)
    plain, _ = router.fused_topk_with_score_function(logits, 3, False, None, None, None, "softmax", None)
    grads = [torch.autograd.grad(out.square().sum(), logits)[0] for out in (probs, plain)]
    assert torch.equal(*grads)


@since("2.20")
def test_a_histogram_of_the_bias_that_each_expert_lacked(tex):
    logits, bias = torch.randn(50, 16), torch.randn(16) * 0.1
    histogram = torch.zeros(16, 10, dtype=torch.int32)
    bounds = torch.tensor([-1.0, 1.0])
    probs, routed, raw, cutoff, counted = tex.fused_topk_with_score_function_qb_fwd(
        logits, 4, None, bias, 0, None, histogram, bounds, 0
    )
    scores = torch.sigmoid(logits)
    fifth = (scores + bias).topk(5, dim=-1).values[:, 4]
    torch.testing.assert_close(cutoff, fifth)
    torch.testing.assert_close(raw, scores)
    wanted, wanted_map = reference(logits, 4, "sigmoid", bias=bias)
    assert torch.equal(routed, wanted_map)
    torch.testing.assert_close(probs.double(), wanted, rtol=1e-5, atol=1e-6)
    for expert in range(16):
        lacking = (fifth - scores[:, expert]).numpy()
        bins, _ = np.histogram(lacking, bins=10, range=(-1, 1))
        assert np.abs(bins - counted[expert].numpy()).sum() <= 2  # on a bin's edge, rounding decides
    assert counted is histogram
    assert counted.sum() == 50 * 16
    logits[7, 3] = float("nan")
    _, routed, *_ = tex.fused_topk_with_score_function_qb_fwd(
        logits, 4, None, bias, 0, None, histogram.zero_(), bounds, 0
    )
    assert not routed[7, 3]
    assert histogram.sum() == 50 * 16  # what the expert lacks is no number: it counts in the first bin


@since("2.20")
def test_what_is_refused_of_a_bias_histogram(tex):
    good = {
        "logits": torch.randn(4, 8),
        "bias": torch.zeros(8),
        "histogram": torch.zeros(8, 3, dtype=torch.int32),
        "bounds": torch.tensor([-1.0, 1.0]),
    }

    def refused(message, topk=2, mode=0, **options):
        logits, bias, histogram, bounds = {**good, **options}.values()
        with pytest.raises(RuntimeError, match=message):
            tex.fused_topk_with_score_function_qb_fwd(
                logits, topk, None, bias, 0, None, histogram, bounds, mode
            )

    refused(r"QB topk must be in \[1, num_experts\)", topk=8)
    refused("QB expert_bias must have float32 dtype", bias=torch.zeros(8).bfloat16())
    refused(r"QB expert_bias must have shape \[num_experts\]", bias=torch.zeros(7))
    refused("QB histogram must have int32 dtype", histogram=torch.zeros(8, 3))
    refused(r"QB histogram must have shape \[num_experts, num_bins\]", histogram=good["histogram"][:7])
    refused("QB histogram must be a contiguous", histogram=good["histogram"][:, :2])
    refused(r"QB bin_bounds must be float32 with shape \[2\]", bounds=torch.zeros(3))
    refused("must be finite with lower < upper", bounds=torch.zeros(2))
    refused("Unsupported QB histogram mode: 2", mode=2)


def test_what_is_refused(tex):
    logits = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="score_function must be softmax"):
        tex.fused_topk_with_score_function_fwd(logits, 2, False, None, None, None, "tanh", None)
    with pytest.raises(RuntimeError, match="when expert_bias is not None"):
        tex.fused_topk_with_score_function_fwd(logits, 2, False, None, None, None, "softmax", torch.zeros(8))
    if RELEASE == "2.11":
        with pytest.raises(RuntimeError, match="must be softmax or sigmoid"):
            tex.fused_topk_with_score_function_fwd(logits, 2, False, None, None, None, "sqrtsoftplus", None)


@since("2.14")
def test_a_bias_of_another_dtype_is_refused(tex):
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(RuntimeError, match="expert_bias must be a float32 tensor"):
            tex.fused_topk_with_score_function_fwd(
                torch.randn(4, 8), 2, False, None, None, None, "sigmoid", torch.zeros(8, dtype=dtype)
            )


@since("2.17")
def test_a_routing_map_of_no_known_format_is_refused(tex):
    logits = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match=r"BYTEMAP \(0\) or BITMAP_U8 \(1\), got 2"):
        tex.fused_topk_with_score_function_fwd(logits, 2, False, None, None, None, "sigmoid", None, 2)
    with pytest.raises(RuntimeError, match=r"BYTEMAP \(0\) or BITMAP_U8 \(1\), got 2"):
        tex.fused_score_for_moe_aux_loss_fwd(logits, 2, "softmax", 2)


@since("2.17")
def test_the_radix_search_puts_zero_above_negative_zero(tex):
    """It compares bits, and 16 of 32 experts are its work; the naive search would see ties."""
    logits = torch.zeros(2, 32)
    logits[:, :16] = -0.0
    _, routing_map, _ = tex.fused_topk_with_score_function_fwd(
        logits, 16, False, None, None, None, "softmax", None
    )
    assert torch.equal(routing_map, (torch.arange(32) >= 16).expand(2, 32))
