"""Environments in which there is nothing to inject into: one clear error each."""

from __future__ import annotations

import pytest

from tests.support.processes import run_emulated, run_python

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def refusal(packages: tuple[str, ...], code: str) -> str:
    """The message of the InjectionError that `code` ends in, where `packages` are not installed."""
    program = BLOCK.format(packages=packages) + (
        "from nemo_fp8_recipes import recipes\n"
        "from nemo_fp8_recipes.errors import InjectionError\n"
        "from nemo_fp8_recipes.injection import inject, autocast\n"
        f"try:\n    {code}\nexcept InjectionError as error:\n    print(error)\n"
    )
    return run_python(program).stdout


def test_injection_needs_megatron():
    said = refusal(("megatron",), "inject(recipes.load('mxfp8')).__enter__()")
    assert "needs Megatron-Core" in said
    assert "autocast(recipe)" in said


def test_megatron_without_transformer_engine_is_refused():
    said = refusal(("transformer_engine",), "inject(recipes.load('mxfp8')).__enter__()")
    assert "Megatron-Core runs without Transformer Engine" in said


def test_autocast_needs_transformer_engine():
    said = refusal(("transformer_engine",), "autocast(recipes.load('mxfp8'))")
    assert "needs Transformer Engine" in said


def test_a_model_of_plain_torch_is_read_where_neither_is_installed():
    program = BLOCK.format(packages=("megatron", "transformer_engine")) + (
        "import torch\n"
        "from nemo_fp8_recipes.injection import manifest\n"
        "print(manifest(torch.nn.Sequential(torch.nn.Linear(2, 2))).rows[0].reason_code)\n"
    )
    assert run_python(program).stdout.strip() == "not_transformer_engine"


@pytest.mark.parametrize("dimension", [1, 2])
def test_fp32_block_scales_reach_the_quantizers_on_hopper(dimension):
    """Blackwell takes power-of-two block scales only, so this one poses as an H100."""
    found = run_emulated(
        f"""
        from nemo_fp8_recipes import recipes
        from nemo_fp8_recipes.injection import inject, manifest, require_quantized
        from nemo_fp8_recipes.emulation import trace
        from tests.injection import gpt

        recipe = recipes.load("blockwise", use_f32_scales=True, w_block_scaling_dim={dimension})
        with gpt.process_group(), inject(recipe), trace() as observed:
            model = gpt.build(gpt.config_of(recipe, layers=1))
            gpt.train_step(model)
        rows = manifest(model)
        require_quantized(rows, recipe)
        result({{
            "pow2": sorted({{o.power_of_two for r in rows.quantized() for _, o in r.operands()}}),
            "weight": sorted({{o.block for r in rows.quantized() for t, o in r.operands() if t == "weight"}}),
            "quantized": sorted({{q.force_pow_2_scales for q in observed.quantizations}}),
            "device": rows.rows[0].device,
        }})
        """,
        device="h100",
    )
    assert found["pow2"] == [False]
    assert found["quantized"] == [False]
    assert found["weight"] == [[1 if dimension == 1 else 128, 128]]
    assert "H100" in found["device"]
    assert "emulated" in found["device"]
