"""One manifest from many ranks."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_fp8_recipes.errors import InjectionError
from nemo_fp8_recipes.injection import Manifest, gather, merge

from .examples import MXFP8, gpt_manifest, mxfp8_row


def test_pipeline_stages_become_one_model_in_layer_order():
    whole = gpt_manifest(12)
    middle = len(whole.rows) // 2 // 5 * 5
    first, last = Manifest(whole.rows[:middle], "mxfp8"), Manifest(whole.rows[middle:], "mxfp8")
    assert merge([last, first]) == whole


def test_ranks_with_the_same_modules_agree():
    assert merge([gpt_manifest(2)] * 4) == gpt_manifest(2)


def test_ranks_that_disagree_are_an_error():
    wrong = mxfp8_row("a", weight=dataclasses.replace(MXFP8, format="e5m2"))
    with pytest.raises(
        InjectionError, match="Ranks 0 and 2 disagree about a: weight is e4m3 1x32 and e5m2 1x32"
    ):
        merge([Manifest((mxfp8_row("a"),)), Manifest((mxfp8_row("a"),)), Manifest((wrong,))])


def test_a_single_process_needs_no_torch_distributed():
    assert gather(gpt_manifest(1)) == gpt_manifest(1)
