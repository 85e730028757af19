"""Primary weights in a recipe's own format: kept where the job can update them, refused elsewhere."""

from __future__ import annotations

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.training.primary_weights import check_primary_weights


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_weights_the_job_would_never_update_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"fp8_param=true with " + name) as caught:
        check_primary_weights(recipes.load(name, fp8_param=True))
    assert caught.value.key == "fp8_recipe.fp8_param"


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise"])
def test_weights_that_are_updated_pass(name: str) -> None:
    check_primary_weights(recipes.load(name, fp8_param=True))


@pytest.mark.parametrize("name", ["bf16", "mxfp8", "nvfp4"])
def test_high_precision_weights_pass(name: str) -> None:
    check_primary_weights(recipes.load(name))
