"""Collectives of programs that are written for NCCL."""

from __future__ import annotations

from pathlib import Path

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
