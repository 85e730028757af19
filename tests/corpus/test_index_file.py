"""The format of the two files, against Megatron's own writer and reader; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nemo_fp8_recipes.corpus.index_file import IndexFile, index_bytes, token_dtype
from nemo_fp8_recipes.errors import DataError


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("vocab_size", [256, 65499, 65500, 131072])
def test_the_files_are_those_that_megatrons_builder_writes(tmp_path: Path, vocab_size: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    generator = np.random.default_rng(1)
    documents = [generator.integers(vocab_size, size=size) for size in (1, 7, 300)]
    dtype = token_dtype(vocab_size)
    assert dtype == DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))

    lengths = np.array([len(document) for document in documents])
    (tmp_path / "ours.idx").write_bytes(index_bytes(lengths, dtype))
    (tmp_path / "ours.bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [read[number].tolist() for number in range(3)] == [document.tolist() for document in documents]
    assert IndexFile.read(str(tmp_path / "theirs")).lengths.tolist() == [1, 7, 300]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A dataset of two documents with five tokens."""
    dtype = np.dtype(np.uint16)
    (tmp_path / "d.idx").write_bytes(index_bytes(np.array([2, 3]), dtype))
    (tmp_path / "d.bin").write_bytes(np.arange(5, dtype=dtype).tobytes())
    return str(tmp_path / "d")


def damage(prefix: str, ending: str, start: int, content: bytes) -> None:
    path = Path(f"{prefix}.{ending}")
    whole = path.read_bytes()
    path.write_bytes(whole[:start] + content + whole[start + len(content) :])


def test_what_is_no_dataset_is_one_clear_error(prefix: str) -> None:
    assert IndexFile.read(prefix).tokens == 5
    with pytest.raises(DataError, match=r"without its ending: .*/d\."):
        IndexFile.read(f"{prefix}.bin")
    whole = Path(f"{prefix}.idx").read_bytes()
    for content, said in (
        (b"", "Cannot read"),
        (b"PK" + whole[2:], "does not begin as one"),
        (whole[:9] + b"\2" + whole[10:], "version 2"),
        (whole[:17] + b"\7" + whole[18:], "tokens of type 7"),
        (whole[:40], "cut off"),
        (whole[:34] + b"\3" + whole[35:], "6 tokens of 2 bytes, and d.bin has 10 bytes"),
    ):
        Path(f"{prefix}.idx").write_bytes(content)
        with pytest.raises(DataError, match=said):
            IndexFile.read(prefix)


def test_the_digest_follows_the_content(prefix: str) -> None:
    before = IndexFile.read(prefix).digest()
    assert IndexFile.read(prefix).digest() == before
    damage(prefix, "bin", 4, b"\x09")
    assert IndexFile.read(prefix).digest() != before


def test_an_index_cut_off_in_its_boundaries_and_a_negative_length(prefix: str) -> None:
    whole = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(whole[:-8])
    with pytest.raises(DataError, match="cut off"):
        IndexFile.read(prefix)
    Path(f"{prefix}.idx").write_bytes(whole)
    damage(prefix, "idx", 34, np.array([-2, 7], dtype="<i4").tobytes())  # five tokens in all, as before
    with pytest.raises(DataError, match="fewer than 0"):
        IndexFile.read(prefix)
