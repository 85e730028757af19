"""One manifest of a job from the manifests of its ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection.rows import Manifest, ManifestRow

__all__ = ["gather", "merge"]


def merge(manifests: Iterable[Manifest]) -> Manifest:
    """The union of several ranks' manifests: each module once, layers in order of their number.

    Tensor- and data-parallel ranks hold the same modules, pipeline stages different ones.

    Raises:
        InjectionError: two ranks disagree about a module.
    """
    merged: dict[str, tuple[int, ManifestRow]] = {}
    asked: str | None = None
    for rank, part in enumerate(manifests):
        asked = asked or part.asked
        for row in part.rows:
            first = merged.setdefault(row.module, (rank, row))
            if first[1] != row:
                differences = Manifest((first[1],)).diff(Manifest((row,)))
                raise InjectionError(
                    f"Ranks {first[0]} and {rank} disagree about {row.module}: "
                    + "; ".join(f"{d.field} is {d.before} and {d.after}" for d in differences)
                    + "."
                )
    return Manifest(tuple(sorted((row for _, row in merged.values()), key=_natural)), asked=asked)


def gather(manifest: Manifest, group: Any = None) -> Manifest | None:
    """Merge the manifests of every rank on the group's first rank; None on the others.

    Collective: every rank of `group` (default: all) must call it. Without torch.distributed, the manifest
        itself.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return manifest
    first = dist.get_rank(group) == 0
    parts: list[Any] | None = [None] * dist.get_world_size(group) if first else None
    dist.gather_object(
        manifest, parts, dst=dist.get_global_rank(group, 0) if group is not None else 0, group=group
    )
    return None if parts is None else merge(parts)


def _natural(row: ManifestRow) -> tuple[tuple[bool, int], ...]:
    """Layers by number; all else keeps its place (sorting is stable): the output layer comes after the
    decoder.
    """
    numbers = [int(part) for part in row.module.split(".") if part.isdigit()]
    return ((not numbers, numbers[0] if numbers else 0),)
