"""Sizes, parallelism and precision of the models, read from NeMo's and Megatron-Bridge's sources.

Nothing of either package is imported: a training configuration is the function that pre-trains a model, and
what counts in it is the plain values it gives.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BRIDGE", "NEMO", "Published", "from_bridge", "from_nemo"]

Values = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """Where a model stands: package, file below it, and the function (or class of sizes) in the file."""

    file: str
    function: str
    sizes: str = ""
    """NeMo: the class with the sizes."""


_LLM = "nemo/collections/llm"
_H100 = "megatron/bridge/recipes/nemotronh/h100"
NEMO = {
    "nemotron3_4b": Published("recipes/nemotron3_4b.py", "pretrain_recipe", "Nemotron3Config4B"),
    "nemotron3_8b": Published("recipes/nemotron3_8b.py", "pretrain_recipe", "Nemotron3Config8B"),
    "nemotron3_22b": Published("recipes/nemotron3_22b.py", "pretrain_recipe", "Nemotron3Config22B"),
    "nemotron4_15b": Published("recipes/nemotron4_15b.py", "pretrain_recipe", "Nemotron4Config15B"),
    "nemotron4_340b": Published("recipes/nemotron4_340b.py", "pretrain_recipe", "Nemotron4Config340B"),
    "llama_nemotron_nano_8b": Published("recipes/llama31_nemotron_nano_8b.py", "trainer", "Llama31Config8B"),
    "llama_nemotron_70b": Published("recipes/llama31_nemotron_70b.py", "trainer", "Llama31Config70B"),
}
BRIDGE = {
    "nemotron_h_4b": Published("nemotronh.py", "nemotronh_4b_pretrain_1gpu_h100_bf16_config"),
    "nemotron_h_8b": Published("nemotronh.py", "nemotronh_8b_pretrain_2gpu_h100_bf16_config"),
    "nemotron_h_47b": Published("nemotronh.py", "nemotronh_47b_pretrain_8gpu_h100_bf16_config"),
    "nemotron_h_56b": Published("nemotronh.py", "nemotronh_56b_pretrain_8gpu_h100_bf16_config"),
    "nemotron_nano_v2_9b": Published(
        "nemotron_nano_v2.py", "nemotron_nano_9b_v2_pretrain_2gpu_h100_bf16_config"
    ),
    "nemotron_nano_v2_12b": Published(
        "nemotron_nano_v2.py", "nemotron_nano_12b_v2_pretrain_4gpu_h100_bf16_config"
    ),
    "nemotron3_nano_4b": Published(
        "nemotron_3_nano_4b.py", "nemotron_3_nano_4b_pretrain_8gpu_h100_bf16_config"
    ),
    "nemotron3_nano_30b_a3b": Published(
        "nemotron_3_nano.py", "nemotron_3_nano_pretrain_8gpu_h100_bf16_config"
    ),
    "nemotron3_super_120b_a12b": Published(
        "nemotron_3_super.py", "nemotron_3_super_pretrain_16gpu_h100_bf16_config"
    ),
}


def _functions(path: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def _plain(node: ast.AST | None) -> Any:
    """A constant's value; None for anything that has to be run."""
    return node.value if isinstance(node, ast.Constant) else None


def _joined(node: ast.AST | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None  # adjacent strings are one
    except ValueError:
        return None


def _defaults(function: ast.FunctionDef) -> Values:
    names = [argument.arg for argument in function.args.args]
    given = function.args.defaults
    found = {name: _plain(value) for name, value in zip(names[len(names) - len(given) :], given, strict=True)}
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return found | {argument.arg: _plain(value) for argument, value in pairs}


def from_nemo(root: Path, entry: Published) -> Values:
    """Sizes and parallelism under this package's names; `fp8_recipe` as NeMo calls the precision."""
    function = _functions(root / _LLM / entry.file)[entry.function]
    given = _defaults(function)
    sizes = _class_sizes(root, entry.sizes)
    return {
        "tp": given["tensor_parallelism"],
        "pp": given["pipeline_parallelism"],
        "cp": given["context_parallelism"],
        "sequence": given["sequence_parallelism"],
        "fp8_recipe": "bf16_mixed" if _says_bf16(function, given) else None,
        **sizes,
    }


def _says_bf16(function: ast.FunctionDef, given: Values) -> bool:
    plugins = {
        ast.unparse(k.value) for k in ast.walk(function) if isinstance(k, ast.keyword) and k.arg == "plugins"
    }
    return given.get("precision") == "bf16-mixed" or any("bf16_mixed()" in plugin for plugin in plugins)


def _class_sizes(root: Path, name: str) -> Values:
    """Fields of a configuration class with a plain value, those of the classes it builds on included."""
    classes: dict[str, ast.ClassDef] = {}
    for file in ("gpt/model/nemotron.py", "gpt/model/llama.py"):
        for node in ast.parse((root / _LLM / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node
    found: Values = {}
    line = [name]
    while line[-1] in classes and classes[line[-1]].bases:
        line.append(ast.unparse(classes[line[-1]].bases[0]))
    for parent in reversed([entry for entry in line if entry in classes]):
        for statement in classes[parent].body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                found[statement.target.id] = _plain(statement.value)
    wanted = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    sizes = {key: found[key] for key in wanted}
    sizes["num_query_groups"] = sizes["num_query_groups"] or sizes["num_attention_heads"]
    return sizes


# Fields of Bridge's model provider -> keys of the groups `model` and `parallel`.
_FIELDS = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "sequence_parallel": "sequence",
    "hybrid_layer_pattern": "hybrid.layer_pattern",
    "mamba_num_heads": "hybrid.mamba_num_heads",
    "mamba_head_dim": "hybrid.mamba_head_dim",
    "mamba_state_dim": "hybrid.mamba_state_dim",
    "mamba_num_groups": "hybrid.mamba_num_groups",
    "num_moe_experts": "hybrid.num_experts",
    "moe_router_topk": "hybrid.experts_per_token",
    "moe_ffn_hidden_size": "hybrid.expert_ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "hybrid.shared_expert_ffn_hidden_size",
    "make_vocab_size_divisible_by": "make_vocab_size_divisible_by",
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "kv_channels": "kv_channels",
}


def from_bridge(root: Path, entry: Published) -> Values:
    """What the function gives to `cfg.model`, and the name of its precision, under this package's names."""
    functions = _functions(root / _H100 / entry.file)
    found: Values = {}
    _collect(functions[entry.function], functions, found)
    precision = found.pop("mixed_precision", "bf16_mixed")  # what _pretrain_common starts from
    return {_FIELDS[key]: value for key, value in found.items() if key in _FIELDS} | {"fp8_recipe": precision}


def _collect(function: ast.FunctionDef, functions: dict[str, ast.FunctionDef], found: Values) -> None:
    for statement in function.body:
        if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Call):
            _from_call(statement.value, functions, found)
        if not isinstance(statement, ast.Assign):
            continue
        target = ast.unparse(statement.targets[0])
        if target == "cfg.model" and isinstance(statement.value, ast.Call):
            _from_call(statement.value, functions, found)
        elif target.startswith("cfg.model."):
            value = _joined(statement.value)
            if value is not None:
                found[target.removeprefix("cfg.model.")] = value
        elif target == "cfg.mixed_precision":
            if isinstance(statement.value, ast.Constant):
                found["mixed_precision"] = statement.value.value
            elif isinstance(statement.value, ast.Call) and not statement.value.args:
                found["mixed_precision"] = ast.unparse(statement.value.func)


def _from_call(call: ast.Call, functions: dict[str, ast.FunctionDef], found: Values) -> None:
    name = ast.unparse(call.func)
    if name in functions:  # a helper of the same file that makes the model
        found.update({key: value for key, value in _defaults(functions[name]).items() if value is not None})
        _collect(functions[name], functions, found)
    for keyword in call.keywords:
        value = _joined(keyword.value)
        if keyword.arg is not None and value is not None:
            found[keyword.arg] = value
