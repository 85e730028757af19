"""Block-scaled activations gathered over two ranks: 2.11 sends them in a compact format of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import run_ranks


@pytest.mark.parametrize("recipe", ["Float8BlockScaling"])
def test_sequence_parallelism_computes_what_one_rank_does(recipe: str, tmp_path: Path) -> None:
    agreed = run_ranks(
        f"""
        import torch, torch.distributed as dist
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import {recipe}

        dist.init_process_group("gloo")
        rank = dist.get_rank()
        gathered, gather = [], dist.all_gather_into_tensor

        def watched(output, tensor, *args, **kwargs):
            gathered.append(str(tensor.dtype))
            return gather(output, tensor, *args, **kwargs)

        dist.all_gather_into_tensor = watched
        torch.manual_seed(0)
        whole = te.Linear(256, 256, bias=False, params_dtype=torch.bfloat16)
        x, grad = torch.randn(512, 256).bfloat16(), torch.randn(512, 256).bfloat16()
        alone = x.clone().requires_grad_()
        with te.autocast(enabled=True, recipe={recipe}()):
            y = whole(alone)
        y.backward(grad)

        half = te.Linear(
            256, 256, bias=False, params_dtype=torch.bfloat16, tp_group=dist.group.WORLD, tp_size=2,
            parallel_mode="column", sequence_parallel=True,
        )
        half.weight.data.copy_(whole.weight[128 * rank : 128 * rank + 128])
        piece = x[256 * rank : 256 * rank + 256].clone().requires_grad_()
        with te.autocast(enabled=True, recipe={recipe}()):
            z = half(piece)
        z.backward(grad[:, 128 * rank : 128 * rank + 128].contiguous())
        columns = slice(128 * rank, 128 * rank + 128)
        expected = alone.grad[256 * rank : 256 * rank + 256].float()
        # Partial sums are rounded to bf16 before they are added over the ranks.
        apart = (piece.grad.float() - expected).abs().max() / expected.abs().max()
        result({{
            "gathered": sorted(set(gathered)),
            "output": torch.equal(z, y[:, columns]),
            "weight": torch.equal(half.weight.grad, whole.weight.grad[columns]),
            "input": bool(apart < 2.0**-7),
        }})
        """,
        device="h100",
        tmp_path=tmp_path,
    )
    for rank in agreed:
        assert "torch.uint8" in rank.pop("gathered"), "nothing was gathered in FP8"
        assert rank == {"output": True, "weight": True, "input": True}
