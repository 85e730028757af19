"""What is quantised for all experts at once is read as one matrix, and says what they say one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.injection import autocast
from nemo_fp8_recipes.telemetry.groups import one_matrix
from nemo_fp8_recipes.telemetry.linears import Operand
from nemo_fp8_recipes.telemetry.observer import Observer
from nemo_fp8_recipes.telemetry.probes import (
    BlockProbe,
    ElementProbe,
    Nvfp4Probe,
    TensorwiseProbe,
    scale_codes,
)
from nemo_fp8_recipes.telemetry.probes.index import IndexCache
from nemo_fp8_recipes.telemetry.probes.stored import stored, values
from tests.emulation.binding.architecture import BLACKWELL, HOPPER, Architecture
from tests.support.te_release import since
from tests.telemetry.test_no_waiting import quantizer as fake_quantizer

pytestmark = [pytest.mark.usefixtures("emulated"), since("2.20")]

ROWS = [128, 0, 256, 128]
SUMS = ("norm", "noise", "bulk_norm", "bulk_noise")
EXPERTS = len(ROWS)


@pytest.fixture
def pose(emulated, monkeypatch):
    from nemo_fp8_recipes.emulation.binding import device

    return lambda capability: monkeypatch.setattr(device, "_device", Architecture(capability))


def made(recipe, **usages):
    """A quantizer of the recipe."""
    import transformer_engine.pytorch as te

    e4m3 = te.DType.kFloat8E4M3
    if recipe == "tensorwise":
        found = te.Float8CurrentScalingQuantizer(e4m3, device=torch.device("cuda"))
    elif recipe in ("blockwise", "square"):
        found = te.Float8BlockQuantizer(
            e4m3, rowwise=True, columnwise=True, block_scaling_dim=2 if recipe == "square" else 1
        )
    elif recipe == "nvfp4":
        found = te.NVFP4Quantizer(with_rht=True, with_post_rht_amax=True)
    else:
        found = te.MXFP8Quantizer(e4m3)
    found.set_usage(**{"rowwise": True, "columnwise": True, **usages})
    return found


CASES = [
    ("mxfp8", BLACKWELL, 288, False),
    ("mxfp8", BLACKWELL, 288, True),
    ("nvfp4", BLACKWELL, 384, True),
    ("tensorwise", BLACKWELL, 96, False),
    ("tensorwise", HOPPER, 96, False),
    ("blockwise", HOPPER, 288, False),
    ("square", HOPPER, 288, False),
]


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(("recipe", "architecture", "columns", "swizzled"), CASES)
def test_the_values_are_those_of_the_experts(pose, recipe, architecture, columns, swizzled, alike):
    import transformer_engine_torch as tex

    pose(architecture)
    rows = [128] * EXPERTS if alike else ROWS
    x = torch.randn(sum(rows), columns).bfloat16() * torch.logspace(-2, 2, sum(rows))[:, None].bfloat16()
    quantizer = made(recipe)
    quantizer.optimize_for_gemm = swizzled
    grouped = tex.group_quantize(x, quantizer, EXPERTS, None if alike else torch.tensor(rows))
    coded = stored(quantizer, one_matrix(grouped, quantizer))
    assert coded is not None
    found = values(coded, IndexCache())
    one_by_one = []
    for part in x.split(rows):
        if len(part):
            alone = made(recipe)
            one_by_one.append(values(stored(alone, tex.quantize(part.contiguous(), alone)), IndexCache()))
    assert torch.equal(found.values, torch.cat([each.values for each in one_by_one]))
    limits = torch.cat(
        [each.limit.expand_as(each.values) if each.limit.numel() == 1 else each.limit for each in one_by_one]
    )
    assert torch.equal(found.limit.expand_as(found.values), limits.expand_as(found.values))


@pytest.mark.parametrize(("recipe", "architecture", "columns", "_swizzled"), CASES)
def test_columns_of_several_experts_are_no_matrix(pose, recipe, architecture, columns, _swizzled):
    import transformer_engine_torch as tex

    pose(architecture)
    if recipe == "tensorwise" and architecture == BLACKWELL:
        pytest.skip("there both directions are the same data")
    x = torch.randn(sum(ROWS), columns).bfloat16()
    quantizer = made(recipe)
    grouped = tex.group_quantize(x, quantizer, EXPERTS, torch.tensor(ROWS))
    grouped.rowwise_data = grouped.scale_inv = None
    assert one_matrix(grouped, quantizer) is None


@pytest.mark.parametrize(("recipe", "architecture", "columns", "_swizzled"), CASES)
def test_one_expert_is_a_tensor(pose, recipe, architecture, columns, _swizzled):
    import transformer_engine_torch as tex

    pose(architecture)
    x = torch.randn(256, columns).bfloat16()
    quantizer = made(recipe)
    grouped = tex.group_quantize(x, quantizer, 1, torch.tensor([256]))
    alone = tex.quantize(x, made(recipe))
    for drop in (False, True):
        if drop and (recipe == "nvfp4" or (recipe == "tensorwise" and architecture == BLACKWELL)):
            continue  # nothing that can be compared, or no data of that direction
        if drop:
            grouped.rowwise_data = grouped.scale_inv = None
            alone.update_usage(rowwise_usage=False, columnwise_usage=True)
        found = values(stored(quantizer, one_matrix(grouped, quantizer)), IndexCache())
        wanted = values(stored(quantizer, alone), IndexCache())
        assert torch.equal(found.values, wanted.values)


def readings(recipe, grouped, *, needs_grad=True, scale=1.0, spare=0, whatif=(), **options):
    """What is read of `GroupedLinear` in a step, by operand and name; `spare` rows belong to no expert."""
    import transformer_engine.pytorch as te

    torch.manual_seed(3)
    options = {"bias": False, "params_dtype": torch.bfloat16, **options}
    module = te.GroupedLinear(EXPERTS, 256, 128, use_grouped_tensor=grouped, **options)
    x, dy = torch.randn(sum(ROWS), 256).bfloat16() * scale, torch.randn(sum(ROWS), 128).bfloat16()
    if spare:
        x, dy = (torch.cat([each, torch.full((spare, each.shape[1]), 1e30).bfloat16()]) for each in (x, dy))
        x[-1], dy[-1] = torch.nan, torch.inf
    x.requires_grad_(needs_grad)
    observer = Observer(module, history=False, whatif=whatif)
    observer.begin(stats=True)
    with autocast(recipe):
        y = module(x, torch.tensor(ROWS) if grouped else ROWS)
    y.backward(dy)
    reading = observer.end()
    assert reading is not None
    assert whatif or all(spec.length == 1 for spec in reading.specs)
    values = reading.values.split([spec.length for spec in reading.specs])
    return {
        (spec.module, spec.tensor, f"{spec.recipe}/{spec.name}" if spec.whatif else spec.name): (
            value.tolist() if spec.length > 1 else value.item()
        )
        for spec, value in zip(reading.specs, values, strict=True)
    }


@pytest.mark.parametrize("name", ["mxfp8", "tensorwise", "nvfp4"])
def test_a_row_of_all_experts_says_what_theirs_say(name):
    recipe = recipes.load(name, **({"disable_stochastic_rounding": True} if name == "nvfp4" else {}))
    found, apart = readings(recipe, True), readings(recipe, False)
    assert not [key for key in (*found, *apart) if key[2] == "unobserved"]
    assert {key for key in found if key[1] == "weight"} == {key for key in apart if key[1] == "weight"}
    with_tokens = [f"gemm{number}" for number, rows in enumerate(ROWS) if rows]
    together = {
        "elements": sum,
        "zero_elements": sum,
        "underflows": sum,
        "norm": lambda parts: sum(part**2 for part in parts) ** 0.5,
        "noise": lambda parts: sum(part**2 for part in parts) ** 0.5,
        "largest": max,
        "amax": max,
        "scale_inv": max,
        "scale_inv_max": max,
        "scale_inv_min": min,
    }
    compared = set()
    for tensor in ("input", "grad_output"):
        for stat, combine in together.items():
            parts = [value for key, value in apart.items() if key[1:] == (tensor, stat)]
            if not parts:
                continue
            assert len(parts) == len(with_tokens)
            assert found["", tensor, stat] == pytest.approx(combine(parts), rel=1e-5)
            compared.add(stat)
    assert {"elements", "noise"} < compared
    assert compared & {"scale_inv", "scale_inv_max"}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", ["mxfp8", "tensorwise", "nvfp4"])
def test_rows_of_no_expert_are_not_counted(name, kernel, monkeypatch):
    """A buffer may have more rows than the experts together; what lies there is not written, and not read."""
    from nemo_fp8_recipes.telemetry import host_kernels

    if not kernel:
        monkeypatch.setattr(host_kernels, "measure", None)
    recipe = recipes.load(name, **({"disable_stochastic_rounding": True} if name == "nvfp4" else {}))
    chosen = ["*"] if name == "mxfp8" else []
    alone, more = (readings(recipe, True, spare=spare, whatif=chosen) for spare in (0, 256))
    of_elements = {"elements", "zero_elements", "underflows", "saturated", "nonfinite", "largest", *SUMS}
    compared = {key for key in alone if key[2].split("/")[-1] in {*of_elements, "amax_by_rank"}}
    assert {key[1] for key in compared} == {"input", "weight", "grad_output"}
    assert not chosen or {key[2] for key in compared} > {"nvfp4/noise", "tensorwise/bulk_norm"}
    assert alone["", "input", "elements"] == sum(ROWS) * 256
    for key in compared:  # the elements from which the bulk's limit is estimated are others
        assert more[key] == pytest.approx(alone[key], rel=0.02 if "bulk" in key[2] else 1e-5), key


@pytest.mark.parametrize("kernel", [True, False])
def test_no_rows_at_all_are_none(kernel, monkeypatch):
    import transformer_engine_torch as tex

    from nemo_fp8_recipes.telemetry import host_kernels

    if not kernel:
        monkeypatch.setattr(host_kernels, "measure", None)
    quantizer, x = made("mxfp8"), torch.full((128, 64), torch.nan).bfloat16()
    grouped = tex.group_quantize(x, quantizer, 2, torch.tensor([0, 0]))
    probe = ElementProbe(IndexCache())
    probe.quantised(Operand("m", "input"), quantizer, one_matrix(grouped, quantizer), x)
    assert not probe.end().values.any()


def test_experts_of_zeros_alone():
    """The scale of zeros is 1, of all experts as of one."""
    found = {}
    for grouped in (True, False):
        read = readings(recipes.load("tensorwise"), grouped, scale=0.0)
        found[grouped] = {
            value for (_, tensor, name), value in read.items() if (tensor, name) == ("input", "scale_inv")
        }
    assert found[True] == found[False] == {1.0}


def judged(recipe, grouped, step_count=2):
    """What the other recipes would do to the inputs and gradients of `GroupedLinear`, in the last of some
    steps: values by operand, recipe and name.
    """
    import transformer_engine.pytorch as te

    torch.manual_seed(3)
    module = te.GroupedLinear(
        EXPERTS, 256, 128, use_grouped_tensor=grouped, bias=False, params_dtype=torch.bfloat16
    )
    observer = Observer(module, history=False, whatif=["*"])
    for step in range(1, step_count + 1):
        # Experts that differ by far: one amax for all of them would show.
        loud = torch.logspace(-3, 3, sum(ROWS))[:, None] * step
        x = (torch.randn(sum(ROWS), 256) * loud).bfloat16().requires_grad_()
        dy = (torch.randn(sum(ROWS), 128) * loud).bfloat16()
        observer.begin(stats=True)
        with autocast(recipe):
            y = module(x, torch.tensor(ROWS) if grouped else ROWS)
        y.backward(dy)
        reading = observer.end()
    assert observer.chosen_modules() == {"", *(f".gemm{number}" for number in range(EXPERTS))}
    values = reading.values.split([spec.length for spec in reading.specs])
    return {
        (spec.module, spec.tensor, spec.recipe, spec.name): value.tolist()
        for spec, value in zip(reading.specs, values, strict=True)
        if spec.whatif and spec.tensor != "weight"
    }


@pytest.mark.parametrize("name", ["mxfp8", "tensorwise"])
def test_the_other_recipes_judge_each_expert_by_itself(name):
    recipe = recipes.load(name)
    together, apart = judged(recipe, True), judged(recipe, False)
    assert {key[0] for key in together} == {""}
    others = {key[2] for key in together}
    assert others == {"delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"} - {name}
    combine = {
        **dict.fromkeys(("elements", "zero_elements", "underflows", "saturated"), sum),
        **dict.fromkeys(("norm", "noise"), lambda parts: sum(part**2 for part in parts) ** 0.5),
        "largest": max,
    }
    compared = set()
    for _, tensor, other, stat in together:
        parts = [value for key, value in apart.items() if key[1:] == (tensor, other, stat)]
        found = together["", tensor, other, stat]
        if stat == "amax_by_rank":  # experts without tokens have no row where they are apart
            assert [value for value in found if value > 0] == [value for [value] in parts]
            assert len(found) == EXPERTS
        elif stat in combine:
            assert found == pytest.approx([combine[stat]([value for [value] in parts])], rel=1e-5)
            compared.add((tensor, other, stat))
    assert len(compared) == 2 * 4 * len(combine)


def test_a_saved_original_input_is_read_in_the_forward_pass():
    found = readings(recipes.load("mxfp8"), True, save_original_input=True)
    assert ("", "input", "elements") in found
    assert not [key for key in found if key[2] == "unobserved"]


def test_columns_alone_are_marked():
    """The gradient of a layer whose input needs none is not read rowwise."""
    found = readings(recipes.load("mxfp8"), True, needs_grad=False)
    assert {key[:2] for key in found if key[2] == "unobserved"} == {
        (f".gemm{number}", "grad_output") for number in range(EXPERTS)
    }
    assert ("", "input", "elements") in found


def fake_group(recipe: str, rows: int, columns: int) -> Any:
    """The attributes of a grouped tensor that are read, of fake tensors."""

    def make(size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    fp32 = torch.float32
    elements = rows * columns
    scales = {
        "mxfp8": make(elements // 32),
        "nvfp4": make(elements // 16),
        "blockwise": make(elements // 128, fp32),
        "tensorwise": make(EXPERTS, fp32),
    }
    return SimpleNamespace(
        logical_shape=(rows, columns),
        num_tensors=EXPERTS,
        first_dims=make(EXPERTS, torch.int64),
        last_dims=None,
        rowwise_data=make(elements // (2 if recipe == "nvfp4" else 1)),
        columnwise_data=None,
        scale_inv=scales[recipe],
        amax=make(EXPERTS, fp32),
        _with_gemm_swizzled_scales=recipe in ("mxfp8", "nvfp4"),
    )


@pytest.mark.parametrize("recipe", ["mxfp8", "nvfp4", "tensorwise", "blockwise"])
def test_nothing_waits_for_the_numbers_of_rows(recipe, monkeypatch):
    from nemo_fp8_recipes.telemetry import host_kernels

    for name in ("measure", "scale_counts", "scale_distribution"):
        monkeypatch.setattr(host_kernels, name, None)
    monkeypatch.setattr(scale_codes, "_HOSTS", ())  # count as on a GPU
    with FakeTensorMode():
        indices = IndexCache()
        quantizer = fake_quantizer(recipe)
        cheap = {
            "mxfp8": BlockProbe(indices, "mxfp8"),
            "blockwise": BlockProbe(indices, "blockwise"),
            "nvfp4": Nvfp4Probe(indices),
            "tensorwise": TensorwiseProbe(indices),
        }[recipe]
        elements = ElementProbe(indices)
        for probe in (cheap, elements):
            probe.begin()
        matrix = one_matrix(fake_group(recipe, 512, 256), quantizer)
        assert matrix is not None
        cheap.quantised(Operand("m", "input"), quantizer, matrix)
        elements.quantised(Operand("m", "input"), quantizer, matrix, torch.zeros(512, 256))
        assert cheap.end() is not None
        assert elements.end() is not None
