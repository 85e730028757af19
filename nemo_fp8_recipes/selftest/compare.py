"""Comparing buffers, and running all cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_fp8_recipes.numerics.delayed import update_amax_and_scale
from nemo_fp8_recipes.numerics.formats import E4M3
from nemo_fp8_recipes.selftest.expected import expected
from nemo_fp8_recipes.selftest.stochastic import judge
from nemo_fp8_recipes.selftest.vectors import Recorded

__all__ = ["Verdict", "compare", "compare_update", "differences"]


@dataclass
class Verdict:
    """What came out for one recipe.

    Attributes:
        compared: cases compared.
        differing: for each case that differs, which buffers do and where first.
        not_run: why nothing was compared, where that is so.
    """

    compared: int = 0
    differing: dict[str, str] = field(default_factory=dict)
    not_run: str | None = None

    @property
    def agrees(self) -> bool:
        return self.compared > 0 and not self.differing


def differences(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> str:
    """Which buffers differ, bit for bit (one NaN is as good as another in fp32); empty where none does."""
    told = []
    for name, wanted in reference.items():
        if name not in found:
            told.append(f"{name} is missing")
            continue
        got = found[name]
        if got.shape != wanted.shape:
            told.append(f"{name} has shape {tuple(got.shape)}, not {tuple(wanted.shape)}")
            continue
        if wanted.dtype == torch.float32:
            unequal = (got.view(torch.int32) != wanted.contiguous().view(torch.int32)) & ~(
                got.isnan() & wanted.isnan()
            )
        else:
            unequal = got != wanted
        count = int(unequal.sum())
        if count:
            first = tuple(int(index) for index in unequal.nonzero()[0])
            told.append(
                f"{name} differs in {count} of {unequal.numel()}, first at {first}: "
                f"device {got[first].item()}, numerics {wanted[first].item()}"
            )
    return "; ".join(told)


def compare(recorded: Iterable[Recorded]) -> dict[str, Verdict]:
    """A verdict for each recipe among the cases."""
    verdicts: dict[str, Verdict] = {}
    for case, x, buffers in recorded:
        verdict = verdicts.setdefault(case.recipe, Verdict())
        verdict.compared += 1
        if case.options.get("stochastic"):
            told = judge(x, buffers)
        else:
            told = differences(buffers, expected(case, x))
        if told:
            verdict.differing[case.name] = told
    return verdicts


Update = Callable[[list[Tensor], list[Tensor], Tensor, str, float], None]


def compare_update(update: Update) -> Verdict:
    """The fused amax update: histories with zeros, infinities and NaN, both algorithms, two margins."""
    verdict = Verdict()
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([0.0, float("inf"), float("nan"), torch.finfo(torch.float32).tiny, 3e38])
    for algorithm in ("max", "most_recent"):
        for margin in (0.0, 2.0):
            for length in (1, 2, 16):
                history = torch.rand(length, 12, generator=generator) * 100
                pick = odd[torch.randint(0, len(odd), history.shape, generator=generator)]
                history = torch.where(torch.rand(history.shape, generator=generator) < 0.3, pick, history)
                reduced = history[0].clone()
                scale = torch.rand(12, generator=generator) + 0.5
                mine, theirs = ([history.clone()], [scale.clone()]), ([history.clone()], [scale.clone()])
                update_amax_and_scale(*mine, reduced, algorithm=algorithm, fp8_max=E4M3.max, margin=margin)
                update(*theirs, reduced, algorithm, margin)
                verdict.compared += 1
                told = differences(
                    {"history": theirs[0][0], "scale": theirs[1][0]},
                    {"history": mine[0][0], "scale": mine[1][0]},
                )
                if told:
                    verdict.differing[f"amax update[{algorithm},margin={margin},length={length}]"] = told
    return verdict
