"""The typed groups: what is shipped is valid, what cannot work is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_fp8_recipes import typed
from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.training.schema import GROUPS, ModelConfig, OptimizerConfig, TrainingConfig

CONF = Path(__file__).parents[2] / "conf"


def shipped() -> list[tuple[str, Path]]:
    return [(group, file) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]


def schema_of(group: str, name: str) -> type:
    schema = GROUPS[group]
    return schema[name] if isinstance(schema, dict) else schema


@pytest.mark.parametrize(("group", "file"), shipped(), ids=lambda item: getattr(item, "stem", item))
def test_shipped_yaml_gives_every_key_with_a_comment(group: str, file: Path) -> None:
    values = OmegaConf.to_container(OmegaConf.load(file))
    assert values["name"] == file.stem
    schema = schema_of(group, file.stem)
    typed.read(schema, values, key=group, error=ConfigError)
    assert set(values) == set(schema.__dataclass_fields__)
    for line in file.read_text().splitlines():
        if line and not line.startswith("#"):
            assert "  #" in line, f"no comment: {line}"


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "heads", "groups", "ffn"),
    [("nemotron3_4b", 32, 3072, 24, 8, 9216), ("nemotron3_8b", 32, 4096, 32, 32, 16384)],
)
def test_published_sizes(name: str, layers: int, hidden: int, heads: int, groups: int, ffn: int) -> None:
    model = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (layers, hidden, heads)
    assert (model.num_query_groups, model.ffn_hidden_size, model.seq_length) == (groups, ffn, 4096)
    assert (model.activation, model.layernorm_zero_centered_gamma) == ("squared_relu", True)


def tiny_model(**changes: object) -> ModelConfig:
    values = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "nemotron_tiny.yaml"))
    return typed.read(ModelConfig, {**values, **changes}, key="model", error=ConfigError)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"num_query_groups": 3}, "model.num_query_groups"),
        ({"hidden_size": 250}, "model.hidden_size=250"),
        ({"activation": "square_relu"}, "Did you mean 'squared_relu'"),
        ({"normalization": "BatchNorm"}, "model.normalization=BatchNorm"),
        ({"hidden_dropout": 1.0}, "model.hidden_dropout=1.0"),
        ({"rotary_percent": 0.0}, "model.rotary_percent=0.0"),
        ({"num_layers": "four"}, "model.num_layers=four"),
        ({"layers": 4}, "model.layers"),
    ],
)
def test_a_model_that_cannot_work_is_refused_by_name(change: dict[str, object], names: str) -> None:
    with pytest.raises(ConfigError, match=names.replace(".", r"\.")):
        tiny_model(**change)


@pytest.mark.parametrize(
    ("schema", "change", "key"),
    [
        (TrainingConfig, {"steps": 0}, "training.steps"),
        (TrainingConfig, {"save_every": -1}, "training.save_every"),
        (TrainingConfig, {"stop_at_step": 0}, "training.stop_at_step"),
        (OptimizerConfig, {"lr": -1.0}, "optimizer.lr"),
        (OptimizerConfig, {"min_lr": 1.0}, "optimizer.min_lr"),
        (OptimizerConfig, {"lr_decay_style": "cosin"}, "optimizer.lr_decay_style"),
        (OptimizerConfig, {"adam_beta2": 1.0}, "optimizer.adam_beta2"),
        (OptimizerConfig, {"overlap_param_gather": True}, "optimizer.overlap_param_gather"),
        (OptimizerConfig, {"lr": float("nan")}, "optimizer.lr"),
    ],
)
def test_impossible_values_name_their_key(schema: type, change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        schema(**change)
    assert caught.value.key == key
