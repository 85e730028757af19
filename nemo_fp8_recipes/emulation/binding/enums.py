"""The enums of `transformer_engine_torch`, names and values as in the real module.

Sources in Transformer Engine, at the tags v2.11, v2.14.1, v2.17.1 and of 2.20:
`common/include/transformer_engine/{transformer_engine,fused_attn,fused_router, comm_gemm_overlap}.h`,
`pytorch/csrc/common.h`, `common/util/pybind_helper.h`. pybind11's enums convert to int and are no ints
themselves; `DType` alone compares equal to the int of the same value.
"""

from __future__ import annotations

import enum
from functools import cache

from nemo_fp8_recipes.emulation.binding.checks import MODULE

__all__ = ["ENUMS", "DType", "enums_of"]


class _PybindEnum(enum.Enum):
    def __int__(self) -> int:
        return int(self.value)

    def __index__(self) -> int:
        return int(self.value)


class DType(_PybindEnum):
    """Element types; the integer tags that Python and C++ exchange."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (int, DType)) and int(self) == int(other)

    def __hash__(self) -> int:
        return hash(int(self))


def _enum(name: str, **members: int) -> type[_PybindEnum]:
    made: type[_PybindEnum] = _PybindEnum(name, members, module=MODULE)  # type: ignore[assignment,call-arg]  # the functional API
    return made


def _numbered(name: str, *members: str) -> type[_PybindEnum]:
    return _enum(name, **{member: number for number, member in enumerate(members)})


_ALL: tuple[type[enum.Enum], ...] = (
    DType,
    _enum("NVTE_Fused_Attn_Backend", NVTE_F16_arbitrary_seqlen=1, NVTE_FP8=2, NVTE_No_Backend=-1),
    _numbered(
        "FP8FwdTensors",
        *(f"GEMM{gemm}_{tensor}" for gemm in (1, 2, 3) for tensor in ("INPUT", "WEIGHT", "OUTPUT")),
    ),
    _numbered(
        "FP8BwdTensors",
        *(f"{tensor}{gemm}" for gemm in (1, 2, 3) for tensor in ("GRAD_OUTPUT", "GRAD_INPUT")),
    ),
    _enum(
        "NVTEScalingMode",
        NVTE_DELAYED_TENSOR_SCALING=0,
        NVTE_MXFP8_1D_SCALING=1,
        NVTE_BLOCK_SCALING_1D=2,
        NVTE_BLOCK_SCALING_2D=3,
        NVTE_NVFP4_1D_SCALING=4,
        NVTE_INVALID_SCALING=100,
    ),
    _enum("Float8BlockScaleTensorFormat", GEMM_READY=0, COMPACT=1, INVALID=2),
    _numbered("NVTE_Bias_Type", "NVTE_NO_BIAS", "NVTE_PRE_SCALE_BIAS", "NVTE_POST_SCALE_BIAS", "NVTE_ALIBI"),
    _numbered(
        "NVTE_Mask_Type",
        "NVTE_NO_MASK",
        "NVTE_PADDING_MASK",
        "NVTE_CAUSAL_MASK",
        "NVTE_PADDING_CAUSAL_MASK",
        "NVTE_CAUSAL_BOTTOM_RIGHT_MASK",
        "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    ),
    _numbered(
        "NVTE_Softmax_Type", "NVTE_VANILLA_SOFTMAX", "NVTE_OFF_BY_ONE_SOFTMAX", "NVTE_LEARNABLE_SOFTMAX"
    ),
    _numbered(
        "NVTE_QKV_Format",
        "NVTE_SBHD",
        "NVTE_BSHD",
        "NVTE_THD",
        "NVTE_BSHD_2SBHD",
        "NVTE_SBHD_2BSHD",
        "NVTE_THD_2BSHD",
        "NVTE_THD_2SBHD",
        "NVTE_BHSD",
        "NVTE_QKV_Format_NOT_SET",
    ),
    _numbered(
        "NVTE_QKV_Layout",
        "NVTE_SB3HD",
        "NVTE_SBH3D",
        "NVTE_SBHD_SB2HD",
        "NVTE_SBHD_SBH2D",
        "NVTE_SBHD_SBHD_SBHD",
        "NVTE_BS3HD",
        "NVTE_BSH3D",
        "NVTE_BSHD_BS2HD",
        "NVTE_BSHD_BSH2D",
        "NVTE_BSHD_BSHD_BSHD",
        "NVTE_T3HD",
        "NVTE_TH3D",
        "NVTE_THD_T2HD",
        "NVTE_THD_TH2D",
        "NVTE_THD_THD_THD",
        "NVTE_SBHD_BSHD_BSHD",
        "NVTE_BSHD_SBHD_SBHD",
        "NVTE_THD_BSHD_BSHD",
        "NVTE_THD_SBHD_SBHD",
        "NVTE_Paged_KV_BSHD_BSHD_BSHD",
        "NVTE_Paged_KV_BSHD_SBHD_SBHD",
        "NVTE_Paged_KV_SBHD_BSHD_BSHD",
        "NVTE_Paged_KV_SBHD_SBHD_SBHD",
        "NVTE_Paged_KV_THD_BSHD_BSHD",
        "NVTE_Paged_KV_THD_SBHD_SBHD",
        "NVTE_BHSD_BHSD_BHSD",
        "NVTE_QKV_Layout_NOT_SET",
    ),
    _numbered("NVTERoutingMapFormat", "BYTEMAP", "BITMAP_U8"),
    _numbered("NVTEQBHistogramMode", "TWO_KERNEL", "FUSED_ATOMIC"),
    _numbered("CommOverlapType", "RS", "AG"),
    _numbered(
        "CommOverlapAlgo",
        "BULK_OVERLAP_AG",
        "BULK_OVERLAP_RS",
        "SPLIT_PIPELINED_AG_P2P",
        "SPLIT_PIPELINED_RS",
        "SPLIT_PIPELINED_RS_P2P",
        "ATOMIC_GEMM_RS",
        "ATOMIC_GEMM_AG_P2P",
        "ATOMIC_GEMM_RS_P2P",
        "EXTERNAL_BULK_OVERLAP_AG",
    ),
)

ENUMS: dict[str, type[enum.Enum]] = {made.__name__: made for made in _ALL}
"""Name in the module -> enum, of the newest release."""

_SINCE_2_20 = ("NVTEScalingMode", "NVTEQBHistogramMode", "NVTE_QKV_Layout_NOT_SET")
_SINCE_2_17 = (
    "NVTERoutingMapFormat",
    "NVTE_BHSD",
    "NVTE_QKV_Format_NOT_SET",
    "NVTE_BHSD_BHSD_BHSD",
)
_MISSING: dict[str, tuple[str, ...]] = {
    "2.11": (*_SINCE_2_20, *_SINCE_2_17, "INVALID"),
    "2.14": (*_SINCE_2_20, *_SINCE_2_17),
    "2.17": _SINCE_2_20,
}
"""Release -> the enums and members that it lacks."""
_EXTRA: dict[str, dict[str, dict[str, int]]] = {
    release: {"NVTE_Fused_Attn_Backend": {"NVTE_F16_max512_seqlen": 0}} for release in ("2.11", "2.14")
}
"""Release -> enum -> the members that later releases lack."""


@cache
def enums_of(release: str) -> dict[str, type[enum.Enum]]:
    """Name in the module -> enum, of a tested release ("2.14")."""
    missing, extra = _MISSING.get(release, ()), _EXTRA.get(release, {})
    found: dict[str, type[enum.Enum]] = {}
    for name, newest in ENUMS.items():
        if name in missing:
            continue
        members = {member.name: int(member.value) for member in newest if member.name not in missing}
        members |= extra.get(name, {})
        found[name] = newest if len(members) == len(newest) else _enum(name, **members)
    return found


DType.__module__ = MODULE
