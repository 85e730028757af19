"""The Transformer Engine releases whose compiled module is emulated, and in what their bindings differ.

Read from the tags v2.11, v2.14.1, v2.17.1 of Transformer Engine and its main branch at 2.20:
`pytorch/csrc/quantizer.cpp`, `pytorch/csrc/extensions/*.cpp`, `common/cast/nvfp4/core_nvfp4.cuh`,
`common/transpose/quantize_transpose_vector_blockwise*.cu` and the Python classes that the C++ makes. Since
which release functions and enum members exist is in `introduced.py` and `enums.py`; everything else that a
release does otherwise is a field here, and the binding asks for it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nemo_fp8_recipes.errors import EmulationError

__all__ = ["NEWEST", "RELEASES", "Nvfp4Swizzle", "Release", "release", "release_of", "tested", "use"]


class Nvfp4Swizzle(Enum):
    """For which NVFP4 quantizers with `optimize_for_gemm` the kernel writes swizzled scales."""

    NEVER = "never"
    HADAMARD = "with the Hadamard transform"
    HADAMARD_OR_SQUARE = "with the Hadamard transform, or with 16x16 blocks"


@dataclass(frozen=True)
class Release:
    """How the binding of one release differs from that of the others.

    Attributes:
        name: major and minor version, "2.14".
        patch: the patch release that the tests run with.
        missing_options: quantizer attributes of other releases that this one's quantizers do not have, as
            "MXFP8Quantizer.with_2d_quantization", and the value that their absence amounts to.
        missing_fields: the same for the fields of quantised tensors, without the class.
        python_dtype: TE's Python has a `DType` of its own, which tensors carry instead of the binding's.
        compact_blockwise: block-scaled tensors carry a `data_format`, and a quantizer with
            `all_gather_usage` makes compact ones: not transposed, without padding.
        current_scaling_buffers: the quantizers of current scaling hold `amax` and `scale`, which the kernels
            write, and `use_existing_amax`, which makes `quantize` take the amax as it is.
        fused_attention_reason: `get_fused_attn_backend` takes one object and answers with a reason too.
        groups_of_every_format: groups are quantised with current and block scaling too, and their last
            dimension may vary.
        nvfp4_divides: the scale of an NVFP4 block is (amax / 6) * S, two roundings, and not amax * (S / 6).
        nvfp4_square_columns_alone: 16x16 blocks can be had columnwise without the rowwise data.
        nvfp4_row_scaled_columns: row-scaled NVFP4 can be had columnwise.
        nvfp4_swizzle: which kernels write NVFP4 scales in the GEMM's order.
        permute_sorts_unsigned: `moe_permute_fwd` takes a negative expert for a large one, and drops it.
        router_in_fp32: the router's kernels compute and store in fp32, and not in the dtype of the logits.
        router_radix: they select 16 and more experts by radix, which breaks ties by index.
        router_skips_nan: they select up to 8 experts by a search in which NaN is never the largest.
        router_softmax_online: the sum of their softmax goes along with the search for the largest score.
        swizzles_after_quantizing: `quantize` brings scales into the GEMM's order where the quantizer has
            `optimize_for_gemm` and its kernel did not.
    """

    name: str
    patch: str
    missing_options: Mapping[str, Any] = field(default_factory=dict)
    missing_fields: Mapping[str, Any] = field(default_factory=dict)
    python_dtype: bool = True
    compact_blockwise: bool = False
    current_scaling_buffers: bool = False
    fused_attention_reason: bool = False
    groups_of_every_format: bool = False
    nvfp4_divides: bool = False
    nvfp4_square_columns_alone: bool = True
    nvfp4_row_scaled_columns: bool = False
    nvfp4_swizzle: Nvfp4Swizzle = Nvfp4Swizzle.HADAMARD
    permute_sorts_unsigned: bool = True
    router_in_fp32: bool = True
    router_radix: bool = True
    router_skips_nan: bool = True
    router_softmax_online: bool = True
    swizzles_after_quantizing: bool = True

    def option(self, quantizer: Any, name: str) -> Any:
        """Attribute of a TE quantizer, or what it amounts to where this release has none."""
        missing = f"{type(quantizer).__name__}.{name}"
        return self.missing_options[missing] if missing in self.missing_options else getattr(quantizer, name)

    def field(self, tensor: Any, name: str) -> Any:
        """Attribute `_<name>` of a quantised tensor, or what it amounts to where this release has none."""
        return self.missing_fields[name] if name in self.missing_fields else getattr(tensor, f"_{name}")

    def set_fields(self, tensor: Any, **values: Any) -> None:
        """Set attributes `_<name>` of a quantised tensor, those that this release has."""
        for name, value in self.constructor(values).items():
            setattr(tensor, f"_{name}", value)

    def constructor(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that this release's constructors of quantised tensors take."""
        return {name: value for name, value in arguments.items() if name not in self.missing_fields}


_NO_TWO_DIMENSIONAL_MXFP8 = {"MXFP8Quantizer.with_2d_quantization": False}
_NO_ROW_SCALED_NVFP4_OPTIONS = {
    "NVFP4Quantizer.row_scaled_nvfp4": False,
    "NVFP4Quantizer.nvfp4_use_4over6": False,
    "NVFP4Quantizer.nvfp4_e4m3_max": 448,
}
_NO_ROW_SCALED_NVFP4_FIELDS = {
    "row_scaled_nvfp4": False,
    "nvfp4_use_4over6": False,
    "nvfp4_e4m3_max": 448,
}

RELEASES: dict[str, Release] = {
    made.name: made
    for made in (
        Release(
            name="2.11",
            patch="2.11.0",
            missing_options={
                **_NO_TWO_DIMENSIONAL_MXFP8,
                **_NO_ROW_SCALED_NVFP4_OPTIONS,
                "MXFP8Quantizer.optimize_for_gemm": False,
                "NVFP4Quantizer.optimize_for_gemm": False,
            },
            missing_fields={
                **_NO_ROW_SCALED_NVFP4_FIELDS,
                "with_gemm_swizzled_scales": False,
                "fake_dtype": None,
            },
            python_dtype=False,
            compact_blockwise=True,
            current_scaling_buffers=True,
            nvfp4_divides=True,
            nvfp4_square_columns_alone=False,
            nvfp4_swizzle=Nvfp4Swizzle.NEVER,
            permute_sorts_unsigned=False,
            router_in_fp32=False,
            router_radix=False,
            router_skips_nan=False,
            router_softmax_online=False,
            swizzles_after_quantizing=False,
        ),
        Release(
            name="2.14",
            patch="2.14.1",
            missing_options={
                **_NO_TWO_DIMENSIONAL_MXFP8,
                **_NO_ROW_SCALED_NVFP4_OPTIONS,
                "Float8BlockQuantizer.all_gather_usage": False,
            },
            missing_fields={**_NO_ROW_SCALED_NVFP4_FIELDS, "data_format": None},
            python_dtype=False,
            current_scaling_buffers=True,
            nvfp4_square_columns_alone=False,
            nvfp4_swizzle=Nvfp4Swizzle.NEVER,
            permute_sorts_unsigned=False,
            router_radix=False,
            router_skips_nan=False,
            router_softmax_online=False,
            swizzles_after_quantizing=False,
        ),
        Release(
            name="2.17",
            patch="2.17.1",
            missing_options={**_NO_TWO_DIMENSIONAL_MXFP8, "Float8BlockQuantizer.all_gather_usage": False},
            missing_fields={"data_format": None},
        ),
        Release(
            name="2.20",
            patch="2.20.2",
            missing_options={"Float8BlockQuantizer.all_gather_usage": False},
            missing_fields={"data_format": None},
            fused_attention_reason=True,
            groups_of_every_format=True,
            nvfp4_row_scaled_columns=True,
            nvfp4_swizzle=Nvfp4Swizzle.HADAMARD_OR_SQUARE,
        ),
    )
}
"""Major and minor version -> release, oldest first."""

NEWEST = RELEASES["2.20"]

_used: Release = NEWEST


def tested() -> str:
    """The tested releases in words: "2.11, 2.14, 2.17 and 2.20"."""
    *most, last = RELEASES
    return f"{', '.join(most)} and {last}"


def release_of(te_version: str) -> Release:
    """The tested release that a version of `transformer_engine` belongs to.

    Raises:
        EmulationError: it belongs to none.
    """
    found = RELEASES.get(".".join(te_version.split(".")[:2]))
    if found is None:
        raise EmulationError(
            f"Transformer Engine {te_version} cannot be emulated: tested are {tested()}.",
            key="transformer_engine",
            value=te_version,
            allowed=[f"{name}.*" for name in RELEASES],
            hint=f'Install one of them, such as: pip install "transformer-engine=={NEWEST.name}.*"',
        )
    return found


def use(chosen: Release) -> None:
    """Make the binding that of this release."""
    global _used
    _used = chosen


def release() -> Release:
    """The release whose binding this process has."""
    return _used
