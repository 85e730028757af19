"""Optimizer steps, norms and scales over lists of tensors, against torch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.support.te_release import RELEASE

SHAPES = [(7, 3), (16,), (2, 2, 2)]


def tensors(dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("master", [False, True])
def test_adam(tex, mode, master):
    parameters = tensors()
    reference = [torch.nn.Parameter(copy.deepcopy(p)) for p in parameters]
    kind = (torch.optim.Adam, torch.optim.AdamW)[mode]
    optimizer = kind(reference, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    first, second = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    model = [p.to(torch.bfloat16) for p in parameters] if master else parameters
    for step in range(1, 4):
        grads = tensors()
        for parameter, grad in zip(reference, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        lists = [grads, model, first, second] + ([parameters] if master else [])
        tex.multi_tensor_adam(65536, torch.zeros(1), lists, 0.01, 0.9, 0.95, 1e-8, step, mode, 1, 0.1)
    for found, expected in zip(parameters, reference, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    if master:
        for low, high in zip(model, parameters, strict=True):
            assert torch.equal(low, high.to(torch.bfloat16))


def test_adam_checks_its_lists(tex):
    with pytest.raises(RuntimeError, match="Expected 4 or 5 tensor lists, but found 3"):
        tex.multi_tensor_adam(1, torch.zeros(1), [tensors()] * 3, 0.1, 0.9, 0.9, 1e-8, 1, 0, 1, 0.0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(tex, nesterov):
    parameters = tensors()
    reference = [torch.nn.Parameter(p.clone()) for p in parameters]
    optimizer = torch.optim.SGD(reference, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    momenta = [torch.zeros_like(p) for p in parameters]
    for step in range(3):
        grads = tensors()
        for parameter, grad in zip(reference, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        tex.multi_tensor_sgd(
            1,
            torch.zeros(1),
            [grads, parameters, momenta],
            0.01,
            0.9,
            0.0,
            0.1,
            nesterov,
            step == 0,
            False,
            1.0,
        )
    for found, expected in zip(parameters, reference, strict=True):
        torch.testing.assert_close(found, expected.detach())


def test_l2norm(tex):
    lists = tensors(torch.bfloat16)
    total, per_tensor = tex.multi_tensor_l2norm(1, torch.zeros(1), [lists], True)
    flat = torch.cat([t.float().flatten() for t in lists])
    torch.testing.assert_close(total, flat.norm().reshape(1))
    torch.testing.assert_close(per_tensor, torch.stack([t.float().norm() for t in lists]))
    assert tex.multi_tensor_l2norm(1, torch.zeros(1), [lists])[1].numel() == 0
    unscaled, _ = tex.multi_tensor_unscale_l2norm(1, torch.zeros(1), [lists], torch.tensor(0.5))
    torch.testing.assert_close(unscaled, 0.5 * flat.norm().reshape(1))


def test_scale_reports_what_is_not_finite(tex):
    source, target, flag = tensors(), tensors(torch.bfloat16), torch.zeros(1, dtype=torch.int32)
    tex.multi_tensor_scale(1, flag, [source, target], 0.5)
    assert flag.item() == 0
    for a, b in zip(source, target, strict=True):
        assert torch.equal(b, (a * 0.5).to(torch.bfloat16))
    source[1][3] = float("inf")
    if RELEASE == "2.11":  # the scale in a tensor came later
        tex.multi_tensor_scale(1, flag, [source, target], 2.0)
    else:
        tex.multi_tensor_scale_tensor(1, flag, [source, target], torch.tensor([2.0]))
    assert flag.item() == 1
    assert target[1][3] == float("inf")


def test_scales_and_inverse_scales(tex):
    amaxes = [torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([1e-42]), torch.tensor([float("inf")])]
    scales, inverses = [torch.zeros(1) for _ in amaxes], [torch.zeros(1) for _ in amaxes]
    tex.multi_tensor_compute_scale_and_scale_inv(
        1, torch.zeros(1), [amaxes, scales, inverses], 448.0, False, 0.0
    )
    largest = np.finfo(np.float32).max
    assert [s.item() for s in scales] == [np.float32(448) / np.float32(3), 1.0, largest, 1.0]
    assert [s.item() for s in inverses] == [np.float32(1) / np.float32(s.item()) for s in scales]
    tex.multi_tensor_compute_scale_and_scale_inv(
        1, torch.zeros(1), [amaxes, scales, inverses], 448.0, True, 7.0
    )
    assert [s.item() for s in scales] == [64.0, 64.0, 64.0, 1.0]


def test_e8m0_scales(tex):
    amax = torch.tensor([448.0, 449.0, 0.0, 1.0, float("inf"), float("nan")], dtype=torch.bfloat16)
    out = torch.zeros(6, dtype=torch.uint8)
    tex.multi_tensor_compute_scale_inv_e8m0(1, None, [[amax], [out]])
    # 449 rounds to 448 in bf16; 1/448 lies between 2^-9 and 2^-8.
    assert out.tolist() == [127, 127, 0, 119, 254, 255]
    with pytest.raises(RuntimeError, match="amax should be bf16"):
        tex.multi_tensor_compute_scale_inv_e8m0(1, None, [[amax.float()], [out]])


def test_sgd_in_fp16_equals_torch_bit_for_bit(tex):
    parameter = torch.rand(4096, dtype=torch.float16)
    reference = torch.nn.Parameter(parameter.clone())
    optimizer = torch.optim.SGD([reference], lr=0.25, momentum=0.125)
    velocity = torch.zeros_like(parameter)
    for step in range(4):
        grad = torch.rand_like(parameter)
        reference.grad = grad.clone()
        optimizer.step()
        lists = [[grad], [parameter], [velocity]]
        tex.multi_tensor_sgd(
            65536, torch.zeros(1), lists, 0.0, 0.125, 0.0, 0.25, False, step == 0, False, 1.0
        )
        assert torch.equal(parameter, reference.detach())


def adam(tex, variant, lists, *, step=1, lr=0.01, mode=1, weight_decay=0.1, noop=0.0, **more):
    capturable = "capturable" in variant
    options = [lr, 0.9, 0.95, 1e-8, step, mode, 1, weight_decay]
    if capturable:
        options[0], options[4] = torch.tensor([lr]), torch.tensor([step], dtype=torch.int32)
    getattr(tex, variant)(65536, torch.tensor([noop]), lists, *options, *more.values())


def test_capturable_adam_unscales_its_gradients_and_steps_like_the_other(tex):
    for masters in (False, True):
        dtype = torch.bfloat16 if masters else torch.float32
        exact = tensors()
        plain, captured = ([t.to(dtype) for t in exact] for _ in range(2))
        lists = [], []
        for which, parameters in zip(lists, (plain, captured), strict=True):
            moments = [torch.zeros_like(t) for t in exact], [torch.zeros_like(t) for t in exact]
            which.extend([None, parameters, *moments] + ([[t.clone() for t in exact]] if masters else []))
        name = "multi_tensor_adam_capturable" + ("_master" if masters else "")
        for step in (1, 2):
            grads = [t.to(dtype) for t in tensors()]
            scaled = [g * 8.0 for g in grads]
            lists[0][0], lists[1][0] = grads, scaled
            adam(tex, "multi_tensor_adam", lists[0], step=step)
            adam(tex, name, lists[1], step=step, inv_scale=torch.tensor([0.125]))
            assert all(torch.equal(a, b) for a, b in zip(scaled, grads, strict=True))
        before = [t.clone() for t in captured]
        adam(tex, name, lists[1], step=3, noop=1.0, inv_scale=torch.tensor([1.0]))
        for found, expected, kept in zip(captured, plain, before, strict=True):
            assert torch.equal(found, expected)
            assert torch.equal(found, kept)


def test_adam_with_remainders_keeps_the_fp32_master_in_two_halves(tex):
    master = torch.randn(4096)
    bits = master.view(torch.int32)
    remainder = bits.to(torch.int16)
    parameter = ((bits >> 16) + (remainder < 0)).to(torch.int16).view(torch.bfloat16)
    moments = [torch.zeros(4096) for _ in range(4)]
    reference = master.clone()
    for step in (1, 2, 3):
        grad = torch.randn(4096).to(torch.bfloat16)
        adam(tex, "multi_tensor_adam", [[grad], [reference], [moments[0]], [moments[1]]], step=step)
        lists = [[grad], [parameter], [moments[2]], [moments[3]], [remainder]]
        adam(tex, "multi_tensor_adam_param_remainder", lists, step=step)
        high = parameter.view(torch.int16).int() - (remainder < 0).int()
        assert torch.equal(((high << 16) | (remainder.int() & 0xFFFF)).view(torch.float32), reference)
        # To nearest; a tie goes away from zero, where a cast takes the even neighbour.
        tie = (reference.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(parameter[~tie], reference.to(torch.bfloat16)[~tie])


def test_adam_on_fp8_weights_casts_the_master_with_the_given_scale(te, tex):
    master, grad = torch.randn(64, 32), torch.randn(64, 32)
    reference, moments = master.clone(), [torch.zeros(64, 32) for _ in range(4)]
    codes, scale = torch.zeros(64, 32, dtype=torch.uint8), torch.tensor([200.0])
    largest, scale_inv = torch.tensor([0.5]), torch.zeros(1)
    adam(tex, "multi_tensor_adam", [[grad], [reference], [moments[0]], [moments[1]]])
    lists = [[grad], [codes], [moments[2]], [moments[3]], [master], [scale], [largest], [scale_inv]]
    adam(tex, "multi_tensor_adam_fp8", lists, fp8_dtype=te.DType.kFloat8E4M3)
    assert torch.equal(master, reference)
    expected = (reference * 200.0).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), expected.float())
    assert largest.item() == reference.abs().max().item()
    assert scale_inv.item() == np.float32(1.0) / np.float32(200.0)
