"""What the binding knows of the device it poses as, and the functions that report on it.

Follows `common/transformer_engine.cpp` (`nvte_is_non_tn_fp8_gemm_supported`),
`pytorch/csrc/extensions/misc.cpp`, `pytorch/csrc/extensions/attention.cpp` and `common/util/pybind_helper.h`
of Transformer Engine.
"""

# ruff: noqa: ARG001  # signatures are pybind's
from __future__ import annotations

from typing import Any, Protocol

from nemo_fp8_recipes.emulation.binding.enums import enums_of
from nemo_fp8_recipes.emulation.binding.releases import release

__all__ = [
    "PosingDevice",
    "device_supports_multicast",
    "get_cublasLt_version",
    "get_cudnn_version",
    "get_fused_attn_backend",
    "get_num_cublas_streams",
    "get_stream_priority_range",
    "non_tn_fp8_gemm_supported",
    "nvte_built_with_cublasmp",
    "pose_as",
    "sm_arch",
    "ubuf_built_with_mpi",
]

# The oldest cuBLAS that has every grouped GEMM, that of block scaling on Hopper included.
CUBLASLT_VERSION = 130600
CUDNN_VERSION = 91200

NUM_COMPUTE_STREAMS = 4


class PosingDevice(Protocol):
    """The GPU that is stood in for."""

    @property
    def compute_capability(self) -> tuple[int, int]:
        """(major, minor), for example (9, 0) for Hopper."""


_device: PosingDevice | None = None


def pose_as(device: PosingDevice) -> None:
    """Make every function of the binding answer as on this device."""
    global _device
    _device = device


def sm_arch() -> int:
    """Compute capability as TE's C++ has it: 10 x major + minor, 90 for Hopper."""
    if _device is None:
        raise RuntimeError("The emulated binding has no device: binding.build() was not called.")
    major, minor = _device.compute_capability
    return 10 * major + minor


def non_tn_fp8_gemm_supported() -> bool:
    """Whether per-tensor FP8 GEMMs take any layout, so that no transposed copy of the data is kept."""
    arch = sm_arch()
    return 100 <= arch < 120 or arch >= 130


def get_cublasLt_version() -> int:
    return CUBLASLT_VERSION


def get_cudnn_version() -> int:
    return CUDNN_VERSION


def get_num_cublas_streams() -> int:
    return NUM_COMPUTE_STREAMS


def device_supports_multicast(device_id: int = -1) -> bool:
    return False


def get_stream_priority_range(device_id: int = -1) -> tuple[int, int]:
    return (0, 0)


def ubuf_built_with_mpi() -> bool:
    return False


def nvte_built_with_cublasmp() -> bool:
    return False


def get_fused_attn_backend(*parameters: Any, **named: Any) -> Any:
    """No configuration has a fused attention kernel here; TE then takes its unfused attention.

    Returns:
        The backend, and since 2.20 the reason beside it.
    """
    none = enums_of(release().name)["NVTE_Fused_Attn_Backend"]["NVTE_No_Backend"]
    if not release().fused_attention_reason:
        return none
    return none, "fused attention is not emulated on a machine without a GPU"
