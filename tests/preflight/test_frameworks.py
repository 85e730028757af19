"""A job that a framework configured: fields set after Megatron's check, settings in its own objects."""

import pytest

from nemo_fp8_recipes import preflight, recipes
from nemo_fp8_recipes.callbacks.megatron_core import Fp8Run
from nemo_fp8_recipes.errors import PreflightError
from nemo_fp8_recipes.preflight import MegatronSettings

pytestmark = pytest.mark.usefixtures("emulated")


def made(recipe="tensorwise", **fields):
    """A TransformerConfig, checked by itself when it is made."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        bf16=True,
        **{"bias_activation_fusion": False} | recipes.load(recipe).megatron() | fields,
    )


def changed(config, **fields):
    """The config after a framework has set fields, as NeMo's MegatronStrategy.connect does."""
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def errors(recipe, config, **others):
    found = preflight.check_megatron(recipes.load(recipe), config, emulated=True, environment={}, **others)
    return [finding.code for finding in found if finding.severity == "error"]


def test_a_config_as_it_was_made_passes():
    assert errors("tensorwise", made()) == []
    assert errors("tensorwise", made(recompute_granularity="selective", recompute_modules=["mlp"])) == []


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"fp8": None, "fp8_param": True}, "FP8-CFG-001"),
        ({"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 5}, "FP8-CFG-001"),
        ({"num_query_groups": 3, "tensor_model_parallel_size": 4}, "FP8-CFG-001"),
        ({"recompute_granularity": "full"}, "FP8-RCP-001"),
        ({"tp_comm_overlap": True}, "FP8-OVL-001"),
    ],
)
def test_what_is_set_after_the_check_is_found(fields, code):
    assert code in errors("tensorwise", changed(made(), **fields))


def test_delayed_scaling_set_after_the_check():
    """NeMo copies first_last_layers_bf16 onto a config whose check has passed."""
    late = changed(made("delayed"), first_last_layers_bf16=True, num_layers_at_start_in_bf16=1)
    assert "FP8-CFG-001" in errors("delayed", late)


def test_the_wrappers_settings_count():
    from megatron.core.distributed import DistributedDataParallelConfig as Ddp

    config = made("mxfp8", fp8_param=True)
    without = Ddp(use_distributed_optimizer=True, fp8_param_gather=True)
    reused = Ddp(
        use_distributed_optimizer=True, fp8_param_gather=True, reuse_grad_buf_for_mxfp8_param_ag=True
    )
    recipe = recipes.load("mxfp8", fp8_param=True)
    for ddp, found in ((without, ["FP8-GTH-003"]), (reused, [])):
        findings = preflight.check_megatron(recipe, config, ddp=ddp, emulated=True, environment={})
        assert [finding.code for finding in findings if finding.severity == "error"] == found


def test_graph_scopes_are_read_as_words():
    from megatron.core.transformer.enums import CudaGraphScope

    config = made(cuda_graph_impl="local", cuda_graph_scope=[CudaGraphScope.attn])
    assert MegatronSettings.read(config).cuda_graph_scope == ("attn",)
    assert MegatronSettings.read(changed(config, cuda_graph_scope="attn,mlp")).cuda_graph_scope == (
        "attn",
        "mlp",
    )


def test_a_run_stops_before_the_model_is_built():
    with Fp8Run(recipes.load("tensorwise")) as run:
        run.check(made())
        with pytest.raises(PreflightError, match="FP8-RCP-001"):
            run.check(changed(made(), recompute_granularity="full"))
