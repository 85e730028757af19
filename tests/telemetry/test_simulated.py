"""What a recipe makes of a matrix of all experts: what it makes of each of them."""

from __future__ import annotations

import pytest
import torch

from nemo_fp8_recipes.telemetry.groups import Experts
from nemo_fp8_recipes.telemetry.simulated import SIMULATORS, largest, under_scale

COLUMNS = 160


def matrix(rows: list[int]) -> tuple[torch.Tensor, Experts]:
    """Experts whose magnitudes are far apart, the blocks of each in its own rows."""
    parts = [torch.randn(count, COLUMNS) * 100.0**number for number, count in enumerate(rows)]
    of_row = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    return torch.cat(parts).bfloat16(), Experts(len(rows), of_row)


@pytest.mark.parametrize("recipe", SIMULATORS)
@pytest.mark.parametrize(
    ("tensor", "rows"), [("input", [48, 0, 16, 33]), ("weight", [48, 48, 48])], ids=["input", "weight"]
)
def test_each_expert_is_quantised_by_itself(recipe: str, tensor: str, rows: list[int]) -> None:
    torch.manual_seed(0)
    x, experts = matrix(rows)
    together = SIMULATORS[recipe](x, tensor, "e4m3", experts)
    assert together is not None
    parts = [part for part in x.split(rows) if len(part)]
    apart = [SIMULATORS[recipe](part, tensor, "e4m3", None) for part in parts]
    assert torch.equal(together.values, torch.cat([one.values for one in apart if one is not None]))
    limits = [one.limit.expand_as(one.values) for one in apart if one is not None]
    assert torch.equal(together.limit.expand_as(together.values), torch.cat(limits))


def test_a_scale_of_each_expert() -> None:
    x, experts = matrix([5, 0, 3])
    amax = largest(x, experts)
    assert amax.tolist() == [float(x[:5].abs().max()), 0.0, float(x[5:].abs().max())]
    found = under_scale(x, "e4m3", torch.tensor([2.0, 9.0, 4.0]), experts)
    assert torch.equal(found.values[5:], under_scale(x[5:], "e4m3", torch.tensor([4.0]), None).values)
    assert found.limit[:, 0].tolist() == [224.0] * 5 + [112.0] * 3
