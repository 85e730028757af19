"""Lightning's and Accelerate's loops as docs/plain_te.md writes them. They need the extra `loops`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.markdown import blocks

pytestmark = [
    pytest.mark.usefixtures("emulated"),
    # What the frameworks themselves warn about is not ours to repeat.
    pytest.mark.filterwarnings("ignore"),
]


def run_page(tag: str) -> dict[str, object]:
    """The page's first block and imports, then the block of this tag."""
    found = blocks("plain_te.md")
    names: dict[str, object] = {}
    imports = "import torch\nimport transformer_engine.pytorch as te\n"
    (tagged,) = [block.code for block in found if block.tag == tag]
    for code in (found[0].code, imports, tagged):
        exec(compile(code, "docs/plain_te.md", "exec"), names)
    return names


def check(directory: Path, module: str, steps: set[int]) -> None:
    from nemo_fp8_recipes.telemetry import store

    rows = store.read(directory, stat=None).to_pylist()
    assert {(row["module"], row["step"], row["recipe"]) for row in rows} == {
        (module, step, "mxfp8") for step in steps
    }
    assert {row["tensor"] for row in rows} == {"input", "weight", "grad_output"}


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="needs the extra loops: make test-loops")
    from nemo_fp8_recipes.emulation import trace

    monkeypatch.chdir(tmp_path)
    with trace() as observed:
        names = run_page("lightning")
    # Two epochs of three batches: one linear layer, whose input needs no gradient.
    assert len([gemm for gemm in observed.gemms if gemm.quantized]) == 6 * 2
    check(names["telemetry"].recorder.directory, "model", {1, 2, 4, 6})


def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="needs the extra loops: make test-loops")
    from nemo_fp8_recipes.emulation import trace

    monkeypatch.chdir(tmp_path)
    with trace() as observed:
        names = run_page("accelerate")
    assert len([gemm for gemm in observed.gemms if gemm.quantized]) == 3 * 2
    check(names["recorder"].directory, "", {1, 2})
