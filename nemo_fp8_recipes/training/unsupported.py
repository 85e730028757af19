"""What a configuration may say and this job does not do. Imports no torch."""

from __future__ import annotations

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.preflight import MegatronSettings
from nemo_fp8_recipes.training.schema import TrainingConfig

__all__ = ["check_supported"]


def check_supported(megatron: MegatronSettings, training: TrainingConfig) -> None:
    """Raise `ConfigError`, naming the key, for a setting that this job would ignore.

    `nemo-fp8 doctor` checks these settings all the same: other training scripts use them.
    """
    if megatron.tp_comm_overlap:
        raise _refused("megatron.tp_comm_overlap", True, "registers no user buffers for it", off="false")
    if megatron.reuse_grad_buf_for_mxfp8_param_ag:
        raise _refused(
            "megatron.reuse_grad_buf_for_mxfp8_param_ag",
            True,
            "does not copy weights to the gradient buffer in every step",
            off="false",
        )
    if "full_iteration" in megatron.cuda_graph_scope and megatron.cuda_graph_impl != "none":
        raise _refused(
            "megatron.cuda_graph_scope",
            list(megatron.cuda_graph_scope),
            "reads data and logs between steps, so no graph can hold a full iteration",
            off="[]",
        )
    if training.packing_multiple is not None:
        raise _refused(
            "training.packing_multiple", training.packing_multiple, "packs no sequences", off="null"
        )


def _refused(key: str, value: object, does: str, *, off: str) -> ConfigError:
    return ConfigError(
        f"{key} is set, and `nemo-fp8 train` {does}.",
        key=key,
        value=value,
        hint=f"Set {key}={off}, or train with Megatron-LM, Megatron-Bridge or NeMo.",
    )
