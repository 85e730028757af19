"""Preflight of a job that another framework configures: from Megatron's own config objects, as they stand.

NeMo and Megatron-Bridge set fields after TransformerConfig has checked itself, and Megatron-LM reads them
from a command line: what counts is what is there before the model is built.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.preflight.finding import Finding
from nemo_fp8_recipes.preflight.inputs import Hardware, PreflightInput
from nemo_fp8_recipes.preflight.job import check, installed_versions
from nemo_fp8_recipes.preflight.megatron import MegatronSettings
from nemo_fp8_recipes.preflight.shapes import Parallel

if TYPE_CHECKING:
    from nemo_fp8_recipes.recipes import Recipe

__all__ = ["check_megatron"]

# Switches that the check itself turns into newer fields: set, they make it refuse its own result.
_CONVERTED = ("enable_cuda_graph", "external_cuda_graph", "moe_layer_recompute", "moe_enable_deepep")
_PARALLEL = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
}


def check_megatron(
    recipe: Recipe,
    transformer: Any,
    *,
    ddp: Any = None,
    optimizer: Any = None,
    hardware: Hardware | None = None,
    emulated: bool = False,
    scheduled: bool = False,
    environment: Mapping[str, str] | None = None,
) -> list[Finding]:
    """The findings for a job as Megatron's config objects describe it; no shape is checked.

    Args:
        recipe: what the job trains with.
        transformer: a TransformerConfig, or anything with its fields.
        ddp: the DistributedDataParallelConfig.
        optimizer: the OptimizerConfig.
        hardware: the GPU that the job runs on.
        emulated: the job runs on the emulated device.
        scheduled: the recipe changes during the job.
        environment: the process environment; None: this process's.

    Raises:
        ConfigError: a field holds a value that Megatron does not have.
    """
    distributed = getattr(ddp, "use_distributed_optimizer", None)
    if distributed is None:
        distributed = getattr(optimizer, "use_distributed_optimizer", None)
    job = PreflightInput(
        recipe=recipe,
        hardware=hardware or Hardware(),
        parallel=Parallel(
            **{key: int(getattr(transformer, field, None) or 1) for key, field in _PARALLEL.items()},
            sequence=bool(getattr(transformer, "sequence_parallel", False)),
        ),
        emulated=emulated,
        environment=os.environ if environment is None else environment,
        megatron=MegatronSettings.read(transformer, ddp=ddp, optimizer=optimizer),
        distributed_optimizer=distributed,
        scheduled=scheduled,
        attention_dropout=float(getattr(transformer, "attention_dropout", 0.0) or 0.0),
        megatron_refusal=_refusal(transformer),
        **installed_versions(),
    )
    return check(job)


def _refusal(transformer: Any) -> str | None:
    """What TransformerConfig's own check says about the fields as they are now; None where it takes them."""
    check_itself = _own_check(type(transformer))
    if check_itself is None:
        return None
    again = copy.copy(transformer)
    for field in _CONVERTED:
        if hasattr(again, field):
            setattr(again, field, False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were given when the config was made
            check_itself(again)
    except (ValueError, AssertionError) as error:
        return str(error)
    return None


def _own_check(config_class: type) -> Any:
    """`TransformerConfig.__post_init__` where `config_class` is one: subclasses build on it."""
    for parent in config_class.__mro__:
        if parent.__name__ == "TransformerConfig" and parent.__module__.startswith("megatron.core."):
            return parent.__dict__.get("__post_init__")
    return None
