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


@pytest.mark.parametrize("mode", ["column", "row"])
@pytest.mark.parametrize(
    "recipe", ["NVFP4BlockScaling(disable_stochastic_rounding=True)", "MXFP8BlockScaling()"]
)
def test_quantised_tensors_are_gathered_as_they_are_quantised_whole(
    recipe: str, mode: str, tmp_path: Path
) -> None:
    """Column parallel, inputs are gathered; row parallel, gradients. Each rank's part of the layer computes
    what it does alone on the whole tensor."""
    agreed = run_ranks(
        f"""
        import torch, torch.distributed as dist
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import MXFP8BlockScaling, NVFP4BlockScaling

        dist.init_process_group("gloo")
        rank, column = dist.get_rank(), {mode == "column"}
        gathered, gather = [], dist.all_gather_into_tensor

        def watched(output, tensor, *args, **kwargs):
            gathered.append(str(tensor.dtype))
            return gather(output, tensor, *args, **kwargs)

        dist.all_gather_into_tensor = watched
        torch.manual_seed(0)
        features = (256, 128) if column else (128, 256)
        weight = torch.randn(2, features[1], features[0])[rank].bfloat16()
        x, grad = torch.randn(512, 256).bfloat16(), torch.randn(512, 256).bfloat16()
        x[300:] *= 3.0  # the ranks' own amaxes differ
        grad[:200] *= 5.0
        columns, rows = slice(128 * rank, 128 * rank + 128), slice(256 * rank, 256 * rank + 256)
        mine = (x, grad[:, columns]) if column else (x[:, columns], grad)
        held = (x[rows], grad[:, columns]) if column else (x[:, columns], grad[rows])

        def run(pair, *sizes, **options):
            layer = te.Linear(*sizes, bias=False, params_dtype=torch.bfloat16, **options)
            layer.weight.data.copy_(weight)
            given = pair[0].contiguous().clone().requires_grad_()
            with te.autocast(enabled=True, recipe={recipe}):
                out = layer(given)
            out.backward(pair[1].contiguous())
            return out.detach(), layer.weight.grad, given.grad

        alone = run(mine, *features)
        before = len(gathered)
        shared = dict(tp_group=dist.group.WORLD, tp_size=2, sequence_parallel=True)
        parallel = run(held, 256, 256, parallel_mode="{mode}", **shared)

        def scattered(partial):
            total = partial.clone()
            dist.all_reduce(total)
            return total[rows]

        output, d_input = (alone[0], scattered(alone[2])) if column else (scattered(alone[0]), alone[2])
        result({{
            "gathered": sorted(set(gathered[before:])),
            "output": torch.equal(parallel[0], output),
            "weight": torch.equal(parallel[1], alone[1]),
            "input": torch.equal(parallel[2], d_input),
        }})
        """,
        device="b200",
        tmp_path=tmp_path,
    )
    for rank in agreed:
        assert "torch.uint8" in rank.pop("gathered"), "nothing was gathered quantised"
        assert rank == {"output": True, "weight": True, "input": True}
