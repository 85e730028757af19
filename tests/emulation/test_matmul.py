"""16-bit matrix products on the emulated device: exact products, FP32 sums, one rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class _Operands(TorchDispatchMode):
    """Collects the types in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "linear"):
            self.dtypes.update(argument.dtype for argument in args if isinstance(argument, torch.Tensor))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: a @ b,
        lambda a, b: torch.bmm(a, b),
        lambda a, b: torch.baddbmm(torch.zeros(1, 24, 40, device="cuda"), a, b),
        lambda a, b: torch.nn.functional.linear(a[0], b[0].t(), torch.zeros(40, device="cuda"))[None],
    ],
)
def test_autocast_rounds_the_operands_and_multiplies_in_fp32_too(
    product: Callable, dtype: torch.dtype
) -> None:
    a, b = (tensor.detach().requires_grad_() for tensor in operands(torch.float32, (1, 24, 96), (1, 96, 40)))
    rounded = [tensor.detach().to(dtype) for tensor in (a, b)]
    with _Operands() as seen:
        with torch.autocast("cuda", dtype=dtype):
            result = product(a, b)
            assert torch.is_autocast_enabled("cpu")
        result.float().sum().backward()
    assert seen.dtypes == {torch.float32}
    assert result.dtype == dtype
    assert torch.equal(result, (rounded[0].float() @ rounded[1].float()).to(dtype))
    ones = torch.ones(1, 24, 40)
    assert a.grad is not None
    assert a.grad.dtype == torch.float32
    assert torch.equal(a.grad, (ones @ rounded[1].float().mT).to(dtype).float())
