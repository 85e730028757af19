"""Preflight against the real stack: random jobs, which Megatron and Transformer Engine take or refuse.

An error of preflight where the stack runs is a false alarm, a failure of the stack without one is a miss. The
default suite draws a few dozen jobs; `make test-preflight` draws hundreds, on two posing GPUs.
"""

from __future__ import annotations

import json
import os
import random

import pytest

from nemo_fp8_recipes import preflight, recipes
from nemo_fp8_recipes.preflight import HybridShape, MegatronSettings, ModelShape, Parallel, PreflightInput
from tests.support.processes import run_emulated
from tests.support.stack import Draw, config_outcome, draw, draw_settings, outcome

pytestmark = pytest.mark.usefixtures("emulated")

QUANTISED = tuple(name for name in recipes.names() if name != "bf16")
SEED = int(os.environ.get("NEMO_FP8_TEST_SEED", "1"))
# What preflight knows about and a TransformerConfig does not see: sizes, the ranks' share of them, devices.
NOT_IN_THE_CONFIG = ("FP8-SHP", "FP8-HW", "FP8-VER", "FP8-EMU", "FP8-PLC-002")


def as_input(job: Draw, hardware: str) -> PreflightInput:
    """The job as the rules read it."""
    hybrid = None
    if job.num_experts is not None:
        hybrid = HybridShape(
            layer_pattern="*E" * (job.num_layers // 2),
            mamba_num_heads=8,
            mamba_head_dim=32,
            mamba_state_dim=16,
            mamba_num_groups=8,
            num_experts=job.num_experts,
            experts_per_token=2,
            expert_ffn_hidden_size=job.ffn_hidden_size,
        )
    return PreflightInput(
        recipe=recipes.load(job.recipe, **job.options),
        hardware=preflight.named_hardware(hardware),
        model=ModelShape(
            num_layers=job.num_layers,
            hidden_size=job.hidden_size,
            ffn_hidden_size=job.ffn_hidden_size,
            num_attention_heads=job.num_attention_heads,
            num_query_groups=job.num_query_groups,
            kv_channels=job.kv_channels,
            vocab_size=64,
            seq_length=job.seq_length,
            micro_batch_size=job.micro_batch_size,
            gated=job.gated,
            hybrid=hybrid,
        ),
        parallel=Parallel(**job.parallel),
        emulated=True,
        te_version="2.20.2",
        megatron_core_version="0.16.1",
        megatron=MegatronSettings(
            **{key: tuple(v) if isinstance(v, list) else v for key, v in job.megatron.items()}
        ),
        attention_dropout=job.attention_dropout,
    )


def errors(job: Draw, hardware: str) -> list[str]:
    found = preflight.check(as_input(job, hardware))
    return [f"{finding.code} {finding.message}" for finding in found if finding.severity == "error"]


def compare(predicted: dict[str, list[str]], happened: dict[str, str]) -> dict[str, int]:
    """Counts, after making sure that the two agree about every job."""
    wrong = [
        f"{'FALSE ALARM' if predicted[job] else 'MISS'} {job}\n  preflight: {predicted[job]}\n  "
        f"stack: {happened[job] or 'ran'}"
        for job in predicted
        if bool(predicted[job]) != bool(happened[job])
    ]
    assert not wrong, f"{len(wrong)} of {len(predicted)}:\n" + "\n".join(wrong[:10])
    refused = sum(map(bool, predicted.values()))
    return {"jobs": len(predicted), "refused": refused, "ran": len(predicted) - refused}


def keyed(jobs: list[Draw]) -> dict[str, Draw]:
    return {json.dumps(job.to_dict(), sort_keys=True): job for job in jobs}


def settings_agree(count: int) -> dict[str, int]:
    generator = random.Random(SEED)
    jobs = keyed([draw_settings(generator, recipes.names()) for _ in range(count)])
    predicted = {
        key: [error for error in errors(job, "b200") if not error.startswith(NOT_IN_THE_CONFIG)]
        for key, job in jobs.items()
    }
    return compare(predicted, {key: config_outcome(job) for key, job in jobs.items()})


STEPS = """
import json
from tests.support.stack import Draw, outcome
result({key: outcome(Draw(**json.loads(key))) for key in KEYS})
"""


def steps_agree(count: int, hardware: str, *, here: bool) -> dict[str, int]:
    capability = preflight.named_hardware(hardware).capability
    names = tuple(name for name in QUANTISED if preflight.runs_on(name, capability))
    generator = random.Random(SEED)
    jobs = keyed([draw(generator, names) for _ in range(count)])
    predicted = {key: errors(job, hardware) for key, job in jobs.items()}
    if here:
        happened = {key: outcome(job) for key, job in jobs.items()}
    else:
        happened = run_emulated(f"KEYS = {list(jobs)!r}\n{STEPS}", device=hardware, timeout=1500)
    return compare(predicted, happened)


def test_megatrons_config_takes_what_preflight_takes():
    counts = settings_agree(200)
    assert min(counts["refused"], counts["ran"]) > 20, counts


def test_a_step_runs_where_preflight_says_so():
    counts = steps_agree(25, "b200", here=True)
    assert min(counts["refused"], counts["ran"]) > 4, counts


@pytest.mark.preflight
@pytest.mark.parametrize("hardware", ["b200", "h100"])
def test_many_steps(hardware, record_property):
    counts = steps_agree(300, hardware, here=False)
    print(f"\n{hardware}: {counts}")
    record_property("counts", counts)
    assert min(counts["refused"], counts["ran"]) > 60


@pytest.mark.preflight
def test_many_settings(record_property):
    counts = settings_agree(10_000)
    print(f"\nsettings: {counts}")
    record_property("counts", counts)
