"""The finding's schema and the list of codes in the documentation."""

import json
import re
from pathlib import Path

import pytest

from nemo_fp8_recipes import preflight
from nemo_fp8_recipes.preflight import Finding
from nemo_fp8_recipes.preflight.registry import rule
from tests.support.processes import run_python

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "schemas" / "finding.md"


def test_the_document_lists_every_code_as_it_is():
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| FP8-")]
    assert rows == [
        f"| {code} | {found.severity} | {found.title} | {found.source} | {found.versions or 'all'} |"
        for code, found in preflight.all_rules().items()
    ]


def test_the_document_names_every_field():
    finding = Finding(code="FP8-HW-001", severity="error", message="m").to_dict()
    documented = re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert documented == list(finding)
    assert finding["schema_version"] == 1
    json.dumps(finding)


def test_codes_are_of_one_form_and_given_once():
    assert all(re.fullmatch(r"FP8-[A-Z]{2,3}-\d{3}", code) for code in preflight.all_rules())
    with pytest.raises(ValueError, match="FP8-HW-001"):
        rule("FP8-HW-001", "error", "again", source="")(lambda job: iter(()))


def test_preflight_imports_no_torch():
    run_python(
        """
        import sys
        from nemo_fp8_recipes import config, preflight
        preflight.check_job(config.compose(), {}, emulated=False)
        assert not {"torch", "numpy", "transformer_engine"} & set(sys.modules)
        """
    )
