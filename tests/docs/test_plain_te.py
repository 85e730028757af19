"""docs/plain_te.md: its loop runs as it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.markdown import blocks

pytestmark = pytest.mark.usefixtures("emulated")


def test_the_loop_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_fp8_recipes.emulation import trace
    from nemo_fp8_recipes.telemetry import store

    monkeypatch.chdir(tmp_path)
    found = blocks("plain_te.md")
    # Blocks with a tag need Lightning and Accelerate: tests/loops.
    assert [block.language for block in found] == ["python"] * 5
    names: dict[str, object] = {}
    with trace() as observed:
        for block in found:
            if not block.tag:
                exec(compile(block.code, "docs/plain_te.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "mxfp8 on emulated b200" in printed
    # The page's claims: FP8 GEMMs, in MXFP8, in every step; telemetry of both modules.
    gemms = [gemm for gemm in observed.gemms if gemm.quantized]
    assert len(gemms) == len(observed.gemms) == 5 * 2 * 3  # steps, layers, fprop dgrad wgrad
    directory = names["recorder"].directory
    assert directory.parent == Path("runs")
    rows = store.read(directory, stat=None).to_pylist()
    assert {(row["module"], row["step"], row["recipe"]) for row in rows} == {
        (module, step, "mxfp8") for module in ("0", "2") for step in (1, 2, 4)
    }
    assert "scale_inv_max" in printed


def test_attach_needs_nothing_but_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import transformer_engine.pytorch as te

    import nemo_fp8_recipes as fp8
    from nemo_fp8_recipes.telemetry import store

    monkeypatch.chdir(tmp_path)
    model = te.Linear(64, 64, params_dtype=torch.bfloat16)
    recorders = [fp8.telemetry.attach(model) for _ in range(2)]  # in the same second
    first, second = (recorder.directory for recorder in recorders)
    assert first != second
    assert first.name.startswith("te-")
    with recorders[0] as recorder:
        recorder.begin_step(1)
        with fp8.autocast(fp8.load("tensorwise")):
            model(torch.randn(32, 64, dtype=torch.bfloat16, device="cuda")).sum().backward()
        recorder.end_step(1)
        recorder.flush()
    rows = store.read(first, stat=None).to_pylist()
    assert {row["recipe"] for row in rows} == {"tensorwise"}
    recorders[1].close()
