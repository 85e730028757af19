"""Collectives of programs that are written for NCCL."""

from __future__ import annotations

from pathlib import Path

from tests.support.processes import run_emulated


def test_an_all_gather_fills_a_buffer_that_autograd_knows(tmp_path: Path) -> None:
    """A buffer that a parameter was copied to requires a gradient. NCCL writes to its memory all the same."""
    seen = run_emulated(
        f"""
        import torch, torch.distributed as dist
        dist.init_process_group("nccl", init_method="file://{tmp_path}/meeting", rank=0, world_size=1)
        seen = {{}}
        for name in ("all_gather_into_tensor", "all_gather_single", "_all_gather_base"):
            for wait_later in (False, True):
                if not hasattr(dist, name):
                    continue
                buffer = torch.zeros(4, device="cuda")
                buffer.copy_(torch.nn.Parameter(torch.ones(4, device="cuda")))
                work = getattr(dist, name)(buffer, torch.arange(4.0, device="cuda"), async_op=wait_later)
                if wait_later:
                    work.wait()
                seen[f"{{name}} {{wait_later}}"] = buffer.tolist()
        result(seen)
        """
    )
    assert seen["all_gather_into_tensor False"] == seen["all_gather_into_tensor True"]
    assert set(map(tuple, seen.values())) == {(0.0, 1.0, 2.0, 3.0)}
