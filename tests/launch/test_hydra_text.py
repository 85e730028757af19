"""Values survive Hydra's command-line grammar and OmegaConf's interpolation."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_fp8_recipes import config
from nemo_fp8_recipes.launch.hydra_text import override
from tests.launch.conftest import HOSTILE


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40))
@example("\\'")
@example("\\\\${x}\\")
@example("${oc.env:HOME}")
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_as_it_was(text: str) -> None:
    parsed = OverridesParser.create().parse_override(override("run_dir", text))
    assert OmegaConf.create({"run_dir": parsed.value()}).run_dir == text


@given(st.text("\\'${}\"a ", max_size=12))
@settings(max_examples=500, deadline=None)
def test_quotes_backslashes_and_interpolations_in_any_order(text: str) -> None:
    parsed = OverridesParser.create().parse_override(override("run_dir", text))
    assert OmegaConf.create({"run_dir": parsed.value()}).run_dir == text


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_the_whole_configuration_composes_with_it(text: str) -> None:
    assert config.compose([override("run_dir", f"/runs/{text}")]).run_dir == f"/runs/{text}"


def test_a_simple_path_stays_readable() -> None:
    assert override("run_dir", "/data/runs/mxfp8-42_1") == "run_dir=/data/runs/mxfp8-42_1"
