"""Megatron's fields, put through the installed TransformerConfig and Megatron's own recipe functions."""

import dataclasses

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.targets import megatron_core
from tests.support.processes import run_emulated

# The table of the design: what Megatron must be told.
KINDS = {
    "bf16": {"fp8": None, "fp4": None},
    "delayed": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "nvfp4": {"fp8": None, "fp4": "e2m1", "fp4_recipe": "nvfp4"},
}


@pytest.mark.parametrize("name", KINDS)
def test_kind_and_format(name):
    fields = recipes.load(name).megatron()
    assert {key: fields[key] for key in KINDS[name]} == KINDS[name]


def test_megatrons_traps_are_not_left_to_its_defaults():
    fields = recipes.load("delayed").megatron()
    assert (fields["fp8_amax_history_len"], fields["fp8_amax_compute_algo"], fields["fp8_margin"]) == (
        1024,
        "max",
        0,
    )
    fields = recipes.load("tensorwise").megatron()
    assert fields["first_last_layers_bf16"] is False
    assert (fields["num_layers_at_start_in_bf16"], fields["num_layers_at_end_in_bf16"]) == (0, 0)


def test_placement_and_weights():
    fields = recipes.load("mxfp8", num_layers_at_end_in_bf16=2, fp8_param=True).megatron()
    assert fields["first_last_layers_bf16"] is True
    assert (fields["num_layers_at_start_in_bf16"], fields["num_layers_at_end_in_bf16"]) == (0, 2)
    assert fields["fp8_param"] is True
    fields = recipes.load("nvfp4", fp8_param=True).megatron()
    assert fields["fp4_param"] is True
    assert "fp8_param" not in fields


def test_hidden_options_are_what_only_injection_carries():
    assert megatron_core.hidden_options(recipes.load("mxfp8")) == {}
    assert megatron_core.hidden_options(recipes.load("delayed", amax_history_len=16, margin=1)) == {}
    assert megatron_core.hidden_options(recipes.load("delayed", reduce_amax=False)) == {"reduce_amax": False}
    assert megatron_core.hidden_options(recipes.load("mxfp8", fp8_format="hybrid")) == {}


@pytest.mark.slow
def test_the_installed_megatron_takes_every_field_and_builds_the_same_recipe():
    """TransformerConfig with our fields, and the object that Megatron itself makes of them."""
    made = run_emulated(
        """
        import dataclasses
        from megatron.core.transformer.transformer_config import TransformerConfig
        from megatron.core import fp4_utils, fp8_utils
        from nemo_fp8_recipes import recipes
        variants = [(name, {}) for name in recipes.names()] + [
            ("delayed", dict(
                margin=1, amax_history_len=16, amax_compute_algo="most_recent", fp8_format="e4m3")),
            ("tensorwise", dict(num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1, fp8_param=True)),
            ("mxfp8", dict(fp8_format="hybrid")),
            ("nvfp4", dict(fp8_param=True)),
        ]
        made = []
        for name, options in variants:
            recipe = recipes.load(name, **options)
            fields = recipe.megatron()
            known = {field.name for field in dataclasses.fields(TransformerConfig)}
            assert set(fields) <= known, set(fields) - known
            config = TransformerConfig(
                num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **fields)
            assert all(getattr(config, key) == value for key, value in fields.items())
            if recipe.precision == "bf16":
                continue
            theirs = (fp4_utils.get_fp4_recipe if config.fp4 else fp8_utils.get_fp8_recipe)(config)
            made.append([name, isinstance(theirs, type(recipe.te())), str(theirs).split("=", 2)[2] ==
                         str(recipe.te()).split("=", 2)[2]])
        result(made)
        """
    )
    assert len(made) == 9
    assert [row for row in made if row[1:] != [True, True]] == []


def test_fields_are_plain_values():
    for name in recipes.names():
        for value in recipes.load(name).megatron().values():
            assert value is None or isinstance(value, str | int | bool)
            assert not dataclasses.is_dataclass(value)
