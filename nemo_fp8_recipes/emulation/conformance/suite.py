"""Which of Transformer Engine's own tests are run, what may excuse one, and why those fail that do."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["SUITE", "Part", "cause", "reason"]


@dataclass(frozen=True)
class Part:
    """A file of TE's `tests/pytorch`.

    Attributes:
        file: path below `tests/pytorch`.
        sample: at most this many of its tests are run, spread over every function's parameters; 0: all.
        device: GPU to pose as.
        keyword: pytest's -k expression.
        environment: variables that TE's own CI sets for this file, or that it needs here.
    """

    file: str
    sample: int = 0
    device: str = "b200"
    keyword: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        return f"{self.file} ({self.device}{', -k ' + repr(self.keyword) if self.keyword else ''})"


_AS_IN_TE_CI = (("PYTORCH_JIT", "0"), ("NVTE_TORCH_COMPILE", "0"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0"))
_SINGLE_PARAM = (("NVTE_GROUPED_LINEAR_SINGLE_PARAM", "1"),)
# What these tests call, or compare with, is a Triton kernel, which Triton's interpreter runs on a CPU.
_INTERPRETED = (("TRITON_INTERPRET", "1"),)

SUITE = (
    Part("test_recipe.py"),
    Part("test_custom_recipe.py"),
    Part("test_identity_quantizer.py"),
    Part("test_hybrid_quantization.py"),
    Part("test_quantized_tensor.py"),
    Part("test_float8_current_scaling_exact.py", device="h100"),
    Part("test_float8_blockwise_scaling_exact.py", device="h100"),
    Part("test_float8_blockwise_gemm_exact.py", 50, "h100", environment=_INTERPRETED),
    Part("test_float8blockwisetensor.py", device="h100"),
    Part("mxfp8/test_mxfp8_dequantize_extreme_scales.py"),
    Part("mxfp8/test_mxfp8_quantize_swizzle_fusion.py"),
    Part("mxfp8/test_mxfp8_group_quantize_graph_safe.py", 40),
    Part("mxfp8/test_mxfp8_master_weight_empty_shard.py"),
    Part("test_mxfp8_2d_quantize.py"),
    Part("nvfp4/test_nvfp4_quantize_exact.py", 300),
    Part("nvfp4/test_nvfp4_rht_quantize_exact.py", 40),
    Part("nvfp4/test_nvfp4_gemm_exact.py", 40),
    Part("nvfp4/test_nvfp4_module_exact.py", 6),
    Part("nvfp4/test_nvfp4_sr_quantize.py", 3, keyword="not 8192"),
    Part("nvfp4/test_nvfp4_group_quantize.py", 40),
    Part("nvfp4/test_nvfp4_group_quantize_graph_safe.py", 20),
    Part("nvfp4/test_nvfp4_2d_quantize_swizzle_fusion.py"),
    Part("nvfp4/test_nvfp4_rht_quantize_swizzle_fusion.py"),
    Part("nvfp4/test_nvfp4_weight_swizzle_cache.py"),
    Part("test_weight_swizzle_in_layers.py"),
    Part("test_partial_cast.py"),
    Part("test_multi_tensor.py", 600),
    Part("test_fused_optimizer.py", keyword="not large"),
    Part("test_fused_router.py", 150),
    Part("test_numerics.py", 100, keyword="linear", environment=_AS_IN_TE_CI),
    Part("test_backward_override.py", 50),
    Part("test_fusible_ops.py", 500, environment=_INTERPRETED),
    Part("test_sanity.py", 150, environment=_SINGLE_PARAM),
    Part("test_grouped_linear.py", 200, environment=_AS_IN_TE_CI[:2]),
    Part("debug/test_sanity.py"),
    Part("debug/test_config.py"),
    Part("debug/test_numerics.py"),
    Part("debug/test_log.py"),
    Part("debug/test_api_features.py", environment=_AS_IN_TE_CI[1:2]),
)
"""Whole files where a CPU runs them in minutes, samples where it takes hours."""

_REASONS: tuple[tuple[str, str], ...] = (
    (r"fused_attn|FusedAttention|flash.?attn|FlashAttention", "fused attention"),
    (r"CUDAGraph|cuda graph|graph_pool|make_graphed|is_current_stream_capturing", "CUDA graphs"),
    (r"[Uu]serbuffers|comm_overlap|communication overlap|ubuf", "userbuffers"),
    (r"NCCL|nccl|device_count|torchrun|multi.?GPU", "several real GPUs"),
    (
        r"transformer_engine_torch\.(\S+) is not emulated on a machine without a GPU",
        r"compiled-only kernel: \1",
    ),
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


_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"test_selective_attention_recompute_transformer_layer_fp8_bitwise",
        r"",
        "expected to fail on a GPU (TE marks it so), and passes here",
    ),
    (
        r"test_identity_recipe_matches_bf16_bitwise",
        r"not equal",
        "TE compiles bias and GELU into one kernel; here they run singly and round to bf16 between",
    ),
    (
        r"test_mxfp8_qfactory_uses_plain_bf16_mha_boundaries",
        r"fp8_o",
        "it watches fused attention, in whose place the unfused one runs",
    ),
    (r"", r"'cpu' == 'cuda'", "`Tensor.device` tells the truth on the emulated device: it is a CPU's"),
    (
        r"test_statistics_multi_run|TestFusedSGD",
        r"not close",
        "torch sums in another order on a CPU than on a GPU",
    ),
    (
        r"exact|gemm|versus_reference",
        r"Tensor-likes are not (equal|close)|mismatch at step",
        "the order of summation in a GEMM: the reference of the test takes another one",
    ),
    (r"", r"took more than \d+ s", "takes too long on a CPU"),
)


def cause(test: str, message: str) -> str:
    """Why a test fails that nothing excuses, as far as it is known; empty where it is not."""
    for where, what, why in _CAUSES:
        if re.search(where, test) and re.search(what, message):
            return why
    return ""
