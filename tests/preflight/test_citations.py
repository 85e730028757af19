"""Every line of a peer's source that a rule names says what the rule says it says."""

import importlib.metadata
import os
from pathlib import Path

import pytest

from nemo_fp8_recipes import preflight
from nemo_fp8_recipes.preflight import shapes
from nemo_fp8_recipes.preflight.citation import core, engine, in_one_line

SOURCES = "NEMO_FP8_PEER_SOURCES"  # directories that hold checkouts too, each named <repository>@<tag>
CITED = {str(citation): citation for rule in preflight.all_rules().values() for citation in rule.cites} | {
    str(shapes.BLOCKWISE_GEMM): shapes.BLOCKWISE_GEMM
}


def text(citation) -> list[str] | None:
    """The lines of the file cited, from the installed package or from a checkout of that tag."""
    for directory in filter(None, os.environ.get(SOURCES, "").split(os.pathsep)):
        path = Path(directory) / f"{citation.package}@{citation.version}" / citation.path
        if path.is_file():
            return path.read_text(encoding="utf-8").splitlines()
    try:
        distribution = importlib.metadata.distribution(citation.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != citation.version:
        return None
    return Path(str(distribution.locate_file(citation.path))).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("cited", CITED)
def test_the_line_is_there(cited):
    citation = CITED[cited]
    lines = text(citation)
    if lines is None:
        pytest.skip(f"{citation.package} {citation.version} is neither installed nor in {SOURCES}")
    assert citation.words in lines[citation.line - 1]


def test_every_rule_says_where_it_comes_from():
    assert all(rule.sources and all(map(str, rule.sources)) for rule in preflight.all_rules().values())
    python_packages = [c for c in CITED.values() if c.package in ("megatron-core", "transformer-engine")]
    assert len(python_packages) > 40


def test_lines_of_one_file_are_named_together():
    sources = (
        engine("pytorch/a.py", 9, "x"),
        "a paper",
        core("b.py", 4, "y"),
        engine("pytorch/a.py", 3, "z"),
    )
    assert in_one_line(sources) == (
        "transformer_engine/pytorch/a.py:3, 9 (transformer-engine 2.20.2); a paper; "
        "megatron/core/b.py:4 (megatron-core 0.16.1)"
    )
