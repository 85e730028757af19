"""`model.scale=tiny`: a published model at a size that trains on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_fp8_recipes.errors import ConfigError

__all__ = ["tiny"]

LAYERS = 4
VOCABULARY = 256  # bytes, what data=stdlib_text is made of
SEQUENCE = 128
WIDTH = 256  # of all attention heads together, roughly
GRID = 64  # sizes are multiples of it, so that every recipe takes them, cut over two ranks too


def tiny(model: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that change when a dense `model` is cut down; everything else stays as it is.

    Kept are the kind of model (activation, norm, RoPE, biases) and its proportions: attention heads to a
    key/value head, heads together to hidden size, MLP to hidden size. Sizes are rounded to multiples of 64.

    Raises:
        ConfigError: the model is hybrid.
    """
    if model.get("hybrid") is not None:
        raise ConfigError(
            f"model.scale=tiny cuts dense models only, and {model['display_name']} has Mamba layers.",
            key="model.scale",
            value="tiny",
            allowed=["full"],
        )
    heads, groups = model["num_attention_heads"], model["num_query_groups"]
    head_size = model["kv_channels"] or model["hidden_size"] // heads
    shared = max(heads // groups, 1)
    small_groups = 8 if shared == 1 else 2
    small_heads = small_groups * shared
    small_head_size = max(16, WIDTH // small_heads // 16 * 16)
    hidden = _on_grid(small_heads * small_head_size * model["hidden_size"] / (heads * head_size))
    return {
        "num_layers": min(LAYERS, model["num_layers"]),
        "hidden_size": hidden,
        "ffn_hidden_size": _on_grid(hidden * model["ffn_hidden_size"] / model["hidden_size"]),
        "num_attention_heads": small_heads,
        "num_query_groups": small_groups,
        "kv_channels": small_head_size,
        "vocab_size": VOCABULARY,
        "seq_length": SEQUENCE,
        "init_method_std": 0.02,
    }


def _on_grid(size: float) -> int:
    return max(1, round(size / GRID)) * GRID
