"""The printed manifest."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from nemo_fp8_recipes.injection import Manifest, OperandRow

from .examples import gpt_manifest, mxfp8_row


def printed(manifest: Manifest, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(manifest.table())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_equal_layers_share_a_line_and_it_fits_80_columns():
    lines = printed(gpt_manifest(32))
    assert max(map(len, lines)) <= 80
    assert len(lines) < 12
    (qkv,) = [line for line in lines if "linear_qkv" in line]
    assert qkv.split() == ["0-31", "self_attention.linear_qkv", *["e4m3", "1x32"] * 3]


def test_the_widest_recipe_fits_80_columns_unfolded():
    square = OperandRow("e4m3", "block", block=(128, 128), scale_dtype="fp32")
    flat = dataclasses.replace(square, block=(1, 128))
    rows = [
        mxfp8_row(
            f"decoder.layers.{n}.self_attention.linear_proj", recipe="blockwise", input=flat, weight=square
        )
        for n in range(96)
    ]
    (line,) = [line for line in printed(Manifest(tuple(rows))) if "0-95" in line]
    assert "self_attention.linear_proj" in line
    assert "e4m3 128x128" in line


def test_title_counts_and_names_recipe_and_device():
    assert printed(gpt_manifest(2))[0] == "8 of 11 modules quantised by mxfp8, read back on emulated b200"


def test_a_layer_that_differs_has_its_own_line():
    manifest = gpt_manifest(4)
    rows = tuple(
        dataclasses.replace(row, grad_output=dataclasses.replace(row.grad_output, format="e5m2"))
        if row.module == "decoder.layers.2.mlp.linear_fc1"
        else row
        for row in manifest.rows
    )
    lines = [line.split() for line in printed(Manifest(rows)) if "linear_fc1" in line]
    assert [(line[0], line[-2]) for line in lines] == [("0-1,3", "e4m3"), ("2", "e5m2")]


def test_two_recipes_get_a_column():
    rows = (
        mxfp8_row("decoder.layers.0.mlp.linear_fc1"),
        mxfp8_row("decoder.layers.0.mlp.linear_fc2", recipe="delayed"),
    )
    lines = printed(Manifest(rows), width=100)
    assert any("delayed" in line for line in lines)
    assert any("mxfp8" in line for line in lines)


def test_high_precision_is_explained_below():
    lines = printed(gpt_manifest(1))
    assert [line for line in lines if line.startswith("[1]")] == ["[1] for a reason"]
    assert any("output_layer" in line and "bf16 [1]" in line for line in lines)


def test_layers_that_run_as_cuda_graphs_say_so():
    rows = [
        mxfp8_row(f"decoder.layers.{n}.mlp.linear_fc1", cuda_graph="local" if n < 2 else None)
        for n in range(4)
    ]
    lines = printed(Manifest(tuple(rows)))
    assert [line.split()[:3] for line in lines if "linear_fc1" in line] == [
        ["0-1", "mlp.linear_fc1", "[1]"],
        ["2-3", "mlp.linear_fc1", "e4m3"],
    ]
    text = " ".join(" ".join(lines).split())
    assert "[1] runs as a CUDA graph of Megatron (cuda_graph_impl=local): telemetry does not see" in text
