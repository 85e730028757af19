"""Collectives of programs that are written for NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import run_emulated


def test_nccl_is_there_by_name_and_torch_does_not_look_for_its_classes(tmp_path: Path) -> None:
    seen = run_emulated(
        f"""
        import datetime
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _set_pg_timeout
        assert dist.is_nccl_available()
        dist.init_process_group("nccl", init_method="file://{tmp_path}/meeting", rank=0, world_size=1)
        _set_pg_timeout(datetime.timedelta(seconds=60), None)  # Megatron, once a job has begun
        dist.destroy_process_group()
        result(True)
        """
    )
    assert seen is True


def test_an_all_gather_takes_buffers_that_autograd_knows(tmp_path: Path) -> None:
    """A buffer that a parameter was copied to requires a gradient. NCCL writes to its memory all the same."""
    seen = run_emulated(
        f"""
        import itertools
        import torch, torch.distributed as dist
        dist.init_process_group("nccl", init_method="file://{tmp_path}/meeting", rank=0, world_size=1)

        def buffer(values, known):
            made = torch.zeros(4, device="cuda")
            values = torch.tensor(values, device="cuda")
            made.copy_(torch.nn.Parameter(values) if known else values)
            assert made.requires_grad == known
            return made

        names = [name for name in ("all_gather_into_tensor", "all_gather_single", "_all_gather_base")
            if hasattr(dist, name)]
        seen = {{}}
        for name, into, from_, later in itertools.product(names, *[(False, True)] * 3):
            output = buffer([9.0] * 4, into)
            work = getattr(dist, name)(output, buffer([0.0, 1.0, 2.0, 3.0], from_), async_op=later)
            if later:
                work.wait()
            seen[f"{{name}} {{into}} {{from_}} {{later}}"] = output.tolist()
        result(seen)
        """
    )
    assert len(seen) >= 16
    assert set(map(tuple, seen.values())) == {(0.0, 1.0, 2.0, 3.0)}


@pytest.mark.parametrize("imported", ["before", "after"])
def test_fully_shard_takes_a_model_that_is_on_the_device(imported: str, tmp_path: Path) -> None:
    """FSDP2, whose parameters are compared with the device of its mesh; it waits by `torch.accelerator`."""
    seen = run_emulated(
        f"""
        import torch, torch.distributed as dist
        import transformer_engine.pytorch as te
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        dist.init_process_group("nccl", init_method="file://{tmp_path}/meeting", rank=0, world_size=1)

        def trained(shard):
            torch.manual_seed(1)
            model = te.Linear(64, 32, params_dtype=torch.bfloat16, device="cuda")
            if shard:
                fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(3):
                with te.autocast(enabled=True):
                    model(torch.ones(32, 64, dtype=torch.bfloat16, device="cuda")).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.accelerator.synchronize()
            weight = model.weight
            return (weight.full_tensor() if shard else weight).float().sum().item()

        result([trained(False), trained(True)])
        dist.destroy_process_group()
        """,
        first="import torch.distributed.fsdp" if imported == "before" else "",
    )
    assert seen[0] == seen[1]
    assert seen[0] != 0
