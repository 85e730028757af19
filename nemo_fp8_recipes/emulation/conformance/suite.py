"""Which of Transformer Engine's own tests are run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LEFT_OUT", "SUITE", "Part"]


@dataclass(frozen=True)
class Part:
    """A file of TE's `tests/pytorch`.

    Attributes:
        file: path below `tests/pytorch`.
        sample: at most this many of its tests are run, spread over every function's parameters; 0: all.
        device: GPU to pose as.
        keyword: pytest's -k expression.
        environment: variables that TE's own CI sets for this file, or that it needs here.
        processes: how many devices the tests are told of; those that start torchrun get as many processes.
        prepare: a program below `tests/pytorch` and its arguments that TE's CI runs first.
    """

    file: str
    sample: int = 0
    device: str = "b200"
    keyword: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    processes: int = 1
    prepare: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        keyword = f", -k {self.keyword!r}" if self.keyword else ""
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        return f"{self.file} ({self.device}{keyword}{processes})"


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


LEFT_OUT: dict[str, str] = {
    "test_cuda_graphs.py": "CUDA graphs",
}
"""The other test files of the source tree, and why they are not in the suite."""
