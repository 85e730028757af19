"""16-bit matrix products on the emulated device: exact products, FP32 sums, one rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytestmark = pytest.mark.usefixtures("emulated")

DTYPES = (torch.bfloat16, torch.float16)


def operands(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: torch.matmul(a, b),
        lambda a, b: a.matmul(b),
        lambda a, b: a @ b,
        lambda a, b: torch.bmm(a, b),
        lambda a, b: torch.nn.functional.linear(a[0], b[0].t(), None)[None],
    ],
)
def test_rounded_once_forward_and_backward(product: Callable, dtype: torch.dtype) -> None:
    a, b = operands(dtype, (1, 24, 96), (1, 96, 40))
    (upstream,) = operands(dtype, (1, 24, 40))
    result = product(a, b)
    result.backward(upstream)
    exact = [tensor.detach().double() for tensor in (a, b, upstream)]
    for found, reference in (
        (result, exact[0] @ exact[1]),
        (a.grad, exact[2] @ exact[1].mT),
        (b.grad, exact[0].mT @ exact[2]),
    ):
        assert found.dtype == dtype
        # Half a unit in the last place, and the error of FP32 sums.
        bound = reference.abs() * torch.finfo(dtype).eps / 2 + 1e-4
        assert ((found.double() - reference).abs() <= bound).all()


def test_baddbmm_scales_adds_and_ignores_what_beta_zero_says() -> None:
    a, b = operands(torch.bfloat16, (2, 8, 16), (2, 16, 8))
    garbage = torch.full((2, 8, 8), float("nan"), dtype=torch.bfloat16)
    scaled = torch.baddbmm(garbage, a, b, beta=0.0, alpha=0.5)
    assert torch.equal(scaled, ((a.float() @ b.float()) * 0.5).bfloat16())
    ones = torch.ones_like(garbage)
    assert torch.equal(
        torch.baddbmm(ones, a, b), torch.baddbmm(ones.float(), a.float(), b.float()).bfloat16()
    )


def test_fp32_products_and_results_in_place_are_torchs_own() -> None:
    a, b = (tensor.detach().float() for tensor in operands(torch.bfloat16, (8, 16), (16, 8)))
    assert (a @ b).dtype == torch.float32
    out = torch.empty(8, 8, dtype=torch.bfloat16)
    assert torch.mm(a.bfloat16(), b.bfloat16(), out=out) is out
