"""The group `telemetry`: its YAML and its limits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.telemetry.schema import TelemetryConfig

YAML = Path(__file__).parents[2] / "conf" / "telemetry" / "default.yaml"


def test_the_yaml_names_every_key_with_its_default_and_a_comment() -> None:
    lines = [line for line in YAML.read_text().splitlines() if line and not line.startswith("#")]
    assert OmegaConf.to_container(OmegaConf.load(YAML)) == dataclasses.asdict(TelemetryConfig())
    assert all("#" in line for line in lines)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"log_every": 0}, "telemetry.log_every=0"),
        ({"flush_every": -1}, "telemetry.flush_every=-1"),
        ({"stats_every": -1}, "telemetry.stats_every=-1"),
        ({"stats_every": 0, "whatif": ["*/input"]}, "telemetry.stats_every=0"),
        ({"sinks": ["parket"]}, "Did you mean 'parquet'?"),
    ],
)
def test_impossible_values_are_refused_by_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TelemetryConfig(**values)
    assert said in str(caught.value)
