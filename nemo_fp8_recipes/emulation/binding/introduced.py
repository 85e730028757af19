"""Since which tested Transformer Engine release each name of `surface.py` exists, and what went again.

Taken from `pytorch/csrc/extensions/pybind.cpp`, `pytorch/csrc/extensions/ep.cpp` and
`common/util/pybind_helper.h` at the tags v2.11, v2.14.1 and v2.17.1 and of 2.20.2.
"""

from __future__ import annotations

__all__ = ["ADDED", "REMOVED", "exists"]

ADDED: dict[str, frozenset[str]] = {
    "2.14": frozenset(
        {
            "convert_host_pointers_to_tensor",
            "get_device_pointer_for_data_and_scales",
            "bgrad_group_quantize",
            "dglu",
            "glu",
            "group_quantize",
            "grouped_swizzle_for_gemm",
            "multi_tensor_scale_tensor",
            "nvfp4_2d_compute_partial_amax",
            "nvfp4_2d_multi_tensor_transpose",
            "nvfp4_2d_partial_cast",
            "nvfp4_2d_scale_transpose",
            "nvfp4_compute_global_scale",
            "nvfp4_compute_per_block_scale",
            "nvfp4_data_transpose",
            "nvfp4_expand_scale_to_fp8",
            "nvfp4_fused_scale",
            "nvfp4_multi_tensor_2d_partial_cast",
            "nvfp4_multi_tensor_compute_partial_amax",
            "nvfp4_multi_tensor_fused_scale",
            "splits_to_offsets",
            "swizzle_scales_for_gemm_",
            "te_general_grouped_gemm_for_discrete_in",
            "te_general_grouped_gemm_for_discrete_out",
            "te_general_grouped_gemm_for_grouped_tensor",
        }
    ),
    "2.17": frozenset(
        {
            "bulk_allocate",
            "copy_data_ptrs_to_device",
            "create_empty_quantized_tensor",
            "cusolvermp_ctx_create",
            "cusolvermp_ctx_destroy",
            "ep_combine",
            "ep_combine_bwd",
            "ep_dispatch",
            "ep_dispatch_bwd",
            "ep_finalize",
            "ep_get_zero_copy",
            "ep_handle_mem_size",
            "ep_initialize",
            "ep_prepare",
            "get_device_pointer_for_data_and_scales",
            "get_grouped_gemm_setup_workspace_size",
            "group_dequantize",
            "grouped_mlp_experimental",
            "multi_tensor_pad_last_dim",
            "multi_tensor_swizzle_scales_for_gemm_",
            "multi_tensor_swizzle_scales_for_gemm_unchecked_",
            "multi_tensor_transpose_to_bhsd",
            "newton_schulz",
            "nvfp4_group_quantize_with_amax",
            "nvfp4_quantize_with_amax",
            "nvte_built_with_cublasmp",
            "splits_to_offsets_multi",
        }
    ),
    "2.20": frozenset(
        {
            "dsituglu",
            "ep_prepare_and_dispatch",
            "ep_zero_copy_supported",
            "fused_moe_aux_loss_fwd_graph_safe",
            "fused_topk_with_score_function_qb_fwd",
            "group_requantize_inplace",
            "group_scaled_clamped_swiglu",
            "group_scaled_swiglu",
            "scaled_clamped_dswiglu",
            "scaled_clamped_swiglu",
            "scaled_dsituglu",
            "scaled_dsrelu",
            "scaled_dswiglu",
            "scaled_situglu",
            "scaled_srelu",
            "scaled_swiglu",
            "situglu",
            "thd_copy_valid_tokens_from_per_split_to_rank_local",
            "thd_cp_rank_order_to_sequence_order",
            "thd_sequence_order_to_cp_rank_order",
        }
    ),
}
"""Release -> the functions and submodules that its binding has and that of the tested release before it
lacks. What is in none of the sets exists in every tested release.
"""

REMOVED: dict[str, frozenset[str]] = {
    "2.17": frozenset({"convert_host_pointers_to_tensor", "get_device_pointer_for_data_and_scales"}),
}
"""Release -> the functions of the tested release before it that its binding lacks."""


def exists(name: str, in_release: str) -> bool:
    """Whether a name of these tables exists in the binding of a tested release ("2.14")."""
    wanted = _number(in_release)
    added = any(name in names for names in ADDED.values())
    there = not added or any(name in names and _number(since) <= wanted for since, names in ADDED.items())
    gone = any(name in names and _number(until) <= wanted for until, names in REMOVED.items())
    return there and not gone


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))
