"""Which of Transformer Engine's own tests are run, and what may excuse one."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["SUITE", "Part", "reason"]


@dataclass(frozen=True)
class Part:
    """A file of TE's `tests/pytorch`.

    Attributes:
        file: path below `tests/pytorch`.
        sample: at most this many of its tests are run, spread over every function's parameters; 0: all.
        device: GPU to pose as.
        keyword: pytest's -k expression.
    """

    file: str
    sample: int = 0
    device: str = "b200"
    keyword: str = ""

    @property
    def label(self) -> str:
        return f"{self.file} ({self.device}{', -k ' + self.keyword if self.keyword else ''})"


SUITE = (
    Part("test_quantized_tensor.py", 150),
    Part("test_float8_current_scaling_exact.py", 60, "h100"),
    Part("test_float8_blockwise_scaling_exact.py", 100, "h100"),
    Part("test_float8_blockwise_gemm_exact.py", 60, "h100"),
    Part("test_float8blockwisetensor.py", 100, "h100"),
    Part("test_recipe.py", 120),
    Part("test_custom_recipe.py", 60),
    Part("test_identity_quantizer.py", 60),
    Part("mxfp8/test_mxfp8_dequantize_extreme_scales.py", 30),
    Part("mxfp8/test_mxfp8_quantize_swizzle_fusion.py", 40),
    Part("test_mxfp8_2d_quantize.py", 40),
    Part("nvfp4/test_nvfp4_quantize_exact.py", 60),
    Part("nvfp4/test_nvfp4_rht_quantize_exact.py", 40),
    Part("nvfp4/test_nvfp4_gemm_exact.py", 40),
    Part("nvfp4/test_nvfp4_module_exact.py", 40),
    Part("nvfp4/test_nvfp4_sr_quantize.py", 10),
    Part("test_partial_cast.py", 40),
    Part("test_multi_tensor.py", 40),
    Part("test_fused_optimizer.py", 40),
    Part("test_numerics.py", 120, keyword="linear"),
    Part("test_sanity.py", 120),
    Part("test_grouped_linear.py", 60),
    Part("debug/test_sanity.py", 40),
    Part("debug/test_numerics.py", 40),
    Part("debug/test_log.py", 30),
)
"""Sampled, because the whole of it takes hours on a CPU."""

_REASONS: tuple[tuple[str, str], ...] = (
    (r"fused_attn|FusedAttention|flash.?attn|FlashAttention|No dot product attention", "fused attention"),
    (r"CUDAGraph|cuda graph|graph_pool|make_graphed|is_current_stream_capturing", "CUDA graphs"),
    (r"[Uu]serbuffers|comm_overlap|communication overlap|ubuf", "userbuffers"),
    (r"NCCL|nccl|device_count|torchrun|multi.?GPU", "several real GPUs"),
    (r"transformer_engine_torch\.(\S+) is not emulated", r"compiled-only kernel: \1"),
    (r"No module named 'triton'", "compiled-only kernel: Triton"),
    (r"[Tt]riton.*(active driver|driver|gpu|cuda)|0 active drivers", "compiled-only kernel: Triton"),
)


def reason(message: str) -> str | None:
    """Why a test that did not pass needs a real GPU; None: nothing excuses it.

    An option that the emulation of a function lacks ("quantize with …") is no excuse, a function of the
    binding that is not emulated at all is.
    """
    for pattern, name in _REASONS:
        found = re.search(pattern, message)
        if found:
            return found.expand(name)
    return None
