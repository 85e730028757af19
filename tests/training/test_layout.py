"""Sizes that processes cannot share are refused by name, before torch is imported."""

from __future__ import annotations

import pytest

from nemo_fp8_recipes import config
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.training.layout import check_layout
from nemo_fp8_recipes.training.settings import read_settings


def check(*overrides: str, processes: int = 1) -> None:
    settings = read_settings(config.compose(list(overrides)))
    check_layout(settings.model, settings.training, settings.parallel, processes)


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ()),
        (2, ("parallel.tp=2", "parallel.sequence=true")),
        (4, ("parallel.pp=2", "training.global_batch_size=16")),
        (8, ("parallel.tp=2", "parallel.pp=2", "parallel.cp=2")),
    ],
)
def test_what_divides_passes(processes: int, overrides: tuple[str, ...]) -> None:
    check(*overrides, processes=processes)


@pytest.mark.parametrize(
    ("processes", "overrides", "key"),
    [
        (1, ("parallel.tp=2",), "parallel"),
        (3, ("parallel.tp=2",), "parallel"),
        (1, ("training.global_batch_size=6",), "training.global_batch_size"),
        (2, (), "training.global_batch_size"),
        (3, ("parallel.pp=3",), "model.num_layers"),
        (2, ("parallel.tp=2", "parallel.sequence=true", "model.seq_length=97"), "model.seq_length"),
        (2, ("parallel.cp=2", "model.seq_length=126"), "model.seq_length"),
    ],
)
def test_what_does_not_divide_is_named(processes: int, overrides: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(*overrides, processes=processes)
    assert caught.value.key == key
    assert "a multiple of" in str(caught.value)
