"""The manifest as a document: JSON there and back, versions, differences."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nemo_fp8_recipes.errors import ReportError
from nemo_fp8_recipes.injection import Manifest

from .examples import MXFP8, gpt_manifest, high_precision_row, mxfp8_row


def test_json_round_trip_keeps_everything():
    manifest = gpt_manifest(2)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_document_is_self_describing_plain_json():
    document = json.loads(gpt_manifest(1).to_json())
    assert document["schema"] == "nemo_fp8_recipes.manifest"
    assert document["schema_version"] == 1
    assert document["rows"][1]["input"]["block"] == [1, 32]


def test_fields_of_a_later_writer_are_ignored():
    document = json.loads(gpt_manifest(1).to_json())
    document["rows"][0]["invented_later"] = 1
    document["rows"][1]["input"]["invented_later"] = 1
    assert Manifest.from_dict(document) == gpt_manifest(1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a manifest"),
        ('{"schema": "something else"}', "not a manifest"),
        ('{"schema": "nemo_fp8_recipes.manifest", "schema_version": 2}', "schema version 2"),
        (
            '{"schema": "nemo_fp8_recipes.manifest", "schema_version": 1, "rows": [{"module": "a"}]}',
            "damaged",
        ),
        ('{"schema": "nemo_fp8_recipes.manifest", "schema_version": 1}', "damaged"),
    ],
)
def test_what_is_no_manifest_is_refused(text, says):
    with pytest.raises(ReportError, match=says):
        Manifest.from_json(text)


def test_a_row_is_found_by_module():
    manifest = gpt_manifest(2)
    assert manifest.row("decoder.layers.1.mlp.linear_fc1").recipe == "mxfp8"
    with pytest.raises(KeyError):
        manifest.row("decoder.layers.2.mlp.linear_fc1")


def test_equal_manifests_have_no_difference():
    assert gpt_manifest(2).diff(gpt_manifest(2)) == ()


def test_differences_name_module_field_and_both_values():
    before = Manifest((mxfp8_row("a"), mxfp8_row("gone")))
    changed = mxfp8_row("a", grad_output=dataclasses.replace(MXFP8, format="e5m2"))
    after = Manifest((changed, high_precision_row("new", "router")))
    assert [str(difference) for difference in before.diff(after)] == [
        "a: grad_output was e4m3 1x32, is e5m2 1x32",
        "gone: module was present, is absent",
        "new: module was absent, is present",
    ]


def test_a_manifest_written_before_cuda_graphs_were_noted_is_read():
    document = gpt_manifest(1).to_dict()
    for row in document["rows"]:
        del row["cuda_graph"]
    assert Manifest.from_dict(document) == gpt_manifest(1)


def test_modules_that_run_as_cuda_graphs_are_told_apart():
    eager = Manifest((mxfp8_row("decoder.layers.0.mlp.linear_fc1"),))
    graphed = Manifest((mxfp8_row("decoder.layers.0.mlp.linear_fc1", cuda_graph="local"),))
    assert Manifest.from_json(graphed.to_json()) == graphed
    assert [str(difference) for difference in eager.diff(graphed)] == [
        "decoder.layers.0.mlp.linear_fc1: cuda_graph was absent, is local"
    ]
