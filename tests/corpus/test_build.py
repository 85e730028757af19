"""Text in, token files out: what is in them, and that nothing half-written stays."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_fp8_recipes.cli import main
from nemo_fp8_recipes.corpus.build import build
from nemo_fp8_recipes.corpus.index_file import IndexFile
from nemo_fp8_recipes.corpus.tokenizer import ByteTokenizer
from nemo_fp8_recipes.errors import DataError

texts = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=40)


def documents(prefix: Path) -> list[bytes]:
    """The documents of a byte-level dataset, read back by the lengths in its index."""
    index = IndexFile.read(str(prefix))
    tokens = np.fromfile(f"{prefix}.bin", dtype=index.dtype)
    pieces = np.split(tokens, np.cumsum(index.lengths)[:-1])
    assert all(piece[-1] == 0 for piece in pieces)
    return [bytes(piece[:-1].tolist()) for piece in pieces]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(texts, min_size=1, max_size=12))
def test_every_document_comes_back(tmp_path: Path, given_texts: list[str]) -> None:
    prefix = tmp_path / "corpus"
    kept = [text.encode() for text in given_texts if text]
    pairs = [(Path("x"), text) for text in given_texts]
    if not kept:
        with pytest.raises(DataError, match="no text"):
            build(pairs, ByteTokenizer(), tmp_path / "none")
        assert not list(tmp_path.glob("*none*"))
        return
    built = build(pairs, ByteTokenizer(), prefix)
    assert documents(prefix) == kept
    assert (built.documents, built.empty) == (len(kept), len(given_texts) - len(kept))
    assert built.tokens == sum(map(len, kept)) + len(kept) == IndexFile.read(str(prefix)).tokens


def test_the_command_reads_files_lines_json_and_gzip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/b.txt").write_bytes("zwei\r\nλ\n".encode())
    (tmp_path / "in/a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "x": 1}\n')
    (tmp_path / "in/ignored.py").write_text("no")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    assert main(["data", "--output", "out dir/all", "in", "c.txt.gz"]) == 0
    assert documents(tmp_path / "out dir/all") == [b"one", b"two", "zwei\r\nλ\n".encode(), b"three"]
    assert "4 documents" in capsys.readouterr().out
    assert main(["data", "--output", "lines", "--documents", "line", "in/b.txt"]) == 0
    assert documents(tmp_path / "lines") == [b"zwei", "λ".encode()]
    about = json.loads((tmp_path / "lines.json").read_text())
    assert (about["documents"], about["vocab_size"], about["dtype"]) == (2, 256, "uint16")
    assert sorted(os.listdir()) == ["c.txt.gz", "in", "lines.bin", "lines.idx", "lines.json", "out dir"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required"),
        (["--output", "o", "missing"], "no file or directory missing"),
        (["--output", "o", "empty"], "named like"),
        (["--output", "o", "latin.txt"], "latin.txt is not UTF-8 text"),
        (["--output", "o", "zero.txt"], "zero.txt: A document holds byte 0"),
        (["--output", "o", "bad.jsonl"], "Line 2 of bad.jsonl is no JSON object with a text in 'text'"),
        (["--output", "there", "ok.txt"], "there.idx exists already"),
        (["--output", "ok.txt/o", "ok.txt"], "Cannot write ok.txt/o"),
        (["--output", "o", "--end", "x", "ok.txt"], "leave --end out"),
        (["--output", "o", "--tokenizer", "no.json", "ok.txt"], "no.json"),
        (["--output", "o", "--documents", "page", "ok.txt"], "invalid choice: 'page'"),
    ],
)
def test_what_cannot_be_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "ok.txt").write_text("fine")
    (tmp_path / "latin.txt").write_bytes(b"gr\xf6\xdfe")
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n["text"]\n')
    (tmp_path / "there.idx").write_bytes(b"")
    before = sorted(os.listdir())
    assert main(["data", *words]) == 2
    assert said in capsys.readouterr().err
    assert sorted(os.listdir()) == before


def test_a_failed_replacement_leaves_the_files_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ok.txt").write_text("fine")
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    assert main(["data", "--output", "o", "ok.txt"]) == 0
    assert main(["data", "--output", "o", "--overwrite", "ok.txt", "zero.txt"]) == 2
    assert documents(tmp_path / "o") == [b"fine"]
    (tmp_path / "ok.txt").write_text("finer")
    assert main(["data", "--output", "o", "--overwrite", "ok.txt"]) == 0
    assert documents(tmp_path / "o") == [b"finer"]


def test_a_hugging_face_tokenizer_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("tokenizers", reason="needs the extra data: pip install tokenizers")
    from tokenizers import models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    words = {"<unk>": 0, "hello": 1, "world": 2}
    tokenizer = library.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("plain.json")
    tokenizer.add_special_tokens(["</s>"])
    (tmp_path / "model").mkdir()
    tokenizer.save("model/tokenizer.json")
    (tmp_path / "in.jsonl").write_text('{"body": "hello world"}\n{"body": "world moon"}\n')
    common = ["data", "--field", "body", "in.jsonl"]
    assert main([*common, "--output", "o", "--tokenizer", "model"]) == 0
    index = IndexFile.read("o")
    assert index.lengths.tolist() == [3, 3]
    assert np.fromfile("o.bin", dtype=index.dtype).tolist() == [1, 2, 3, 2, 0, 3]
    about = json.loads(Path("o.json").read_text())
    assert (about["vocab_size"], about["end_of_document"], about["tokenizer"]["end"]) == (4, 3, "</s>")
    assert main([*common, "--output", "p", "--tokenizer", "plain.json"]) == 2  # nothing ends a document
    assert main([*common, "--output", "p", "--tokenizer", "plain.json", "--end", "hello"]) == 0
    assert np.fromfile("p.bin", dtype="uint16").tolist() == [1, 2, 1, 2, 0, 1]
    assert main([*common, "--output", "q", "--tokenizer", "in.jsonl"]) == 2


def test_damaged_text_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = bytearray(gzip.compress(b"some text, packed"))
    packed[10] = 0xFF  # the type of the first block, after gzip's header
    contents = {
        "damaged.txt.gz": bytes(packed),
        "half_a_pair.jsonl": b'{"text": "a"}\n{"text": "a\\ud800b"}\n',
        "deep.jsonl": b"[" * 100_000,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert main(["data", "--output", str(tmp_path / "out"), str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
        assert not list(tmp_path.glob("*out*"))
