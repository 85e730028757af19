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
_EAGER = _AS_IN_TE_CI[:2]
_SINGLE_PARAM = (("NVTE_GROUPED_LINEAR_SINGLE_PARAM", "1"),)
_FUSED_GROUPED_MLP = (*_SINGLE_PARAM, ("NVTE_CUTEDSL_FUSED_GROUPED_MLP", "1"))
# What these tests call, or compare with, is a Triton kernel, which Triton's interpreter runs on a CPU.
_INTERPRETED = (("TRITON_INTERPRET", "1"),)
_OFFLOADING_V1 = (("NVTE_FLASH_ATTN", "0"), ("NVTE_CPU_OFFLOAD_V1", "1"))


SUITE = (
    Part("test_recipe.py"),
    Part("test_custom_recipe.py"),
    Part("test_identity_quantizer.py"),
    Part("test_hybrid_quantization.py"),
    Part("test_quantized_tensor.py"),
    Part("test_checkpoint.py", prepare=("test_checkpoint.py", "--save-checkpoint", "all")),
    Part("test_deferred_init.py"),
    Part("test_distributed_weight.py"),
    Part("test_float8_current_scaling_exact.py", device="h100"),
    Part("test_float8_blockwise_scaling_exact.py", device="h100"),
    Part("test_float8_blockwise_gemm_exact.py", 5, "h100", environment=_INTERPRETED),
    Part("test_float8blockwisetensor.py", device="h100"),
    Part("mxfp8/test_mxfp8_dequantize_extreme_scales.py"),
    Part("mxfp8/test_mxfp8_quantize_swizzle_fusion.py"),
    Part("mxfp8/test_mxfp8_group_quantize_graph_safe.py", 16),
    Part("mxfp8/test_mxfp8_master_weight_empty_shard.py"),
    Part("test_mxfp8_2d_quantize.py"),
    Part("nvfp4/test_nvfp4_quantize_exact.py", 400),
    Part("nvfp4/test_nvfp4_rht_quantize_exact.py", 4),
    Part("nvfp4/test_nvfp4_gemm_exact.py", 400, keyword="not matches_emulated"),
    Part("nvfp4/test_nvfp4_gemm_exact.py", 4, keyword="matches_emulated"),
    Part("nvfp4/test_nvfp4_module_exact.py", 6),
    Part("nvfp4/test_nvfp4_sr_quantize.py", 3, keyword="not 8192"),
    Part("nvfp4/test_nvfp4_group_quantize.py", 4),
    Part("nvfp4/test_nvfp4_group_quantize_graph_safe.py", 8),
    Part("nvfp4/test_nvfp4_2d_quantize_swizzle_fusion.py"),
    Part("nvfp4/test_nvfp4_rht_quantize_swizzle_fusion.py"),
    Part("nvfp4/test_nvfp4_weight_swizzle_cache.py"),
    Part("nvfp4/test_nvfp4_fsdp2_hooks.py"),
    Part("test_weight_swizzle_in_layers.py"),
    Part("test_partial_cast.py"),
    Part("test_multi_tensor.py", 60),
    Part("test_fused_optimizer.py", keyword="not large"),
    Part("test_fused_router.py", 80),
    Part("test_fused_rope.py", 150, keyword="qkv and not 2048 and not 4096"),
    Part("test_fused_rope.py", 5, keyword="not qkv and not 2048 and not 4096"),
    Part("test_fused_rope.py", 2, keyword="2048 or 4096"),
    Part("test_permutation.py", 20, keyword="index_map or empty_input"),
    Part("test_permutation.py", 40, keyword="not index_map and not empty_input"),
    Part("test_parallel_cross_entropy.py"),
    Part("test_mhc.py", 12),
    Part("test_jit.py"),
    Part("test_gqa.py"),
    Part("test_qk_norm.py"),
    Part("test_cpu_offloading.py", 6),
    Part("test_cpu_offloading_v1.py", 12, environment=_OFFLOADING_V1),
    Part("layernorm_mlp/test_selective_activation_checkpoint.py", keyword="small"),
    Part("attention/test_cp_utils.py"),
    Part("attention/test_cu_seqlens_cache.py"),
    Part("attention/test_flex_attention.py"),
    Part("attention/test_kv_cache.py", 48),
    Part("test_numerics.py", 60, keyword="linear", environment=_AS_IN_TE_CI),
    Part("test_numerics.py", 12, keyword="not linear", environment=_AS_IN_TE_CI),
    Part("test_backward_override.py", 1500, keyword="not memory_peak"),
    Part("test_backward_override.py", 2, keyword="memory_peak"),
    Part("test_fusible_ops.py", 4000, environment=_INTERPRETED),
    Part("test_sanity.py", 3000, keyword="not 126m", environment=_SINGLE_PARAM),
    Part("test_sanity.py", 3, keyword="126m", environment=_SINGLE_PARAM),
    Part("test_grouped_tensor.py", environment=_SINGLE_PARAM),
    Part("test_grouped_tensor.py", device="h100", environment=_SINGLE_PARAM),
    Part("test_grouped_linear.py", 1500, keyword="not accuracy and not row_scaled", environment=_EAGER),
    Part("test_grouped_linear.py", 16, keyword="accuracy or row_scaled", environment=_EAGER),
    Part("test_ops_grouped_linear_distributed_weight.py", environment=_EAGER),
    Part("test_grouped_mlp.py", 1000, environment=(*_FUSED_GROUPED_MLP, *_INTERPRETED)),
    Part("debug/test_sanity.py"),
    Part("debug/test_config.py"),
    Part("debug/test_numerics.py"),
    Part("debug/test_log.py"),
    Part("debug/test_api_features.py", environment=_AS_IN_TE_CI[1:2]),
    Part("debug/test_perf.py"),
    Part("debug/test_distributed.py", processes=2),
    Part("distributed/test_sanity.py", processes=2),
    Part("distributed/test_numerics.py", processes=2),
    Part("distributed/test_numerics_exact.py", processes=2),
    Part("distributed/test_fusible_ops.py", processes=2),
    Part("distributed/test_hybrid_tp_sp.py", processes=2),
    Part("distributed/test_cast_master_weights_to_fp8.py", processes=2),
    Part("distributed/test_torch_fsdp2.py", processes=2),
    Part("test_hybrid_quantization_fsdp2.py", processes=2),
)
"""Whole files where a CPU runs them in minutes, samples where it takes hours."""

LEFT_OUT: dict[str, str] = {
    "attention/test_attention.py": "fused attention",
    "attention/test_attention_with_cp.py": "fused attention, on several real GPUs",
    "attention/test_fused_mla_q_uproj.py": "compiled-only kernel: it compiles CuTe DSL",
    "attention/test_linear_mxfp8_attention.py": "fused attention",
    "distributed/test_comm_gemm_overlap.py": "userbuffers",
    "distributed/test_ep.py": "several real GPUs: NCCL's expert parallelism",
    "distributed/test_fusible_ops_with_userbuffers.py": "userbuffers",
    "distributed/test_newton_schulz.py": "compiled-only kernel, on several real GPUs: cuSOLVERMp",
    "test_cuda_graphs.py": "CUDA graphs",
    "test_fused_router_perf.py": "measures the time of compiled kernels",
    "test_hf_integration.py": "nothing of the device: it saves a model with Hugging Face's transformers",
    "test_sanity_import.py": "no test: an import of Transformer Engine, with which every file here begins",
    "test_onnx_export.py": "nothing of the device: it exports to ONNX and runs that with ONNX Runtime",
    "test_torch_compile.py": "torch 2.13 cannot import it on any device: it lacks `register_custom_class`",
}
"""The other test files of the source tree, and why they are not in the suite."""
