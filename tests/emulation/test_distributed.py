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


@pytest.mark.parametrize("imported", ["before", "after"])
def test_fully_sharded_data_parallel_takes_a_model_that_is_on_the_device(
    imported: str, tmp_path: Path
) -> None:
    """FSDP1, which looks for an accelerator, with and without being told its index."""
    seen = run_emulated(
        f"""
        import torch, torch.distributed as dist
        import transformer_engine.pytorch as te
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
        dist.init_process_group("nccl", init_method="file://{tmp_path}/meeting", rank=0, world_size=1)

        def trained(options, where="cuda"):
            torch.manual_seed(1)
            model = te.Linear(64, 32, params_dtype=torch.bfloat16, device=where)
            if options is not None:
                mixed = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
                options.update(use_orig_params=True, mixed_precision=mixed)
                model = FullyShardedDataParallel(model, **options)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(3):
                with te.autocast(enabled=True):
                    model(torch.ones(32, 64, dtype=torch.bfloat16, device="cuda")).sum().backward()
                model.clip_grad_norm_(1e9) if options is not None else None
                optimizer.step()
                optimizer.zero_grad()
            state = {{name.split(".")[-1]: value for name, value in model.state_dict().items()}}
            return state["weight"].float().sum().item()

        result([
            trained(None),
            trained({{}}),
            trained({{"device_id": torch.cuda.current_device(), "sync_module_states": True}}),
            trained({{"device_id": torch.device("cuda")}}, "meta"),
        ])
        dist.destroy_process_group()
        """,
        first="import torch.distributed.fsdp" if imported == "before" else "",
    )
    assert seen[0] != 0
    assert seen == [seen[0]] * 4
