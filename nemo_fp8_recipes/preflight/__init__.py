"""Will it run? Findings about recipe, device, shapes, versions and environment, before anything is built.

Imports neither torch nor Transformer Engine.
"""

from nemo_fp8_recipes.preflight.cost import Cost, cost
from nemo_fp8_recipes.preflight.finding import SEVERITIES, Finding, Severity, require, worst_first
from nemo_fp8_recipes.preflight.frameworks import check_megatron
from nemo_fp8_recipes.preflight.hardware import posing_device, recipes_for, runs_on
from nemo_fp8_recipes.preflight.inputs import Hardware, PreflightInput
from nemo_fp8_recipes.preflight.job import (
    check,
    check_job,
    check_on,
    hardware_here,
    ignoring,
    job_input,
    named_hardware,
)
from nemo_fp8_recipes.preflight.megatron import MegatronSettings
from nemo_fp8_recipes.preflight.registry import Rule, all_rules
from nemo_fp8_recipes.preflight.shapes import HybridShape, ModelShape, Parallel, linears

__all__ = [
    "SEVERITIES",
    "Cost",
    "Finding",
    "Hardware",
    "HybridShape",
    "MegatronSettings",
    "ModelShape",
    "Parallel",
    "PreflightInput",
    "Rule",
    "Severity",
    "all_rules",
    "check",
    "check_job",
    "check_megatron",
    "check_on",
    "cost",
    "hardware_here",
    "ignoring",
    "job_input",
    "linears",
    "named_hardware",
    "posing_device",
    "recipes_for",
    "require",
    "runs_on",
    "worst_first",
]
