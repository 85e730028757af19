"""The module has the names that the real one has, and says which of them it cannot do."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch

from nemo_fp8_recipes.emulation import binding
from nemo_fp8_recipes.emulation.binding import surface
from nemo_fp8_recipes.errors import EmulationError
from tests.emulation.binding.architecture import HOPPER, Architecture


def test_every_name_that_te_uses_exists(te, tex):
    root = Path(te.__file__).parent
    used = set()
    for path in root.rglob("*.py"):
        if path.name == "onnx_extensions.py":  # there `tex` is a namespace of ONNX operators
            continue
        source = path.read_text()
        used |= set(re.findall(r"(?<!ops\.)\btex\.([A-Za-z_]\w*)", source))
    assert len(used) > 150
    assert {name for name in used if not hasattr(tex, name)} == set()


@pytest.mark.parametrize("name", ["fused_attn_fwd", "moe_permute_fwd", "nvfp4_data_transpose", "dropout_fwd"])
def test_what_is_not_emulated_names_itself(tex, name):
    with pytest.raises(NotImplementedError, match=rf"transformer_engine_torch\.{name} is not emulated"):
        getattr(tex, name)(torch.ones(2))


def test_no_unemulated_function_computes_anything(tex):
    for name in surface.NOT_EMULATED:
        with pytest.raises(NotImplementedError, match=re.escape(f".{name} is not emulated")):
            getattr(tex, name)()


def test_communication_overlap_names_itself(tex):
    with pytest.raises(NotImplementedError, match="CommOverlapP2P is not emulated"):
        tex.CommOverlapP2P([1, 2], torch.uint8, None, 2)
    assert issubclass(tex.CommOverlap, tex.CommOverlapCore)


def test_names_that_do_not_exist(tex):
    assert not hasattr(tex, "fp8_gemm")
    with pytest.raises(AttributeError, match="no attribute 'cast_to_fp8'"):
        _ = tex.cast_to_fp8


def test_every_table_entry_is_one_thing():
    assert not set(surface.EMULATED) & surface.NOT_EMULATED
    assert not set(surface.CLASSES) & (set(surface.EMULATED) | surface.NOT_EMULATED)


@pytest.mark.parametrize(
    ("enum", "member", "value"),
    [
        ("DType", "kByte", 0),
        ("DType", "kInt32", 2),
        ("DType", "kBFloat16", 6),
        ("DType", "kFloat8E4M3", 7),
        ("DType", "kFloat8E5M2", 8),
        ("DType", "kFloat4E2M1", 10),
        ("FP8FwdTensors", "GEMM1_OUTPUT", 2),
        ("FP8FwdTensors", "GEMM3_WEIGHT", 7),
        ("FP8BwdTensors", "GRAD_INPUT1", 1),
        ("FP8BwdTensors", "GRAD_OUTPUT3", 4),
        ("NVTE_Fused_Attn_Backend", "NVTE_No_Backend", -1),
        ("NVTE_QKV_Layout", "NVTE_THD_THD_THD", 14),
        ("NVTE_QKV_Layout", "NVTE_BHSD_BHSD_BHSD", 25),
        ("NVTE_QKV_Format", "NVTE_SBHD", 0),
        ("NVTE_Mask_Type", "NVTE_CAUSAL_MASK", 2),
        ("NVTEScalingMode", "NVTE_INVALID_SCALING", 100),
        ("CommOverlapType", "AG", 1),
    ],
)
def test_enum_values(tex, enum, member, value):
    assert int(getattr(getattr(tex, enum), member)) == value


def test_dtype_compares_with_te_s_own_and_pickles(te, tex):
    assert te.DType.kFloat8E5M2 == tex.DType.kFloat8E5M2
    assert tex.DType.kFloat8E5M2 == te.DType.kFloat8E5M2
    assert tex.DType.kFloat8E5M2 == 8
    assert tex.DType.kFloat8E5M2 != te.DType.kFloat8E4M3
    assert pickle.loads(pickle.dumps(tex.DType.kBFloat16)) is tex.DType.kBFloat16


def test_other_releases_of_te_are_refused():
    with pytest.raises(EmulationError, match=r"2\.14\.0 cannot be emulated.*2\.20"):
        binding.build("2.14.0", Architecture(HOPPER))


def test_the_documented_table_is_that_of_the_code():
    from nemo_fp8_recipes.emulation.binding.table import markdown

    document = Path(__file__).parents[3] / "docs" / "emulated-binding.md"
    assert document.read_text() == markdown()
