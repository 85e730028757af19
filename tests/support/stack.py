"""Random jobs for preflight, and what the real stack does with each: Megatron's config, TE's modules, a step.

Nothing here reads `nemo_fp8_recipes.preflight`'s rules: `Draw` is plain data, `outcome` runs it.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Draw", "config_outcome", "draw", "draw_settings", "held", "outcome"]

VOCABULARY = 64


@dataclass(frozen=True)
class Draw:
    """A small model, its micro-batch, a recipe and Megatron's settings around it."""

    recipe: str
    options: dict[str, Any]
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    seq_length: int
    micro_batch_size: int
    gated: bool
    num_layers: int = 2
    megatron: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    num_experts: int | None = None
    attention_dropout: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def draw(generator: random.Random, recipes: tuple[str, ...]) -> Draw:
    """A job whose sizes are about as often wrong for its recipe as right."""
    choose = generator.choice
    heads = choose((2, 4))
    recipe = choose(recipes)
    odd = generator.random() < 0.5  # half of the draws have friendly sizes throughout
    friendly = {"hidden": (64, 96, 128), "ffn": (128, 192), "kv": (16, 32), "seq": (32, 64)}
    unfriendly = {
        "hidden": (64, 72, 80, 96, 100, 128),
        "ffn": (128, 132, 136, 144, 160),
        "kv": (8, 12, 16, 20, 32),
        "seq": (16, 20, 24, 32, 36, 40, 48),
    }
    sizes = unfriendly if odd else friendly
    options: dict[str, Any] = {}
    if recipe in ("tensorwise", "mxfp8", "blockwise"):
        if generator.random() < 0.2:
            options["backward_override"] = choose(("high_precision", "dequantized"))
        if generator.random() < 0.2:
            options["num_layers_at_start_in_bf16"] = 1
    settings: dict[str, Any] = {}
    if generator.random() < 0.3:
        settings = {
            "recompute_granularity": "selective",
            "recompute_modules": [choose(("layernorm", "mlp", "core_attn"))],
        }
    elif generator.random() < 0.1:
        settings = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return Draw(
        recipe=recipe,
        options=options,
        hidden_size=choose(sizes["hidden"]),
        ffn_hidden_size=choose(sizes["ffn"]),
        num_attention_heads=heads,
        num_query_groups=choose((1, 2) if heads == 2 else (1, 2, 4)),
        kv_channels=choose(sizes["kv"]),
        seq_length=choose(sizes["seq"]),
        micro_batch_size=choose((1, 2, 3) if odd else (1, 2)),
        gated=choose((True, False)),
        megatron=settings,
    )


def draw_settings(generator: random.Random, recipes: tuple[str, ...]) -> Draw:
    """A job that only Megatron's config is asked about: settings and parallelism, sizes that are right."""
    choose = generator.choice

    def some(words: tuple[str, ...], most: int = 2) -> list[str]:
        return generator.sample(words, generator.randint(0, most))

    megatron: dict[str, Any] = {
        "recompute_granularity": choose((None, None, "full", "selective", "selective")),
        "recompute_method": choose((None, "uniform", "block")),
        "recompute_num_layers": choose((None, None, 1)),
        "recompute_modules": some(("core_attn", "layernorm", "mlp", "moe", "moe_act", "mla_up_proj")),
        "fine_grained_activation_offloading": choose((False, False, True)),
        "offload_modules": some(("core_attn", "attn_proj", "attn_norm", "qkv_linear")),
        "cuda_graph_impl": choose(("none", "none", "local", "transformer_engine")),
        "cuda_graph_scope": some(("attn", "moe", "moe_router", "moe_preprocess", "full_iteration")),
        "moe_token_dispatcher_type": choose(("allgather", "alltoall")),
        "moe_grouped_gemm": choose((True, True, False)),
        "moe_router_padding_for_quantization": choose((False, False, False, True)),
    }
    tp = choose((1, 2, 4, 8))
    recipe = choose(recipes)
    options: dict[str, Any] = {}
    if recipe not in ("bf16", "delayed"):
        options["num_layers_at_start_in_bf16"] = choose((0, 0, 1, 2, 3))
    return Draw(
        recipe=recipe,
        options=options,
        hidden_size=256,
        ffn_hidden_size=1024,
        num_attention_heads=choose((8, 8, 12)),
        num_query_groups=choose((4, 4, 2)),
        kv_channels=32,
        seq_length=512,
        micro_batch_size=1,
        gated=False,
        num_layers=8,
        megatron=megatron,
        parallel={"tp": tp, "pp": choose((1, 2, 4)), "ep": choose((1, 1, 2)), "sequence": tp > 1},
        num_experts=choose((None, 4)),
        attention_dropout=choose((0.0, 0.0, 0.1)),
    )


def _config(job: Draw, recipe: Any) -> Any:
    import torch
    from megatron.core.activations import squared_relu
    from megatron.core.transformer import TransformerConfig

    cut = {"tp": 1, "pp": 1, "ep": 1, "sequence": False} | job.parallel
    experts: dict[str, Any] = {}
    if job.num_experts is not None:
        experts = {
            "num_moe_experts": job.num_experts,
            "moe_ffn_hidden_size": job.ffn_hidden_size,
            "moe_router_topk": 2,
        }
    gated = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    # Defaults that Nemotron's models set and Megatron does not: those of the group `megatron`.
    defaults = {"moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": True}
    return TransformerConfig(
        num_layers=job.num_layers,
        hidden_size=job.hidden_size,
        ffn_hidden_size=job.ffn_hidden_size,
        num_attention_heads=job.num_attention_heads,
        num_query_groups=job.num_query_groups,
        kv_channels=job.kv_channels,
        tensor_model_parallel_size=cut["tp"],
        pipeline_model_parallel_size=cut["pp"],
        expert_model_parallel_size=cut["ep"],
        sequence_parallel=cut["sequence"],
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=job.attention_dropout,
        **(gated if job.gated else {"activation_func": squared_relu}),
        **experts,
        **recipe.megatron(),
        **defaults | job.megatron,
    )


def config_outcome(job: Draw) -> str:
    """What Megatron's TransformerConfig says: "" where it takes the job, else its words."""
    from nemo_fp8_recipes import recipes

    try:
        _config(job, recipes.load(job.recipe, **job.options))
    except (ValueError, AssertionError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _prepare() -> None:
    """A process group of one, and nothing left of the model before."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    FP8GlobalStateManager.reset()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def _model(job: Draw, recipe: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return GPTModel(
        config=_config(job, recipe),
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=job.seq_length,
        position_embedding_type="rope",
    ).bfloat16()


def _loss(job: Draw, gpt: Any) -> Any:
    import torch

    tokens = torch.zeros(job.micro_batch_size, job.seq_length, dtype=torch.long)
    positions = torch.arange(job.seq_length).expand_as(tokens)
    return gpt(tokens, positions, None, labels=tokens).float().mean()


def held(job: Draw) -> dict[str, int]:
    """Bytes that the linear layers hold between forward and backward: their weights, as parameters and as the
    GEMMs read them, and their inputs. Data and scales of TE's own tensors, every storage counted once.
    """
    import torch
    from transformer_engine.pytorch.module import layernorm_linear, linear

    from nemo_fp8_recipes import recipes
    from nemo_fp8_recipes.injection import inject

    _prepare()
    recipe = recipes.load(job.recipe, **job.options)
    found: dict[str, dict[int, int]] = {"weights": {}, "saved_inputs": {}}

    def count(kind: str, tensor: Any) -> None:
        parts = vars(tensor).values() if hasattr(tensor, "_quantizer") else [tensor]
        for part in parts:
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                found[kind][storage.data_ptr()] = storage.nbytes()

    def watched(original: Any, index_of_input: int) -> Any:
        def prepare(*tensors: Any) -> Any:
            count("saved_inputs", tensors[index_of_input])
            for weight in tensors[1:3]:
                if weight is not None:
                    count("weights", weight)
            return original(*tensors)

        return prepare

    originals = {module: module.prepare_for_saving for module in (linear, layernorm_linear)}
    try:
        # The positions of input, weight as the GEMM reads it, and parameter in what the modules save.
        linear.prepare_for_saving = watched(originals[linear], 0)
        layernorm_linear.prepare_for_saving = watched(originals[layernorm_linear], 5)
        with inject(recipe):
            gpt = _model(job, recipe)
            loss = _loss(job, gpt)  # keeps what is saved alive, so that no storage is used twice
        for name, parameter in gpt.named_parameters():
            if "linear_" in name and parameter.dim() == 2:
                count("weights", parameter)
        del loss
    finally:
        for module, original in originals.items():
            module.prepare_for_saving = original
        _prepare()
    return {kind: sum(storages.values()) for kind, storages in found.items()}


def outcome(job: Draw) -> str:
    """Build the model with the recipe injected and run forward and backward once; "" or what failed."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from nemo_fp8_recipes import recipes
    from nemo_fp8_recipes.injection import inject

    _prepare()
    recipe = recipes.load(job.recipe, **job.options)
    try:
        with inject(recipe):
            _loss(job, _model(job, recipe)).backward()
    except (ValueError, AssertionError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        FP8GlobalStateManager.reset()
    return ""
