"""Fused rotary embeddings against a rotation of complex numbers, and TE's unfused path."""

from __future__ import annotations

import pytest
import torch

SBHD, BSHD, THD = "sbhd", "bshd", "thd"


def rotated(x, angles, interleaved):
    """fp64: the pairs of the last dimension as complex numbers, turned by their angles."""
    width = angles.shape[-1]
    turned, rest = x[..., :width].double(), x[..., width:].double()
    if interleaved:
        first, second, angle = turned[..., 0::2], turned[..., 1::2], angles[..., 0::2]
    else:
        (first, second), angle = turned.chunk(2, dim=-1), angles[..., : width // 2]
    result = torch.complex(first, second) * torch.polar(torch.ones_like(angle).double(), angle.double())
    parts = (result.real, result.imag)
    joined = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat((joined, rest), dim=-1)


@pytest.fixture
def formats(tex):
    return {name: getattr(tex.NVTE_QKV_Format, f"NVTE_{name.upper()}") for name in (SBHD, BSHD, THD)}


def embedding(positions, width, interleaved):
    """As RotaryPositionEmbedding makes it: both elements of a pair have the angle."""
    angle = torch.outer(torch.arange(positions).float(), 0.3 ** torch.arange(width // 2).float())
    both = angle.repeat_interleave(2, dim=1) if interleaved else torch.cat((angle, angle), dim=1)
    return both[:, None, None, :]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", [SBHD, BSHD])
@pytest.mark.parametrize("starts", [None, [3, 0]])
def test_forward_and_backward(tex, formats, interleaved, layout, starts):
    x = torch.randn(6, 2, 3, 10) if layout == SBHD else torch.randn(2, 6, 3, 10)
    x.requires_grad_()
    freqs = embedding(12, 8, interleaved)
    start = torch.tensor(starts or [0, 0])
    place = torch.arange(6)[:, None] + start if layout == SBHD else start[:, None] + torch.arange(6)
    expected = rotated(x, freqs[:, 0, 0][place].unsqueeze(-2), interleaved)
    dy = torch.randn(x.shape)
    expected.backward(dy.double())
    given = None if starts is None else start.int()
    options = (given, formats[layout], interleaved, None, 1, 0)
    out = tex.fused_rope_forward(x, freqs, *options)
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert out.is_contiguous()
    grad = tex.fused_rope_backward(dy, freqs, *options)
    torch.testing.assert_close(grad, x.grad, rtol=1e-5, atol=1e-5)


def test_packed_sequences_are_those_alone(tex, formats):
    lengths = [4, 0, 7]
    x, freqs = torch.randn(12, 3, 8).bfloat16(), embedding(16, 8, interleaved=False)
    bounds = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    out = tex.fused_rope_forward(x, freqs, None, formats[THD], False, bounds, 1, 0)
    assert out.shape == x.shape
    begin = 0
    for length in lengths:
        part = x[begin : begin + length, None]
        if length:
            alone = tex.fused_rope_forward(part, freqs, None, formats[SBHD], False, None, 1, 0)
            assert torch.equal(out[begin : begin + length, None], alone)
        begin += length


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_hold_two_chunks_each(tex, formats, size):
    steps = 4 * size
    x, freqs = torch.randn(steps, 2, 3, 8), embedding(steps, 8, interleaved=False)
    whole = tex.fused_rope_forward(x, freqs, None, formats[SBHD], False, None, 1, 0)
    chunks = torch.arange(steps).view(2 * size, 2)
    for rank in range(size):
        mine = torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))
        out = tex.fused_rope_forward(x[mine], freqs, None, formats[SBHD], False, None, size, rank)
        assert torch.equal(out, whole[mine])
        packed = tex.fused_rope_forward(
            x[mine, 0], freqs, None, formats[THD], False, torch.tensor([0, steps]).int(), size, rank
        )
        assert torch.equal(packed, whole[mine, 0])


@pytest.mark.parametrize("layout", [SBHD, BSHD])
def test_query_key_value_in_one(tex, formats, layout):
    groups, queries, width = 2, 3, 8
    split = [queries * width, width, width]
    shape = (6, 2, groups, sum(split)) if layout == SBHD else (2, 6, groups, sum(split))
    qkv, freqs = torch.randn(shape), embedding(6, 6, interleaved=True)
    q, k, v = tex.fused_qkv_rope_forward(qkv, freqs, freqs, None, split, formats[layout], True, 1, 0)
    parts = qkv.split(split, dim=-1)
    heads = parts[0].unflatten(-1, (queries, width)).flatten(2, 3)
    for out, part in ((q, heads), (k, parts[1])):
        alone = tex.fused_rope_forward(part, freqs, None, formats[layout], True, None, 1, 0)
        assert torch.equal(out, alone)
    assert torch.equal(v, parts[2])
    grads = [torch.randn_like(out) for out in (q, k, v)]
    back = tex.fused_qkv_rope_backward(*grads, freqs, freqs, split, formats[layout], True, 1, 0)
    assert back.shape == qkv.shape
    d_heads = tex.fused_rope_backward(grads[0], freqs, None, formats[layout], True, None, 1, 0)
    assert torch.equal(back[..., : split[0]].unflatten(-1, (queries, width)).flatten(2, 3), d_heads)
    assert torch.equal(back[..., -width:], grads[2])


def test_what_is_refused(tex, formats):
    x, freqs = torch.randn(6, 2, 3, 8), embedding(4, 8, interleaved=False)
    with pytest.raises(RuntimeError, match="longer sequence length than input"):
        tex.fused_rope_forward(x, freqs, None, formats[SBHD], False, None, 1, 0)
    with pytest.raises(RuntimeError, match="expected cu_seqlens tensor"):
        tex.fused_rope_forward(x[:, 0], freqs, None, formats[THD], False, None, 1, 0)
    with pytest.raises(RuntimeError, match="Dtype of the freqs tensor must be float"):
        tex.fused_rope_forward(x, freqs.bfloat16(), None, formats[SBHD], False, None, 1, 0)


@pytest.mark.parametrize("backward", [False, True])
def test_an_odd_length_has_no_two_chunks(tex, formats, backward):
    """The kernels assert an even one, in a build with assertions; without, positions are not those of any
    chunk.
    """
    call = tex.fused_rope_backward if backward else tex.fused_rope_forward
    x, freqs = torch.randn(7, 1, 3, 8), embedding(32, 8, interleaved=False)
    odd = "cur_seqlens % 2 == 0.* 3 tokens"
    with pytest.raises(RuntimeError, match=odd):
        call(x[:3], freqs, None, formats[SBHD], False, None, 2, 0)
    bounds = torch.tensor([0, 8, 14]).int()  # 4 and 3 tokens on each of two ranks
    with pytest.raises(RuntimeError, match=odd):
        call(x[:, 0], freqs, None, formats[THD], False, bounds, 2, 0)
    call(x[:, 0], freqs, None, formats[THD], False, bounds // 2, 1, 0)


def test_a_position_without_an_angle_is_refused(tex, formats):
    x, freqs = torch.randn(6, 1, 3, 8), embedding(6, 8, interleaved=False)
    with pytest.raises(RuntimeError, match="position 7, and the freqs tensor has 6"):
        tex.fused_rope_forward(x, freqs, torch.tensor([2]).int(), formats[SBHD], False, None, 1, 0)
    with pytest.raises(RuntimeError, match="expected 1D tensor"):
        tex.fused_rope_forward(x, freqs, torch.tensor([[2]]).int(), formats[SBHD], False, None, 1, 0)


def test_te_s_own_function_takes_the_fused_path(te, tex):
    from transformer_engine.pytorch.attention.rope import RotaryPositionEmbedding, apply_rotary_pos_emb

    x = torch.randn(8, 2, 4, 16, requires_grad=True)
    emb = RotaryPositionEmbedding(16)(8)
    fused = apply_rotary_pos_emb(x, emb, tensor_format="sbhd", fused=True)
    plain = apply_rotary_pos_emb(x, emb, tensor_format="sbhd", fused=False)
    torch.testing.assert_close(fused, plain)
    (grad,) = torch.autograd.grad(fused.square().sum(), x)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    torch.testing.assert_close(grad, expected)
