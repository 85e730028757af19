"""Copies: transposes and the padding of row groups."""

from __future__ import annotations

import pytest
import torch


def test_fp8_transpose(te, tex):
    codes = torch.randint(0, 256, (4, 6, 8), dtype=torch.uint8)
    result = tex.fp8_transpose(codes, te.DType.kFloat8E4M3, out=None)
    assert result.shape == (8, 4, 6)
    assert torch.equal(result, codes.permute(2, 0, 1))
    out = torch.zeros(8, 4, 6, dtype=torch.uint8)
    assert tex.fp8_transpose(codes, te.DType.kFloat8E4M3, out=out) is out
    assert torch.equal(out, result)
    assert tex.fp8_transpose(codes[:0], te.DType.kFloat8E4M3, out=None).shape == (8, 0, 6)


def test_swap_first_dims(tex):
    x = torch.randn(3, 5, 2)
    swapped = tex.swap_first_dims(x, out=None)
    assert swapped.is_contiguous()
    assert torch.equal(swapped, x.transpose(0, 1))
    with pytest.raises(RuntimeError, match="Invalid input tensor dimensions"):
        tex.swap_first_dims(torch.ones(3), out=None)


def test_padding_of_row_groups(tex):
    x = torch.randn(9, 4)
    padded = torch.full((24, 4), 7.0)
    tex.fused_multi_row_padding(x, padded, [3, 0, 6], [8, 0, 16])
    assert torch.equal(padded[:3], x[:3])
    assert torch.equal(padded[8:14], x[3:])
    assert not padded[3:8].any()
    assert not padded[14:].any()
    back = torch.zeros(9, 4)
    tex.fused_multi_row_unpadding(padded, back, [8, 0, 16], [3, 0, 6])
    assert torch.equal(back, x)
