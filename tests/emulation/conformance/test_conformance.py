"""Running somebody else's CUDA tests on the emulated device, and telling what became of them."""

from __future__ import annotations

import importlib.metadata
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_fp8_recipes.emulation.conformance import __main__ as conformance
from nemo_fp8_recipes.emulation.conformance.__main__ import main
from nemo_fp8_recipes.emulation.conformance.causes import reason
from nemo_fp8_recipes.emulation.conformance.outcomes import Entry, Kept
from nemo_fp8_recipes.emulation.conformance.plugin import spread
from nemo_fp8_recipes.emulation.conformance.report import left_out
from nemo_fp8_recipes.emulation.conformance.suite import LEFT_OUT, SUITE, Part
from tests.support.processes import environment

TESTS = """
import pytest, torch
import transformer_engine_torch as tex

def test_runs_on_the_device():
    x = torch.ones(32, 64, device="cuda")
    assert x.is_cuda and torch.cuda.get_device_capability() == (10, 0)

@pytest.mark.parametrize("number", range(9))
def test_with_parameters(number):
    assert number < 100

def test_is_wrong():
    assert 1 + 1 == 3, "arithmetic | differs"

def test_needs_fused_attention():
    tex.fused_attn_fwd()

def test_needs_a_graph():
    torch.cuda.CUDAGraph()

def test_skips_itself():
    pytest.skip("needs 9 of them")

def test_hangs():
    import time
    time.sleep(60)
"""


@dataclass(frozen=True)
class Item:
    nodeid: str


def test_a_sample_spreads_over_the_parameters_of_every_function() -> None:
    items = [Item(f"f.py::many[{number}]") for number in range(90)]
    items += [Item("f.py::one"), Item("f.py::two[0]")]
    chosen = [item.nodeid for item in spread(items, 12)]
    assert Counter(name.split("[")[0] for name in chosen) == {
        "f.py::many": 10,
        "f.py::one": 1,
        "f.py::two": 1,
    }
    assert chosen[:3] == ["f.py::many[0]", "f.py::many[14]", "f.py::many[20]"]
    numbers = [int(name[len("f.py::many[") : -1]) for name in chosen if "many" in name]
    assert [number // 9 for number in numbers] == list(range(10))
    assert spread(items, 0) == items
    assert len(spread(items, 2)) == 2


@pytest.mark.parametrize("inner", [2, 3, 4, 5, 6, 8])
def test_a_sample_has_every_value_of_an_inner_parameter(inner: int) -> None:
    """A fixed stride of a multiple of their number would find the first value only."""
    items = [Item(f"f.py::test[{outer}-{value}]") for outer in range(120) for value in range(inner)]
    values = Counter(item.nodeid.split("-")[1] for item in spread(items, 60))
    assert len(values) == inner
    assert min(values.values()) >= 0.6 * 60 / inner


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "transformer_engine_torch.moe_x is not emulated on a machine without a GPU.",
            "compiled-only kernel: moe_x",
        ),
        ("transformer_engine_torch.fused_attn_fwd is not emulated on a machine", "fused attention"),
        ("Tried to instantiate dummy base class CUDAGraph", "CUDA graphs"),
        (
            "assert 1 == 0 + where 1 = CompletedProcess(args=['torchrun', 'run.py'])",
            None,
        ),  # a rank's own error
        ("AssertionError: libcuda.so cannot found!", "compiled-only kernel: Triton"),
        ("transformer_engine_torch.quantize with NVFP4Quantizer(x=True) is not emulated", None),
        ("AssertionError: Tensor-likes are not equal!", None),
        (
            "ValueError: No dot product attention backend is available",
            None,
        ),  # unfused attention is plain torch
        ("ModuleNotFoundError: No module named 'triton'", None),  # it can be installed
    ],
)
def test_what_excuses_a_test(message: str, expected: str | None) -> None:
    assert reason(message) == expected


def test_the_table_tells_passed_failed_and_why_a_gpu_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_recipe.py").write_text(TESTS)
    monkeypatch.setenv("PYTEST_ADDOPTS", "--test-seconds 1")
    table = tmp_path / "table.md"
    assert main([str(tmp_path), "test_recipe.py", "--sample", "10", "--output", str(table)]) == 1
    text = table.read_text()
    assert "| `test_recipe.py (b200)` | 15 | 10 | 5 | 2 | 2 | 1 |" in text
    assert "Passed of those that need no real GPU: 71.4%." in text
    assert "- `test_recipe.py::test_is_wrong`" in text
    assert "arithmetic \\| differs" in text
    assert "**fused attention** (1)\n\n- `test_recipe.py::test_needs_fused_attention`, 1 times" in text
    assert "**CUDA graphs** (1)\n\n- `test_recipe.py::test_needs_a_graph`, 1 times" in text
    assert "**takes too long on a CPU**\n\n- `test_recipe.py::test_hangs`" in text
    assert "needs 9 of them" in text

    assert main([str(tmp_path / "elsewhere")]) == 2
    assert main([str(tmp_path), "test_recipes.py"]) == 2  # no such file: nothing was run
    assert "is not tests/pytorch of Transformer Engine" in capsys.readouterr().err


def test_kept_outcomes_are_those_of_the_same_run_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_recipe.py").write_text("def test_one():\n    pass\n\n\ndef test_two():\n    pass\n")
    ran: list[Part] = []

    def run(tests: Path, part: Part, seconds: float, kept: Kept) -> None:
        ran.append(part)
        kept.add([{"id": "test_recipe.py::test_one", "outcome": "passed", "message": ""}, *extra])

    extra: list[Entry] = []
    monkeypatch.setattr(conformance, "run", run)
    call = [
        str(tests),
        "test_recipe.py",
        "--keep",
        str(tmp_path / "kept"),
        "--output",
        str(tmp_path / "t.md"),
    ]
    assert main(call) == main(call) == 0
    assert len(ran) == 1
    assert main([*call, "--kept-only", "--sample", "1"]) == 0  # nothing is kept of that
    assert "Not run: `test_recipe.py`." in (tmp_path / "t.md").read_text()
    assert main([*call, "--kept-only"]) == 0
    assert "| 1 | 1 | 0 |" in (tmp_path / "t.md").read_text()
    assert len(ran) == 1
    assert main([*call, "--kept-only", "--sample", "1"]) == 0
    with monkeypatch.context() as later:
        later.setattr(conformance, "_sources", lambda: "others")
        assert main([*call, "--kept-only"]) == 0
        assert "| 1 | 1 | 0 |" in (tmp_path / "t.md").read_text()  # told, with the commit it is of
        assert f"This package was at commit {conformance._commit()}." in (tmp_path / "t.md").read_text()
    main([*call, "--sample", "1"])
    main([*call, "--sample", "1"])
    assert [part.sample for part in ran] == [0, 1]
    (tests / "test_recipe.py").write_text("def test_one():\n    pass\n")  # other tests
    main([*call, "--sample", "1"])
    assert len(ran) == 3
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2.99" if name == "transformer-engine" else real(name)
    )
    extra.append({"id": "test_recipe.py", "outcome": "failed", "message": "stopped after 1 minutes"})
    main([*call, "--sample", "1"])
    main([*call, "--sample", "1"])  # what ran out of time is not whole
    assert len(ran) == 5


def test_a_file_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    ran = tmp_path / "ran"
    (tests / "test_recipe.py").write_text(
        "import pathlib, pytest, time\n\n"
        "@pytest.mark.parametrize('number', range(3))\n"
        "def test_one(number):\n"
        f"    ran = pathlib.Path({str(ran)!r})\n"
        "    before = ran.read_text() if ran.exists() else ''\n"
        "    ran.write_text(f'{before}{number}')\n"
        "    if number == 1 and before == '0':\n"
        "        time.sleep(600)\n"
    )
    table = tmp_path / "t.md"
    call = [str(tests), "test_recipe.py", "--keep", str(tmp_path / "kept"), "--output", str(table)]
    main([*call, "--file-minutes", "0.4"])
    assert "| `test_recipe.py (b200)` | 3 | 1 | 1 | 0 | 0 | 0 |" in table.read_text()
    assert "stopped after 0.4 minutes" in table.read_text()
    assert "not all of its sample was run: `test_recipe.py (b200)`." in table.read_text()
    main([*call, "--kept-only"])
    assert "| `test_recipe.py (b200)` | 3 | 1 | 1 | 0 | 0 | 0 |" in table.read_text()
    main(call)
    assert "| `test_recipe.py (b200)` | 3 | 3 | 3 | 0 | 0 | 0 |" in table.read_text()
    assert "stopped" not in table.read_text()
    assert "Interrupted" not in table.read_text()
    assert ran.read_text() == "0112"  # the one that had ended was not run again


def test_what_an_interrupted_runner_has_seen_is_kept(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    ran = tmp_path / "ran"
    (tests / "test_recipe.py").write_text(
        "import os, pathlib, pytest, signal\n\n"
        "@pytest.mark.parametrize('number', range(3))\n"
        "def test_one(number):\n"
        f"    ran = pathlib.Path({str(ran)!r})\n"
        "    before = ran.read_text() if ran.exists() else ''\n"
        "    ran.write_text(f'{before}{number}')\n"
        "    if number == 1 and before == '0':\n"
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    table = tmp_path / "t.md"
    call = [str(tests), "test_recipe.py", "--keep", str(tmp_path / "kept"), "--output", str(table)]
    command = [sys.executable, "-m", "nemo_fp8_recipes.emulation.conformance", *call]
    assert subprocess.run(command, env=environment(), check=False).returncode == -signal.SIGKILL
    assert not table.exists()
    assert main(call) == 0
    assert "| `test_recipe.py (b200)` | 3 | 3 | 3 | 0 | 0 | 0 |" in table.read_text()
    assert ran.read_text() == "0112"


def test_several_workers_tell_in_the_order_of_the_suite(tmp_path: Path) -> None:
    for file, seconds in (("test_recipe.py", 2), ("test_custom_recipe.py", 0), ("test_mine.py", 0)):
        (tmp_path / file).write_text(f"import time\n\ndef test_linear():\n    time.sleep({seconds})\n")
    table = tmp_path / "t.md"
    files = ["test_recipe.py", "test_custom_recipe.py", "test_mine.py"]
    assert main([str(tmp_path), *files, "--workers", "2", "--output", str(table)]) == 0
    rows = [
        line.split("`")[1].split()[0] for line in table.read_text().splitlines() if line.startswith("| `")
    ]
    assert rows == files


RANK = """
import torch, torch.distributed as dist
import transformer_engine.pytorch as te
assert torch.cuda.get_device_capability() == (10, 0)
assert torch.cuda.device_count() == 2
dist.init_process_group("nccl")
total = torch.ones(1, device="cuda")
dist.all_reduce(total)
assert total.item() == 2
te.Linear(32, 32)(torch.ones(32, 32, device="cuda"))
dist.destroy_process_group()
"""

STARTS_RANKS = """
import pathlib, subprocess, torch

def test_starts_torchrun():
    ranks = f"--nproc_per_node={torch.cuda.device_count()}"
    program = pathlib.Path(__file__).parent / "rank.py"
    subprocess.run(["torchrun", "--standalone", ranks, str(program)], check=True)
"""


def test_ranks_that_a_test_starts_pose_as_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_recipe.py").write_text(STARTS_RANKS)
    (tmp_path / "rank.py").write_text(RANK)
    table = tmp_path / "t.md"
    monkeypatch.setattr(conformance, "SUITE", (Part("test_recipe.py", processes=2),))
    assert main([str(tmp_path), "test_recipe.py", "--output", str(table)]) == 0, table.read_text()
    assert "| `test_recipe.py (b200, 2 processes)` | 1 | 1 | 1 | 0 | 0 | 0 |" in table.read_text()


def test_what_ended_a_rank_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_recipe.py").write_text(STARTS_RANKS)
    (tmp_path / "rank.py").write_text("raise ValueError('of this rank')")
    table = tmp_path / "t.md"
    monkeypatch.setattr(conformance, "SUITE", (Part("test_recipe.py", processes=2),))
    assert main([str(tmp_path), "test_recipe.py", "--output", str(table)]) == 1
    told = table.read_text()
    assert "ValueError: of this rank" in told, told


def test_every_file_of_the_source_tree_has_a_verdict(tmp_path: Path) -> None:
    known = {part.file for part in SUITE}
    assert not known & set(LEFT_OUT)
    for file in (*known, *LEFT_OUT, "test_of_a_later_release.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    section = [line for line in left_out(tmp_path) if line.startswith("- ")]
    assert "- `test_of_a_later_release.py`: not looked at yet" in section
    assert f"- `test_cuda_graphs.py`: {LEFT_OUT['test_cuda_graphs.py']}" in section
    assert len(section) == len(LEFT_OUT) + 1


def test_a_pytest_that_dies_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_recipe.py").write_text(
        "import os\n\ndef test_one():\n    pass\n\ndef test_dies():\n    os._exit(7)\n"
    )
    assert main([str(tmp_path), "test_recipe.py"]) == 1
    table = capsys.readouterr().out
    assert "pytest ended with status 7 after 1 tests" in table
    assert "| `test_recipe.py (b200)` | 2 | 2 | 1 | 1 | 0 | 0 |" in table
