"""`nemo-fp8 selftest`, with the emulated binding posing as native: every case agrees, and a kernel that is
wrong in one bit is found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_fp8_recipes import cli, numerics
from nemo_fp8_recipes.numerics import fp4, nvfp4
from nemo_fp8_recipes.selftest import compare, native, vectors
from nemo_fp8_recipes.selftest.cases import HADAMARD_KINDS, KINDS, RECIPES, Case, cases, make_input
from tests.support.processes import run_python


def test_inputs_are_the_same_every_time_and_reach_what_they_claim() -> None:
    for kind in (*KINDS, *HADAMARD_KINDS):
        for dtype in ("fp32", "bf16", "fp16"):
            x = make_input(kind, dtype)
            assert torch.equal(x.nan_to_num(), make_input(kind, dtype).nan_to_num())
        special = make_input("special", "bf16")
    assert special.isnan().any()
    assert special.isinf().any()
    tiny = make_input("subnormal", "fp32")
    assert (tiny.abs() < torch.finfo(torch.float32).tiny).float().mean() > 0.9
    assert make_input("every_16_bit_value", "bf16").view(torch.int16).unique().numel() > 65000


def test_every_case_agrees_and_is_exported_for_others_to_check(
    emulated: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vectors.npz"
    assert cli.main(["selftest", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device"] == "emulated b200"
    assert {*RECIPES, "amax update"} == set(told["recipes"])
    for name, verdict in told["recipes"].items():
        assert verdict["differing"] == {}
        assert verdict["compared"] == (12 if name == "amax update" else len(list(cases(name))))

    assert cli.main(["selftest", "--recipe", "mxfp8", "--recipe", "nvfp4", "--export", str(file)]) == 0
    capsys.readouterr()
    assert cli.main(["selftest", "--check", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "emulated b200" in shown
    assert "mxfp8        agrees bit for bit in 42 cases" in shown

    about, recorded = vectors.read(file)
    entries = list(recorded)
    assert (
        len(entries) == len(about["cases"]) == sum(len(list(cases(recipe))) for recipe in ("mxfp8", "nvfp4"))
    )
    case, x, buffers = next(entry for entry in entries if entry[0].recipe == "mxfp8")
    buffers["columnwise_scale_inv"][3, 5] ^= 1
    (verdict,) = compare.compare([(case, x, buffers)]).values()
    assert "columnwise_scale_inv differs in 1 of 768, first at (3, 5)" in verdict.differing[case.name]


def test_a_kernel_that_differs_is_told_with_the_case_and_status_1(
    emulated: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = native.native

    def wrong(case: Case, x: torch.Tensor) -> dict[str, Any]:
        found = real(case, x)
        if case.kind == "special":
            found["data"].view(-1)[7] ^= 1
        return found

    monkeypatch.setattr(native, "native", wrong)
    assert cli.main(["selftest", "--recipe", "tensorwise"]) == 1
    shown = capsys.readouterr().out
    assert "tensorwise   DIFFERS in 12 of 84 cases" in shown
    assert "tensorwise[fmt=e4m3]/special/fp32: data differs in 1 of 24576, first at (0, 7)" in shown


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nearest", "went up"),
        ("always up", "went up"),
        ("too far", "not neighbours"),
        ("sign", "not neighbours"),
        ("scale", "1 scales differ"),
        ("amax", "amax is 7.0"),
    ],
)
def test_stochastic_rounding_that_is_none_is_found(wrong: str, message: str) -> None:
    x = make_input("normal", "bf16")
    largest = numerics.amax(x).reshape(1)
    found: dict[str, torch.Tensor] = {}
    for direction, matrix in (("rowwise", x), ("columnwise", x.t().contiguous())):
        generator = torch.Generator().manual_seed(3)
        quantized = nvfp4.quantize_1d(matrix, largest, stochastic=wrong != "nearest", generator=generator)
        found[f"{direction}_data"], found[f"{direction}_scale_inv"] = quantized
        found[f"amax_{direction}"] = largest.clone()
    if wrong == "always up":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fp4, "random_bits", lambda like, _: torch.full(like.shape, 255).to(torch.uint8))
            found["rowwise_data"] = nvfp4.quantize_1d(x, largest, stochastic=True).packed
    elif wrong == "too far":
        found["columnwise_data"][0] ^= 0x44
    elif wrong == "sign":
        found["columnwise_data"][3, 3] ^= 0x80
    elif wrong == "scale":
        found["rowwise_scale_inv"][5, 5] ^= 1
    elif wrong == "amax":
        found["amax_columnwise"] = torch.tensor([7.0])
    case = Case("nvfp4", "normal", "bf16", {"two_d": False, "stochastic": True})
    (verdict,) = compare.compare([(case, x, found)]).values()
    assert message in verdict.differing[case.name]


def test_a_wrong_amax_update_is_found() -> None:
    def one_step_late(histories: list, scales: list, reduced: torch.Tensor, *_: object) -> None:
        return None

    assert compare.compare_update(one_step_late).differing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "mxfp9"], "Did you mean mxfp8"),
        (["--exprot", "f"], "Did you mean"),
        (["--export", "/nonexistent/f.npz"], "no directory /nonexistent"),
        (["--check", "/nonexistent.npz"], "not a file of golden vectors: No such file or directory.\n"),
        (["fp8_recipe=mxfp8"], "takes no argument"),
        (["--check", "f.npz", "--recipe", "mxfp8"], "takes no --recipe"),
        (["--check", "f.npz", "--export", "g.npz"], "takes no --export"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["selftest", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_files_in_which_nothing_can_be_compared_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.npz"
    vectors.write(empty, [], device="x", versions={})
    assert cli.main(["selftest", "--check", str(empty)]) == 2
    assert "holds no case" in capsys.readouterr().err
    cut = tmp_path / "cut.npz"
    cut.write_bytes(empty.read_bytes()[:-40])
    assert cli.main(["selftest", "--check", str(cut)]) == 2
    assert "not a file of golden vectors" in capsys.readouterr().err
    for content in (b"", b"text", np.arange(3).tobytes()):
        cut.write_bytes(content)
        assert cli.main(["selftest", "--check", str(cut)]) == 2
        assert capsys.readouterr().err.endswith("vectors: it is no archive that --export wrote.\n")
    np.savez(cut, about=np.frombuffer(b"[1]", dtype=np.uint8))
    assert cli.main(["selftest", "--check", str(cut)]) == 2
    assert "it is no archive that --export wrote" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_exits_3() -> None:
    if torch.cuda.is_available() and not hasattr(torch.cuda.is_available, "__wrapped__"):
        pytest.importorskip("nemo_fp8_recipes.emulation").active() or pytest.skip("there is a GPU here")
    done = run_python(
        "import sys; from nemo_fp8_recipes import cli; sys.exit(cli.main(['selftest']))", check=False
    )
    assert done.returncode == 3
    assert "there is no GPU" in done.stderr
