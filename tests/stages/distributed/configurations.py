"""Several jobs one after the other in the same ranks: starting a rank takes longer than a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.processes import run_ranks

__all__ = ["run_configurations"]


def run_configurations(
    program: str, configurations: dict[str, dict[str, Any]], *, ranks: int, steps: int, path: Path
) -> dict[str, list[Any]]:
    """What `run` of a module beside this one gave, by the name of a configuration: one result a rank.

    Args:
        program: the module's name.
        path: where each configuration's run has a directory of its name.
    """
    by_rank = run_ranks(
        f"""
        from pathlib import Path
        from tests.stages.distributed.{program} import run
        result({{
            name: run(name, options, Path({str(path)!r}), steps={steps})
            for name, options in {configurations!r}.items()
        }})
        """,
        ranks=ranks,
        device="b200",
        timeout=900,
        tmp_path=path,
    )
    return {name: [rank[name] for rank in by_rank] for name in configurations}
