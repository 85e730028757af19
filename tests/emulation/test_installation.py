"""Installing, refusing to install, and taking the device away, each in a process of its own."""

from __future__ import annotations

from tests.support.processes import run_emulated, run_python

REASONS = {
    # From `pytorch/quantization.py` of Transformer Engine 2.20: its own words, per compute capability.
    "fp8": "Device compute capability 8.9 or higher required for FP8 execution.",
    "mxfp8": "Device compute capability 10.0 or higher required for MXFP8 execution.",
    "mxfp8_12": "MXFP8 (for all gemm layouts) is not supported on 12.0+ architectures yet.",
    "block": "FP8 block scaled GEMM requires compute capability 9.0 or higher and CUDA >= 12.9.",
}


def refused(code: str, message: str) -> None:
    run_python(
        f"""
import pytest
from nemo_fp8_recipes import emulation
from nemo_fp8_recipes.errors import EmulationError
{code}
with pytest.raises(EmulationError, match={message!r}):
    emulation.install("h100")
assert emulation.active() is None
assert len(emulation.patches()) == 0, "a refused installation left something behind"
"""
    )


def test_transformer_engine_answers_its_checks_from_the_posing_capability() -> None:
    answers = run_python(
        """
        from nemo_fp8_recipes import emulation
        answers = {}
        for name in ("a100", "l40s", "h100", "b200", "b300", "rtx_pro_6000"):
            with emulation.emulated(name):
                from transformer_engine.pytorch import quantization as q
                answers[name] = [q.check_fp8_support(), q.check_mxfp8_support(),
                q.check_fp8_block_scaling_support()]
        import json
        print(json.dumps(answers))
        """
    )
    import json

    yes = [True, ""]
    assert json.loads(answers.stdout.splitlines()[-1]) == {
        "a100": [[False, REASONS["fp8"]], [False, REASONS["mxfp8"]], [False, REASONS["block"]]],
        "l40s": [yes, [False, REASONS["mxfp8"]], [False, REASONS["block"]]],
        "h100": [yes, [False, REASONS["mxfp8"]], yes],
        "b200": [yes, yes, yes],
        "b300": [yes, yes, yes],
        "rtx_pro_6000": [yes, [False, REASONS["mxfp8_12"]], yes],
    }


def test_h100_refuses_mxfp8_in_transformer_engines_own_autocast() -> None:
    assert REASONS["mxfp8"] in run_emulated(
        """
        import torch
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import MXFP8BlockScaling
        try:
            with te.autocast(enabled=True, recipe=MXFP8BlockScaling()):
                te.Linear(64, 64)(torch.randn(32, 64, device="cuda"))
        except (RuntimeError, AssertionError) as error:  # up to 2.14 an assertion
            result(str(error))
        """,
        device="h100",
    )


def test_installing_twice_is_one_installation_and_another_gpu_is_an_error() -> None:
    run_emulated(
        """
        import pytest
        from nemo_fp8_recipes.errors import EmulationError
        patches = emulation.patches()
        assert emulation.install("h100") is emulation.active()
        assert emulation.patches() == patches
        assert emulation.label() == "emulated h100"
        with pytest.raises(EmulationError, match="poses as h100 already"):
            emulation.install("b200")
        with emulation.emulated("h100"):
            pass
        assert emulation.label() == "emulated h100", "leaving an inner block took the device away"
        """
    )


def test_the_import_leaves_no_trace_of_its_preparations() -> None:
    run_emulated(
        """
        import importlib.util, os, subprocess, sys
        leaked = [name for name in os.environ if name.startswith("NVTE_")]
        assert not leaked, f"a child process would inherit {leaked}"
        for name in ("triton", "onnx", "onnxscript"):
            missing = importlib.util.find_spec(name) is None
            assert not (missing and name in sys.modules), name
        import torch.utils._triton
        assert torch.utils._triton.has_triton_package() == (importlib.util.find_spec("triton") is not None)
        assert not torch.utils._triton.has_triton(), "torch.compile would look for the GPU's driver"
        assert not [f for f in sys.meta_path if type(f).__module__.endswith("te_import")]
        assert all(patch.reason for patch in emulation.patches())
        """
    )


def test_a_working_gpu_is_refused() -> None:
    refused("import torch; torch.cuda.is_available = lambda: True", "CUDA works")


def test_transformer_engine_imported_before_is_refused() -> None:
    refused(
        "import sys, types; sys.modules['transformer_engine.pytorch'] = types.ModuleType('te')",
        "Transformer Engine is imported already",
    )


def test_megatron_imported_before_is_refused() -> None:
    refused(
        "import sys, types; sys.modules['megatron.core'] = types.ModuleType('core')",
        "Megatron-Core is imported already",
    )


def test_an_unknown_release_is_refused_with_the_tested_ones() -> None:
    refused(
        """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: "9.9.0" if name == "transformer-engine" else version(name)
""",
        r"9\.9\.0 cannot be emulated: tested are 2\.11, 2\.14, 2\.17 and 2\.20\.",
    )


def test_a_release_that_does_not_import_is_refused_and_everything_is_taken_back() -> None:
    refused(
        """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "transformer_engine.pytorch.module":
            raise ImportError("broken on purpose")
sys.meta_path.insert(0, Broken())
""",
        "does not import on the emulated device",
    )


def test_uninstalling_gives_torch_back() -> None:
    run_python(
        """
import sys, torch
import torch.distributed as dist
watched = [(torch, "empty"), (torch, "tensor"), (torch, "load"), (torch.cuda, "is_available"), (torch.cuda,
"Stream"),
    (torch.cuda, "default_generators"), (torch.version, "cuda"), (dist, "init_process_group"),
    (dist, "_coalescing_manager"), (torch.nn.Module, "to"), (torch.autocast, "__enter__"), (torch.Tensor,
    "to"), (torch.Tensor, "is_cuda"), (torch.Tensor, "type"), (torch.Tensor, "new_zeros")]
before = [getattr(*pair) for pair in watched]
own = set(vars(torch.Tensor))
finders = list(sys.meta_path)
from nemo_fp8_recipes import emulation
with emulation.emulated("h100"):
    import transformer_engine.pytorch
    assert torch.cuda.is_available() and torch.ones(1).is_cuda
    assert all(getattr(*pair) is not old for pair, old in zip(watched, before))
assert [getattr(*pair) is old for pair, old in zip(watched, before)] == [True] * len(watched)
assert set(vars(torch.Tensor)) == own
assert sys.meta_path == finders
assert not torch.cuda.is_available() and not torch.ones(1).is_cuda
assert not [m for m in sys.modules if m.split(".")[0] in ("transformer_engine", "transformer_engine_torch")]
"""
    )


def test_nothing_of_torch_or_the_environment_stays_changed() -> None:
    run_python(
        """
import os, sys, types, warnings
os.environ.pop("OMP_WAIT_POLICY", None)
import torch
from nemo_fp8_recipes import emulation

def names():
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "torch" or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            seen[name, key] = value
            if isinstance(value, type) and str(value.__module__).startswith("torch"):
                for own, held in vars(value).items():
                    seen[value.__module__, value.__qualname__, own] = held
    return seen

warnings.simplefilter("ignore", FutureWarning)
warnings.simplefilter("error", RuntimeWarning)
with emulation.emulated("h100"):  # torch's own lazy imports
    import transformer_engine.pytorch
safe, environment, modules = torch.serialization.get_safe_globals(), dict(os.environ), set(sys.modules)
before = names()
assert "OMP_WAIT_POLICY" not in environment
for name in ("h100", "b200"):
    with emulation.emulated(name):
        import transformer_engine.pytorch as te
        assert len(torch.serialization.get_safe_globals()) > len(safe)
        with te.autocast(enabled=True):
            te.Linear(32, 32)(torch.randn(32, 32, requires_grad=True)).sum().backward()
    after = names()
    changed = [key for key in before if after.get(key) is not before[key]]
    assert set(changed) <= {("torch._weights_only_unpickler", "_marked_safe_globals_set")}, changed
    assert not after.keys() - before.keys()
    assert set(torch.serialization.get_safe_globals()) == set(safe)
    assert dict(os.environ) == environment
    assert set(sys.modules) == modules
assert emulation.uninstall() == ()
"""
    )


def test_leaving_names_the_modules_that_keep_something() -> None:
    run_python(
        """
import sys, pathlib, tempfile, warnings
import torch
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "keeps_te.py").write_text("from transformer_engine.pytorch import Linear")
(folder / "keeps_torch.py").write_text("from torch.cuda import is_available")
(folder / "keeps_nothing.py").write_text("import torch; from torch import nn; x = torch.ones(1)")
sys.path.insert(0, str(folder))
from nemo_fp8_recipes import emulation
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with emulation.emulated("h100"):
        import keeps_nothing, keeps_te, keeps_torch
        import megatron.core.extensions.transformer_engine
messages = [str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)]
assert len(messages) == 1 and "keeps_te, keeps_torch, megatron were imported on it" in messages[0], messages
assert "keeps_nothing" not in messages[0]
"""
    )


def test_the_device_can_be_changed_by_installing_it_anew() -> None:
    """Also that nothing of the first Transformer Engine import is left in the binding."""
    run_python(
        """
        import torch
        from nemo_fp8_recipes import emulation
        for name in ("h100", "b200"):
            with emulation.emulated(name):
                import transformer_engine.pytorch as te
                from transformer_engine.common.recipe import Float8CurrentScaling
                layer = te.Linear(64, 64, params_dtype=torch.bfloat16)
                with te.autocast(enabled=True, recipe=Float8CurrentScaling()), emulation.trace() as seen:
                    layer(torch.randn(32, 64, device="cuda", dtype=torch.bfloat16))
                assert [gemm.quantized for gemm in seen.gemms] == [True]
        """
    )


def test_telemetry_has_compiled_kernels_as_long_as_the_device_is_there() -> None:
    """Nothing is compiled, and torch's operations are left to a process with another device."""
    run_python(
        """
        from nemo_fp8_recipes import emulation
        from nemo_fp8_recipes.telemetry import host_kernels

        def filled():
            return {name for name in host_kernels.__all__ if getattr(host_kernels, name) is not None}

        assert filled() == set()
        with emulation.emulated("h100"):
            assert filled() == set(host_kernels.__all__)
            reached = [patch.target for patch in emulation.patches() if "host_kernels" in patch.target]
            assert len(reached) == len(host_kernels.__all__)
            from nemo_fp8_recipes.emulation.kernels import compiled
            assert not compiled._looked
        assert filled() == set()
        """
    )
