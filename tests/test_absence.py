"""Without one of the peers everything that does not need it works, and asking for it says what to install."""

from __future__ import annotations

import textwrap
from pathlib import Path

from tests.report.runs import make
from tests.support.processes import run_python

# An import fails and package metadata is gone, as where the package was never installed.
WITHOUT = """
import contextlib, importlib.metadata, io, sys
for name in {modules}:
    sys.modules[name] = None
_version = importlib.metadata.version
def version(name):
    if name.lower().replace("_", "-") in {distributions}:
        raise importlib.metadata.PackageNotFoundError(name)
    return _version(name)
importlib.metadata.version = version

from nemo_fp8_recipes.cli import main
def run(*words):
    "Exit status, standard output, standard error."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(words))
    return status, out.getvalue(), err.getvalue()

def works(*words):
    status, out, err = run(*words)
    assert status == 0 and out, (words, status, err)
    return out

def refused(*words):
    status, out, err = run(*words)
    assert status == 2, (words, status, out)
    assert "Traceback" not in err and err.count("\\n") == 1, err
    return err

def raises(action):
    from nemo_fp8_recipes.errors import Fp8Error
    try:
        action()
    except Fp8Error as error:
        return str(error)
    raise AssertionError("nothing was raised")
"""


def run_without(modules: tuple[str, ...], distributions: tuple[str, ...], code: str) -> None:
    run_python(
        WITHOUT.format(modules=modules, distributions=distributions) + textwrap.dedent(code),
        env={"COLUMNS": "150"},
    )


def test_without_torch_and_all_that_needs_it(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two", recipe="mxfp8")
    run_without(
        ("torch", "transformer_engine", "megatron", "nemo", "lightning"),
        ("torch", "transformer-engine", "megatron-core", "megatron-bridge", "nemo-toolkit"),
        f"""
        import json
        assert "MXFP8BlockScaling" in works("show", "fp8_recipe=mxfp8")
        assert json.loads(works("show", "fp8_recipe=mxfp8", "--json"))["te"]["options"] is None
        assert "--fp8-recipe mxfp8" in works("args", "fp8_recipe=mxfp8")
        works("launch", "launcher=torchrun", "hardware=h100", "fp8_recipe=delayed", "--dry-run")
        works("runs", {str(tmp_path)!r})
        works("report", "--text", {str(one)!r})
        works("compare", {str(one)!r}, {str(two)!r})

        said = refused("train", "fp8_recipe=mxfp8", "versions.te=2.20")
        assert "pip install 'nemo-fp8-recipes[cpu]'" in said
        said = refused("train", "framework=nemo")
        assert "nemo_toolkit[lightning]==2.7.3" in said and "megatron-core==0.15.3" in said
        said = refused("train", "framework=bridge")
        assert "megatron-bridge 0.6.2" in said and "megatron-core 0.19.2" in said

        import nemo_fp8_recipes as fp8
        recipe = fp8.load("mxfp8")
        assert "nemo-fp8-recipes[cpu]" in raises(lambda: fp8.emulation.install("b200"))
        assert "Transformer Engine cannot be imported" in raises(recipe.te)
        assert "needs Megatron-Core" in raises(lambda: fp8.inject(recipe).__enter__())
        assert "needs Transformer Engine" in raises(lambda: fp8.autocast(recipe))
        """,
    )


def test_without_transformer_engine() -> None:
    run_without(
        ("transformer_engine",),
        ("transformer-engine", "transformer-engine-torch"),
        """
        assert "Not installed here" in works("show", "fp8_recipe=mxfp8")
        works("args", "fp8_recipe=mxfp8")
        # The job could run somewhere else: with the version stated it is checked.
        works("doctor", "fp8_recipe=mxfp8", "hardware=b200", "versions.te=2.20")
        assert "pip install 'nemo-fp8-recipes[cpu]'" in refused("train", "fp8_recipe=mxfp8")
        assert "torch" not in sys.modules
        """,
    )


def test_without_megatron_plain_transformer_engine_trains(tmp_path: Path) -> None:
    run_without(
        ("megatron", "nemo", "lightning"),
        ("megatron-core", "megatron-bridge", "nemo-toolkit"),
        f"""
        works("show", "fp8_recipe=mxfp8")
        said = refused("train", "fp8_recipe=mxfp8")
        assert "needs Megatron-Core" in said and "0.15 or 0.16" in said

        import nemo_fp8_recipes as fp8
        recipe = fp8.load("mxfp8")
        # Before the device is there, Transformer Engine itself says that its CUDA part is missing.
        assert "emulation.install()" in raises(lambda: fp8.autocast(recipe))
        sys.modules.pop("transformer_engine", None)
        fp8.start(recipe)
        import torch, transformer_engine.pytorch as te
        model = te.Linear(64, 64, params_dtype=torch.bfloat16)
        with fp8.telemetry.attach(model, recipe, directory={str(tmp_path)!r}) as recorder:
            recorder.begin_step(1)
            with fp8.autocast(recipe):
                model(torch.randn(32, 64, dtype=torch.bfloat16, device="cuda")).sum().backward()
            recorder.end_step(1)
            recorder.flush()
        assert len(fp8.manifest(model, recipe).quantized()) == 1
        from nemo_fp8_recipes.telemetry import store
        assert store.read({str(tmp_path)!r}, stat=None).num_rows > 0
        assert "install megatron-core 0.15" in raises(lambda: fp8.inject(recipe).__enter__()).lower()
        from nemo_fp8_recipes.callbacks import megatron_lm
        assert "Megatron-LM" in raises(lambda: megatron_lm.install(environ={{"NEMO_FP8_RECIPE": "mxfp8"}}))
        """,
    )
