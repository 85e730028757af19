"""Every line of Python in docs/nemo.md is run, in one process, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_fp8_recipes.telemetry import store

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[3]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in PYTHON.findall((ROOT / "docs" / "nemo.md").read_text()):
        exec(compile(block, "docs/nemo.md", "exec"), names)
    said = capsys.readouterr().out
    assert "mxfp8 on emulated b200" in said
    assert "12 modules quantised" in said
    assert f"{12 * 3 * 2} values logged" in said
    assert store.read(tmp_path / "runs" / "nemo").num_rows
    assert type(names["recipe"]).__name__ == "Partial"
