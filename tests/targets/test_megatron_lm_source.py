"""Megatron-LM itself, from a checkout that the variable MEGATRON_LM names: `make test-megatron-lm`.

Its own parser reads our flags, and its own `pretrain_gpt.py` trains with them and the hook, on the emulated
device. The checkout brings its own Megatron-Core. None of its code is part of this project.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_fp8_recipes import recipes
from nemo_fp8_recipes.targets import megatron_lm
from tests.support.processes import environment

SOURCE = os.environ.get("MEGATRON_LM", "")
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not (Path(SOURCE) / "pretrain_gpt.py").is_file(),
    reason="needs a checkout of Megatron-LM: make test-megatron-lm MEGATRON_LM=PATH",
)

# What Megatron-LM's main branch imports and may be missing: triton, and a name that Python 3.12 brought.
PRELUDE = """
import importlib.abc, importlib.machinery, importlib.util, sys, types, typing
from nemo_fp8_recipes import emulation
emulation.install("b200")
import torch._dynamo, torch._inductor
typing.override = getattr(typing, "override", lambda function: function)

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder

class Placeholder(metaclass=Anything):
    "Stands in for any attribute of triton; as a decorator it leaves the function alone."
    def __new__(cls, *given, **named):
        if len(given) == 1 and callable(given[0]) and not named:
            return given[0]
        return lambda function=None, *_, **__: function

class PlaceholderModule(types.ModuleType):
    __version__ = "3.4.0"
    def __getattr__(self, name):
        return getattr(Placeholder, name)

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return PlaceholderModule(spec.name)
    def exec_module(self, module):
        pass

if importlib.util.find_spec("triton") is None:
    sys.meta_path.insert(0, Finder())
"""
PARSE = """
import json
from megatron.training.arguments import parse_args
args = parse_args()
print("@@", json.dumps({key: value for key, value in vars(args).items() if type(value) in (str, int, bool)}))
"""
# The script as its user has it, with the two lines of docs/megatron_lm.md before `pretrain(`.
TRAIN = """
from pathlib import Path
path = Path(sys.argv[0])
source = path.read_text()
hook = ("    from nemo_fp8_recipes.callbacks import megatron_lm\\n    megatron_lm.install(log_every=1)\\n")
assert source.count("\\n    pretrain(") == 1
source = source.replace("\\n    pretrain(", "\\n" + hook + "    pretrain(")
exec(compile(source, str(path), "exec"), {"__name__": "__main__", "__file__": str(path)})
"""
SMALL = shlex.split(
    "--num-layers 3 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 2 --train-iters 3 --lr 1e-3 "
    "--min-lr 1e-4 --lr-decay-iters 10 --mock-data --tokenizer-type NullTokenizer --vocab-size 127 "
    "--position-embedding-type rope --no-masked-softmax-fusion --no-bias-dropout-fusion "
    "--no-bias-gelu-fusion --no-gradient-accumulation-fusion --no-rope-fusion --attention-backend unfused "
    "--no-persist-layer-norm --disable-bias-linear --log-interval 1 --eval-iters 0 --eval-interval 100 "
    "--distributed-backend gloo"
)


def run_there(code: str, settings: megatron_lm.Settings, tmp_path: Path, *words: str) -> str:
    """Run `code` with the checkout's own Megatron-Core; its output."""
    script = tmp_path / "run.py"
    script.write_text(PRELUDE + f"sys.argv[0] = {str(Path(SOURCE) / 'pretrain_gpt.py')!r}\n" + code)
    env = environment(
        {
            "PYTHONPATH": os.pathsep.join([SOURCE, str(ROOT)]),
            "TORCHDYNAMO_DISABLE": "1",
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            # Megatron compiles its dataset helpers by the names `python3` and `make`.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
    )
    env.update({name: value for name, value in settings.environment.items() if value is not None})
    done = subprocess.run(
        [sys.executable, str(script), *settings.flags, *words],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bf16", {}),
        ("delayed", {"margin": 1, "amax_history_len": 16, "amax_compute_algo": "most_recent"}),
        ("tensorwise", {"num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 1, "fp8_param": True}),
        ("mxfp8", {"fp8_format": "hybrid", "fp8_param": True}),
        ("blockwise", {"w_block_scaling_dim": 1}),
        ("nvfp4", {"fp8_param": True}),
    ],
)
def test_its_parser_takes_every_flag(name: str, options: dict, tmp_path: Path) -> None:
    recipe = recipes.load(name, **options)
    made = megatron_lm.settings(recipe)
    output = run_there(PARSE, made, tmp_path)
    args = json.loads(next(line for line in output.splitlines() if line.startswith("@@")).removeprefix("@@"))
    assert args["bf16"] is True
    fields = {key: value for key, value in recipe.megatron().items() if value is not None}
    if made.route == "factory":
        fields["fp8_recipe"] = "custom"
        assert args["fp8_quantizer_factory"] == f"{megatron_lm.FACTORY_MODULE}.{name}"
    for key in ("fp8_param", "fp4_param"):
        if key in fields:
            assert args[f"{key}_gather"] is fields.pop(key)
    if not fields.get("first_last_layers_bf16"):
        fields = {key: value for key, value in fields.items() if not key.startswith("num_layers_at")}
    for key, value in fields.items():
        if key in args:
            assert args[key] == value, key


@pytest.mark.parametrize(
    ("name", "options", "route"),
    [
        ("mxfp8", {}, None),
        ("delayed", {"reduce_amax": False}, "injection"),
        ("blockwise", {"w_block_scaling_dim": 1, "amax_epsilon": 1e-6}, "factory"),
        ("tensorwise", {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}, None),
    ],
)
def test_its_training_script_trains_with_the_hook(
    name: str, options: dict, route: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("pybind11", reason="Megatron-LM compiles its dataset helpers with pybind11")
    from nemo_fp8_recipes.injection.rows import Manifest
    from nemo_fp8_recipes.report.run import load
    from nemo_fp8_recipes.telemetry import store

    recipe = recipes.load(name, **options)
    made = megatron_lm.settings(recipe, route=route)
    run_there(TRAIN, made, tmp_path, *SMALL, "--tensorboard-dir", str(tmp_path / "log"))
    run = load(tmp_path / "log" / "fp8")
    assert run.record["status"] == "finished"
    assert run.record["recipe"] == recipe.to_dict()
    assert [step for step, _ in run.losses] == [1, 2, 3]
    manifest = Manifest.from_json((tmp_path / "log" / "fp8" / "manifest.json").read_text())
    quantized = {row.module for row in manifest.quantized()}
    assert len(quantized) == 4 * (3 - recipe.layers_in_bf16)
    rows = store.read(tmp_path / "log" / "fp8", stat=None).to_pylist()
    assert {row["module"] for row in rows} == quantized
    assert {row["step"] for row in rows} == {1, 2, 3}
