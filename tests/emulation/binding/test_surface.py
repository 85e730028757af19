"""The module has the names that the real one has, and says which of them it cannot do."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch

from nemo_fp8_recipes.emulation import binding
from nemo_fp8_recipes.emulation.binding import surface
from nemo_fp8_recipes.emulation.binding.introduced import ADDED, REMOVED, exists
from nemo_fp8_recipes.emulation.binding.releases import RELEASES
from nemo_fp8_recipes.errors import EmulationError
from tests.emulation.binding.architecture import HOPPER, Architecture
from tests.support.te_release import RELEASE, since


def test_every_name_that_te_uses_exists(te, tex):
    root = Path(te.__file__).parent
    used = set()
    for path in root.rglob("*.py"):
        if path.name == "onnx_extensions.py":  # there `tex` is a namespace of ONNX operators
            continue
        source = path.read_text()
        used |= set(re.findall(r"(?<!ops\.)\btex\.([A-Za-z_]\w*)", source))
    assert len(used) > 100
    assert {name for name in used if not hasattr(tex, name)} == set()


@pytest.mark.parametrize("name", ["fused_attn_fwd", "fused_attn_bwd", "init_nvshmem_backend"])
def test_what_is_not_emulated_names_itself(tex, name):
    with pytest.raises(NotImplementedError, match=rf"transformer_engine_torch\.{name} is not emulated"):
        getattr(tex, name)(torch.ones(2))


def test_no_unemulated_function_computes_anything(tex):
    for name in surface.NOT_EMULATED:
        if not exists(name, RELEASE):
            assert not hasattr(tex, name)
            continue
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
        pytest.param("NVTE_QKV_Layout", "NVTE_BHSD_BHSD_BHSD", 25, marks=since("2.17")),
        ("NVTE_QKV_Format", "NVTE_SBHD", 0),
        ("NVTE_Mask_Type", "NVTE_CAUSAL_MASK", 2),
        pytest.param("NVTEScalingMode", "NVTE_INVALID_SCALING", 100, marks=since("2.20")),
        ("CommOverlapType", "AG", 1),
    ],
)
def test_enum_values(tex, enum, member, value):
    assert int(getattr(getattr(tex, enum), member)) == value


@since("2.17")
def test_dtype_compares_with_te_s_own_and_pickles(te, tex):
    assert te.DType.kFloat8E5M2 == tex.DType.kFloat8E5M2
    assert tex.DType.kFloat8E5M2 == te.DType.kFloat8E5M2
    assert tex.DType.kFloat8E5M2 == 8
    assert tex.DType.kFloat8E5M2 != te.DType.kFloat8E4M3
    assert pickle.loads(pickle.dumps(tex.DType.kBFloat16)) is tex.DType.kBFloat16


@pytest.mark.parametrize("version", ["2.10.0", "2.12.0", "2.18.0", "2.21.0", "3.0", "unknown"])
def test_other_releases_of_te_are_refused_with_the_tested_ones(version):
    with pytest.raises(EmulationError) as refused:
        binding.build(version, Architecture(HOPPER))
    message = str(refused.value)
    assert (
        f"Transformer Engine {version} cannot be emulated: tested are 2.11, 2.14, 2.17 and 2.20." in message
    )
    assert refused.value.allowed == ("2.11.*", "2.14.*", "2.17.*", "2.20.*")


@pytest.mark.parametrize("version", ["2.11.0", "2.14.0", "2.14.1", "2.17.1+4f1c", "2.20.2"])
def test_the_release_is_chosen_by_the_version(emulated, version):
    from nemo_fp8_recipes.emulation.binding import releases

    try:
        made = binding.build(version, emulated)
        chosen = releases.release()
    finally:
        releases.use(RELEASES[RELEASE])
    assert version.startswith(f"{chosen.name}.")
    assert hasattr(made, "glu") == (chosen.name != "2.11")
    assert hasattr(made, "convert_host_pointers_to_tensor") == (chosen.name == "2.14")
    assert hasattr(made, "create_empty_quantized_tensor") == (chosen.name in ("2.17", "2.20"))
    assert hasattr(made, "situglu") == (chosen.name == "2.20")
    assert hasattr(made.NVTE_Fused_Attn_Backend, "NVTE_F16_max512_seqlen") == (
        chosen.name in ("2.11", "2.14")
    )


def test_every_name_of_the_history_is_in_the_surface():
    names = set(surface.EMULATED) | surface.NOT_EMULATED | set(surface.SUBMODULES)
    assert set().union(*ADDED.values(), *REMOVED.values()) <= names
    assert set(ADDED) | set(REMOVED) <= set(RELEASES)


def test_the_documented_table_is_that_of_the_code():
    from nemo_fp8_recipes.emulation.binding.table import markdown

    document = Path(__file__).parents[3] / "docs" / "emulated-binding.md"
    assert document.read_text() == markdown()
