"""Over which ranks amax is reduced."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_fp8_recipes.preflight.citation import core
from nemo_fp8_recipes.preflight.inputs import PreflightInput
from nemo_fp8_recipes.preflight.registry import Problem, rule
from nemo_fp8_recipes.recipes import Delayed

_GROUP = core("parallel_state.py", 1509, "def get_amax_reduction_group(with_context_parallel=False")


@rule(
    "FP8-AMX-001",
    "warning",
    "amax is not reduced over all ranks that share weights",
    source=("Megatron-LM issue 442: a wrong reduction group diverged after 1,000 steps", _GROUP),
    of_gpu=False,
)
def reduction_group(job: PreflightInput) -> Iterator[Problem]:
    recipe = job.recipe
    if not isinstance(recipe, Delayed):
        return
    if not recipe.reduce_amax:
        cut = ", ".join(
            f"parallel.{key}={size}"
            for key, size in (("tp", job.parallel.tp), ("cp", job.parallel.cp))
            if size > 1
        )
        yield Problem(
            message="fp8_recipe.reduce_amax=false lets every rank scale by its own amax: ranks with "
            "the same weights quantise them differently"
            + (f", and {cut} cut one tensor over ranks." if cut else "."),
            key="fp8_recipe.reduce_amax",
            value=False,
            fix="Set fp8_recipe.reduce_amax=true.",
        )
    elif recipe.tp_only_amax_red:
        over = "tensor- and context-parallel" if job.parallel.cp > 1 else "tensor-parallel"
        yield Problem(
            message=f"fp8_recipe.tp_only_amax_red=true reduces amax over {over} ranks only: data-parallel "
            "ranks scale differently"
            + (", and with fp8_param the shards of one weight do." if recipe.fp8_param else "."),
            key="fp8_recipe.tp_only_amax_red",
            value=True,
            fix="Set fp8_recipe.tp_only_amax_red=false unless that reduction costs too much.",
        )
