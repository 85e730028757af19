"""The model group: published sizes, how they compose, and their tiny versions."""

from pathlib import Path

import pytest

from nemo_fp8_recipes import config, preflight
from nemo_fp8_recipes.errors import ConfigError

COMPOSED = {name: config.compose([f"model={name}"]) for name in config.options("model")}
MODELS = {name: composed.model for name, composed in COMPOSED.items()}
DENSE = [name for name, model in MODELS.items() if model.hybrid is None]
HYBRID = [name for name, model in MODELS.items() if model.hybrid is not None]

# Layers, hidden size, heads, groups, ffn, and layers by kind, as NeMo's and Bridge's code states them.
PUBLISHED = {
    "nemotron3_4b": (32, 3072, 24, 8, 9216, None),
    "nemotron3_8b": (32, 4096, 32, 32, 16384, None),
    "nemotron3_22b": (40, 6144, 48, 48, 24576, None),
    "nemotron4_15b": (32, 6144, 48, 8, 24576, None),
    "nemotron4_340b": (96, 18432, 96, 8, 73728, None),
    "llama_nemotron_nano_8b": (32, 4096, 32, 8, 14336, None),
    "llama_nemotron_70b": (80, 8192, 64, 8, 28672, None),
    "nemotron_h_4b": (52, 3072, 32, 8, 12288, "M24 -24 *4 E0"),
    "nemotron_h_8b": (52, 4096, 32, 8, 21504, "M24 -24 *4 E0"),
    "nemotron_h_47b": (98, 8192, 64, 8, 30720, "M45 -48 *5 E0"),
    "nemotron_h_56b": (118, 8192, 64, 8, 32768, "M54 -54 *10 E0"),
    "nemotron_nano_v2_9b": (56, 4480, 40, 8, 15680, "M27 -25 *4 E0"),
    "nemotron_nano_v2_12b": (62, 5120, 40, 8, 20480, "M28 -28 *6 E0"),
    "nemotron3_nano_4b": (42, 3136, 40, 8, 12544, "M21 -17 *4 E0"),
    "nemotron3_nano_30b_a3b": (52, 2688, 32, 2, 1856, "M23 -0 *6 E23"),
    "nemotron3_super_120b_a12b": (88, 4096, 32, 2, 2688, "M40 -0 *8 E40"),
}
# Billions of parameters in the linear layers, embedding and output layer, by the model's own name; dense ones
# and the hybrids' projections alike.
BILLIONS = {
    "nemotron3_4b": 4.2,
    "nemotron3_8b": 8.5,
    "nemotron4_15b": 15.6,
    "nemotron4_340b": 341,
    "llama_nemotron_nano_8b": 8.0,
    "llama_nemotron_70b": 70.5,
    "nemotron_h_8b": 8.1,
    "nemotron_h_47b": 46.8,
    "nemotron_h_56b": 56.3,
    "nemotron_nano_v2_9b": 8.9,
    "nemotron_nano_v2_12b": 12.3,
    "nemotron3_nano_4b": 4.0,
    "nemotron3_nano_30b_a3b": 31.6,
    "nemotron3_super_120b_a12b": 120.5,
}


def test_every_published_model_is_listed_here():
    assert {*PUBLISHED, "nemotron_tiny"} == set(MODELS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    model = MODELS[name]
    *sizes, kinds = PUBLISHED[name]
    assert sizes == [
        model.num_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.ffn_hidden_size,
    ]
    if kinds is not None:
        pattern = model.hybrid.layer_pattern
        assert " ".join(f"{kind}{pattern.count(kind)}" for kind in "M-*E") == kinds
    assert model.published.source.startswith(("nemo_toolkit 2.7.3", "megatron-bridge 0.6.2"))


@pytest.mark.parametrize("name", BILLIONS)
def test_the_sizes_add_up_to_the_name(name):
    model = preflight.job_input(COMPOSED[name], {}, emulated=False).model
    weights = sum(
        linear.layers * linear.copies * linear.output_features * linear.input_features
        for linear in preflight.linears(model, preflight.Parallel())
    )
    total = weights + 2 * model.vocab_size * model.hidden_size
    assert total / 1e9 == pytest.approx(BILLIONS[name], rel=0.02)


@pytest.mark.parametrize("name", ["nemotron_h_47b", "nemotron3_nano_30b_a3b", "nemotron4_340b"])
def test_parallelism_as_published(name):
    composed = config.compose([f"model={name}", "parallel=published"])
    wanted = {key: composed.model.published[key] for key in ("tp", "pp", "cp", "ep", "sequence")}
    assert {key: composed.parallel[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", DENSE)
def test_a_tiny_version_keeps_kind_and_proportions(name):
    full, tiny = MODELS[name], config.compose([f"model={name}", "model.scale=tiny"]).model
    for key in ("activation", "normalization", "rotary_percent", "rotary_base", "add_bias_linear"):
        assert tiny[key] == full[key]
    assert (
        tiny.num_attention_heads // tiny.num_query_groups == full.num_attention_heads // full.num_query_groups
    )
    assert tiny.ffn_hidden_size / tiny.hidden_size == pytest.approx(
        full.ffn_hidden_size / full.hidden_size, rel=0.15
    )
    assert (tiny.hidden_size, tiny.num_layers, tiny.vocab_size) <= (512, 4, 256)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("cut", ["parallel.tp=1", "parallel.tp=2"])
def test_every_recipe_takes_a_tiny_version(name, cut):
    for recipe, hardware in (
        ("tensorwise", "h100"),
        ("blockwise", "h100"),
        ("mxfp8", "b200"),
        ("nvfp4", "b200"),
    ):
        composed = config.compose(
            [f"model={name}", "model.scale=tiny", cut, f"fp8_recipe={recipe}", f"hardware={hardware}"]
        )
        found = preflight.check_job(composed, {}, emulated=False)
        assert [finding.sentence() for finding in found if finding.severity == "error"] == []


def test_sizes_given_stay():
    tiny = config.compose(["model=nemotron4_15b", "model.scale=tiny", "model.num_layers=2"]).model
    assert (tiny.num_layers, tiny.hidden_size) == (2, 192)


@pytest.mark.parametrize("name", HYBRID[:1])
def test_a_hybrid_is_not_cut_down(name):
    with pytest.raises(ConfigError, match=r"model.scale=tiny cuts dense models only"):
        config.compose([f"model={name}", "model.scale=tiny"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_layers=51", "names 52 layers"),
        ("model.hybrid.layer_pattern=MXM", "no known kind"),
        ("model.scale=tinny", "Did you mean 'tiny'"),
    ],
)
def test_what_a_hybrid_cannot_be(override, said):
    with pytest.raises(ConfigError, match=said):
        config.compose(["model=nemotron_h_8b", override])


def row(name):
    """A model's line in docs/models.md."""
    model = MODELS[name]
    layers = str(model.num_layers)
    if model.hybrid is not None:
        pattern = model.hybrid.layer_pattern
        layers += ": " + ", ".join(f"{pattern.count(kind)} {kind}" for kind in "M-*E" if kind in pattern)
    published = model.published
    return (
        f"| `{name}` | {layers} | {model.hidden_size} "
        f"| {model.num_attention_heads} / {model.num_query_groups} "
        f"| {model.ffn_hidden_size} | {model.seq_length} | {published.fp8_recipe} "
        f"| {published.tp} / {published.pp} / {published.cp} / {published.ep} | {published.source} |"
    )


def test_the_document_lists_every_model_as_it_is():
    document = (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
    assert [line for line in document if line.startswith("| `")] == [row(name) for name in MODELS]
