"""What Megatron-Bridge, and the newer Megatron-Core that it needs, want at import and on a CPU.

They import packages at module level that a job on the emulated device never uses: kernels (triton), model
optimisation (modelopt), restarts inside a process (nvidia-resiliency-ext), data loaders (datasets, energon).
Where these are installed nothing is changed. Written against megatron-bridge 0.3.1 and 0.6.2, megatron-core
0.16.1 and 0.19.2.
"""

from __future__ import annotations

import importlib.util
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

from nemo_fp8_recipes.emulation.import_hook import after_import, around_import
from nemo_fp8_recipes.emulation.ledger import PatchLedger
from nemo_fp8_recipes.emulation.placeholders import placeholders

__all__ = ["apply"]

_SSM = "megatron.core.ssm.ops."
_UNUSED_IMPORTS: dict[str, tuple[str, ...]] = {
    "megatron.core.transformer.moe.ops.paged_stash": ("triton",),
    "megatron.core.inference.contexts.attention_context.triton.tensor_ops": ("triton",),
    **dict.fromkeys(
        [
            _SSM + name
            for name in (
                "causal_conv1d_varlen",
                "ssd_bmm",
                "ssd_chunk_scan",
                "ssd_chunk_state",
                "ssd_combined",
                "ssd_state_passing",
            )
        ],
        ("triton",),
    ),
    "megatron.bridge.models.distillation_provider": ("modelopt.torch.distill",),
    "megatron.bridge.training.post_training.distillation": ("modelopt.torch.distill",),
    "megatron.bridge.training.gpt_step": ("modelopt.torch.distill",),
    "megatron.bridge.training.train": ("modelopt.torch.distill",),
    "megatron.bridge.training.eval": ("modelopt.torch.distill",),
    "megatron.bridge.training.checkpointing": ("modelopt.torch.opt",),
    "megatron.bridge.training.inprocess_restart": ("nvidia_resiliency_ext.inprocess",),
    "megatron.bridge.training.pretrain": ("nvidia_resiliency_ext.inprocess",),
    **dict.fromkeys(
        [
            "megatron.bridge.data.builders.hf_dataset",
            "megatron.bridge.data.datasets.gpt_sft",
            "megatron.bridge.data.datasets.sft",
            "megatron.bridge.data.megatron_mimo.hf_provider",
            "megatron.bridge.data.sources.hf",
            "megatron.bridge.data.vlm_datasets.hf_dataset_makers",
        ],
        ("datasets",),
    ),
    **dict.fromkeys(
        [
            "megatron.bridge.data.energon.base_energon_datamodule",
            "megatron.bridge.data.energon.hf_task_encoder",
            "megatron.bridge.data.energon.metadata",
            "megatron.bridge.data.energon.task_encoder_utils",
            "megatron.bridge.models.qwen_vl.data.energon",
            "megatron.bridge.recipes.qwen_vl.data.energon.task_encoder",
        ],
        ("megatron.energon", "webdataset"),
    ),
}
"""Modules that import a package unconditionally, and the packages."""


def apply(ledger: PatchLedger) -> None:
    """Prepare for the import of Megatron-Bridge."""
    if sys.version_info < (3, 12) and not hasattr(typing, "override"):
        from typing_extensions import override

        ledger.set(typing, "override", override, "Megatron-Bridge is written for Python 3.12")
    for module, packages in _UNUSED_IMPORTS.items():
        around_import(
            ledger, module, _with_placeholders(packages), f"imports {packages[0]} and does not use it"
        )
    after_import(
        ledger,
        "megatron.core.datasets.utils",
        _use_compiled_helpers,
        "the wheel brings the compiled index builder, and not the Makefile that would make it again",
    )


def _with_placeholders(packages: tuple[str, ...]) -> Callable[[ModuleType], AbstractContextManager[None]]:
    @contextmanager
    def context(module: ModuleType) -> Iterator[None]:
        with placeholders(packages):
            yield
        if packages[0].startswith("modelopt") and importlib.util.find_spec("modelopt") is None:
            for name, stand_in in _WITHOUT_MODELOPT.items():
                if hasattr(module, name):
                    setattr(module, name, stand_in)

    return context


def _no_shapes_to_adjust(*args: Any, **kwargs: Any) -> None:
    """What modelopt answers for a model that is not being distilled."""


def _no_modelopt_state(*args: Any, **kwargs: Any) -> None:
    """What modelopt saves of, and restores into, a model that it did not change."""


_WITHOUT_MODELOPT: dict[str, Callable[..., None]] = {
    "get_tensor_shapes_adjust_fn_for_distillation": _no_shapes_to_adjust,
    "restore_modelopt_state": _no_modelopt_state,
    "save_modelopt_state": _no_modelopt_state,
    "save_sharded_modelopt_state": _no_modelopt_state,
}


def _use_compiled_helpers(module: ModuleType) -> None:
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        module.compile_helpers = lambda: None  # type: ignore[attr-defined]  # Megatron's own name
