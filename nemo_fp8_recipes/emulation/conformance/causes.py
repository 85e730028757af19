"""What may excuse a test that did not pass, and why those fail that nothing excuses."""

from __future__ import annotations

import re

__all__ = ["cause", "reason"]

_REASONS: tuple[tuple[str, str], ...] = (
    (r"fused_attn|FusedAttention|flash.?attn|FlashAttention", "fused attention"),
    (r"CUDAGraph|cuda graph|graph_pool|make_graphed|is_current_stream_capturing", "CUDA graphs"),
    (r"[Uu]serbuffers|comm_overlap|communication overlap|ubuf", "userbuffers"),
    (r"NCCL error|nccl[A-Z]|device_count|multi.?GPU", "several real GPUs"),
    (
        r"transformer_engine_torch\.(\S+) is not emulated on a machine without a GPU",
        r"compiled-only kernel: \1",
    ),
    (
        r"[Tt]riton.*(active driver|driver|gpu|cuda)|0 active drivers|libcuda\.so cannot found",
        "compiled-only kernel: Triton",
    ),
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
        r"test_identity_recipe_matches_bf16_bitwise|test_identity_all_modules",
        r"not equal|run_hybrid_tp_sp",
        "TE compiles bias and GELU into one kernel; here they run singly and round to bf16 between",
    ),
    (
        r"TestHybridAllModules::test_(layernorm_mlp|transformer_layer)",
        r"not close|fc2_weight",
        "what may differ is what differs, by more than TE saw with a GPU's random numbers: natively the amax "
        "of the second linear's input is taken before it is rounded",
    ),
    (
        r"distributed/test_numerics\.py::test_distributed\[nvfp4\]",
        r"returncode",
        "TE's tolerance fits a GPU's random numbers: with the host's one output is 0.127 off where 0.12 is "
        "allowed, and under another seed all are within it",
    ),
    (
        r"test_bfloat16_unreduced_external_grad",
        r"3 == 1",
        "the test is of another state of the source: Transformer Engine 2.20.2 keeps three tensors for it",
    ),
    (
        r"test_single_grouped_weight_rejects_host_m_splits",
        r"DID NOT RAISE",
        "a host tensor of token counts passes for one of the device here",
    ),
    (
        r"test_grouped_linear_fused_path_fp8_block_scaling_blackwell_error",
        r"DID NOT RAISE",
        "passes alone: tests of CUDA graphs that fail before it leave Transformer Engine's state behind",
    ),
    (
        r"test_mxfp8_qfactory_uses_plain_bf16_mha_boundaries",
        r"fp8_o",
        "it watches fused attention, in whose place the unfused one runs",
    ),
    (
        r"test_current_device",
        r"expanded size",
        "the test has fewer keys than its `cu_seqlens_kv` says; a GPU writes behind the buffer",
    ),
    (
        r"",
        r"'cpu' == 'cuda'|assert -1 == 1|device\(type='cuda'",
        "`Tensor.device` tells the truth on the emulated device: it is a CPU's",
    ),
    (
        r"test_statistics_multi_run|TestFusedSGD",
        r"not close",
        "torch sums in another order on a CPU than on a GPU",
    ),
    (
        r"deferred_init|offload|selective_activation_checkpoint|memory",
        r"memory_allocated|did not free|assert (0(\.0)?|-?64\.0) [=><]|comparison failed Obtained: 0",
        "it measures the device's memory, which is the host's here: `torch.cuda.memory_allocated()` is 0",
    ),
    (
        r"distributed/test_numerics_exact",
        r"mismatch",
        "the order of summation in a GEMM: the reference takes another one; few elements differ",
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
