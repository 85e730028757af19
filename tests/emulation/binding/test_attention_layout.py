"""What attention reads, moved: against indexing and TE's own plain torch."""

from __future__ import annotations

import pytest
import torch

from tests.support.te_release import since


@since("2.17")
@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
def test_heads_in_front(tex, layout):
    shape = (5, 2, 3, 8) if layout == "sbhd" else (2, 5, 3, 8)
    x = torch.randn(shape).bfloat16()
    turned, nothing = tex.multi_tensor_transpose_to_bhsd([x, None], original_format=layout)
    assert nothing is None
    assert turned.is_contiguous()
    for b in range(2):
        for h in range(3):
            for s in range(5):
                assert torch.equal(turned[b, h, s], x[s, b, h] if layout == "sbhd" else x[b, s, h])
    wide = torch.full((2, 3, 5, 12), 7, dtype=torch.uint8)
    codes = torch.randint(0, 255, shape, dtype=torch.uint8)
    (same,) = tex.multi_tensor_transpose_to_bhsd([codes], original_format=layout, outputs=[wide])
    assert same is wide
    (narrow,) = tex.multi_tensor_transpose_to_bhsd([codes], original_format=layout)
    assert torch.equal(wide[..., :8], narrow)
    assert not wide[..., 8:].any()
    with pytest.raises(RuntimeError, match="only BSHD/SBHD"):
        tex.multi_tensor_transpose_to_bhsd([x], original_format="thd")


@since("2.17")
def test_columns_up_to_a_multiple(tex):
    exact, odd = torch.randn(3, 8), torch.randn(3, 5)
    kept, padded = tex.multi_tensor_pad_last_dim([exact, odd], 4)
    assert torch.equal(kept, exact)
    assert torch.equal(padded, torch.cat((odd, torch.zeros(3, 3)), dim=1))
    with pytest.raises(RuntimeError, match="expected 2D input"):
        tex.multi_tensor_pad_last_dim([exact[None]], 4)


def test_query_key_and_value_that_lie_interleaved(tex):
    whole = torch.randn(6, 2, 4, 3 * 128).bfloat16()
    q, k, v = whole.chunk(3, dim=-1)
    together = tex.fa_prepare_fwd(q)
    for part, expected in zip(together, (q, k, v), strict=True):
        assert torch.equal(part, expected.transpose(0, 1))
    back = tex.fa_prepare_bwd(*(part.contiguous() for part in together))
    assert torch.equal(back, whole)


def test_packed_and_padded_sequences(tex):
    bounds = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    packed = torch.randn(8, 2, 4)
    rows = tex.convert_thd_to_bshd(packed, bounds, 3, 6)
    assert torch.equal(rows[0, :3], packed[:3])
    assert not rows[1].any()
    assert torch.equal(rows[2, :5], packed[3:])
    assert torch.equal(tex.convert_bshd_to_thd(rows, bounds, 8), packed)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("layout", ["SBHD", "BSHD", "THD"])
@pytest.mark.parametrize("paged", [False, True])
def test_new_tokens_go_behind_those_in_the_cache(tex, layout, paged):
    torch.manual_seed(2)
    new, before, page, pages = [2, 1], [3, 0], 4, 2
    total = [a + b for a, b in zip(new, before, strict=True)]
    k = torch.randn(2, 2, 3, 4).bfloat16()  # b, s, h, d
    v = torch.randn(2, 2, 3, 4).bfloat16()
    given = {
        "BSHD": lambda x: x,
        "SBHD": lambda x: x.transpose(0, 1).contiguous(),
        "THD": lambda x: torch.cat([x[0, :2], x[1, :1]]),
    }[layout]
    table = torch.tensor([[3, 0], [1, 2]] if paged else [[0], [1]], dtype=torch.int32)
    shape = (4, page, 3, 4) if paged else (2, page * pages, 3, 4)
    k_cache, v_cache = torch.zeros(shape).bfloat16(), torch.zeros(shape).bfloat16()
    tex.copy_to_kv_cache(
        given(k),
        given(v),
        k_cache,
        v_cache,
        table,
        cumulative(new),
        cumulative(total),
        getattr(tex.NVTE_QKV_Format, f"NVTE_{layout}"),
        2,
        2,
        page * pages,
        pages if paged else 1,
        not paged,
    )
    written = 0
    for cache, source in ((k_cache, k), (v_cache, v)):
        for b in range(2):
            for i in range(new[b]):
                place = before[b] + i
                where = (table[b, place // page], place % page) if paged else (b, place)
                assert torch.equal(cache[where], source[b, i])
                written += 1
    assert written == 6
    assert (k_cache.flatten(2).abs().sum(-1) > 0).sum() == 3


def test_sequences_that_are_left_move_to_the_front_of_the_cache(tex):
    cache = torch.arange(3.0)[:, None, None, None].expand(3, 4, 1, 2).bfloat16().contiguous()
    fresh = torch.full((2, 1, 1, 2), 9.0).bfloat16()
    # Sequence 0 has ended: 1 and 2 become 0 and 1, each with two tokens and a new one.
    tex.copy_to_kv_cache(
        fresh,
        fresh.clone(),
        cache,
        cache.clone(),
        torch.tensor([[1], [2]], dtype=torch.int32),
        cumulative([1, 1]),
        cumulative([3, 3]),
        tex.NVTE_QKV_Format.NVTE_BSHD,
        2,
        1,
        4,
        1,
        True,
    )
    assert cache[0, :, 0, 0].tolist() == [1.0, 1.0, 9.0, 0.0]
    assert cache[1, :, 0, 0].tolist() == [2.0, 2.0, 9.0, 1.0]
