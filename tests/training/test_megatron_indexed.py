"""Training on Megatron's token files: the sequences that Megatron itself draws, and a job that goes on."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_fp8_recipes.corpus.build import build
from nemo_fp8_recipes.corpus.index_file import index_bytes
from nemo_fp8_recipes.corpus.tokenizer import ByteTokenizer
from nemo_fp8_recipes.errors import ConfigError, DataError
from nemo_fp8_recipes.training.data import Wanted
from nemo_fp8_recipes.training.data.megatron_indexed import MegatronIndexedDataset
from nemo_fp8_recipes.training.indexed_schema import MegatronIndexedConfig, read_blend
from tests.training.command import train

pytestmark = pytest.mark.usefixtures("emulated")

SEQ = 16


@pytest.fixture
def one_process() -> object:
    """torch.distributed of one process: Megatron's blends ask for the rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """Files a, b and c: 40 documents each, of one letter and lengths from 5 to 44."""
    for letter in "abc":
        texts = [(Path(letter), letter * (5 + size)) for size in range(40)]
        build(texts, ByteTokenizer(), tmp_path / letter)
    return tmp_path


def dataset(
    corpora: Path, *, train: int = 30, held_out: int = 4, vocab_size: int = 256, **options: object
) -> MegatronIndexedDataset:
    config = MegatronIndexedConfig(**{"split": [80.0, 20.0, 0.0], **options})
    return MegatronIndexedDataset(
        config, seq_length=SEQ, vocab_size=vocab_size, wanted=Wanted(train, held_out)
    )


def letters(sequences: list[torch.Tensor]) -> str:
    return "".join(chr(token) for sequence in sequences for token in sequence.tolist() if token)


@pytest.mark.usefixtures("one_process")
def test_the_sequences_are_those_of_megatrons_dataset(corpora: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    ours = dataset(corpora, blend=[str(corpora / "a")], train=100, seed=7)
    ours.prepare(tmp_path / "run")

    class Tokenizer:
        unique_identifiers = None
        vocab_size, eod, pad = 256, 0, -1

    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=SEQ,
        blend=([str(corpora / "a")], None),
        split="80,20,0",
        path_to_cache=str(tmp_path / "theirs"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    low = IndexedDataset(str(corpora / "a"))
    theirs = GPTDataset(low, str(corpora / "a"), np.arange(32, dtype=np.int32), 100, Split.train, config)
    for number in range(100):
        sequence = ours.train(number)
        assert sequence.shape == (SEQ + 1,)
        assert sequence.dtype == torch.int64
        assert sequence[:-1].tolist() == theirs[number]["tokens"].tolist()
        assert sequence[1:].tolist() == theirs[number]["labels"].tolist()


@pytest.mark.usefixtures("one_process")
def test_blends_follow_their_weights_and_splits_keep_documents_apart(corpora: Path, tmp_path: Path) -> None:
    blend = [0.5, str(corpora / "a"), 0.25, str(corpora / "b"), 0.25, str(corpora / "c")]
    mixed = dataset(corpora, blend=blend, train=200, held_out=8)
    mixed.prepare(tmp_path / "run")
    text = letters([mixed.train(number) for number in range(200)])
    assert [round(text.count(letter) / len(text), 1) for letter in "abc"] == [0.5, 0.2, 0.2]
    apart = dataset(corpora, train_blend=[str(corpora / "a")], valid_blend=[str(corpora / "b")], train=9)
    apart.prepare(tmp_path / "other")
    assert set(letters([apart.train(number) for number in range(9)])) == {"a"}
    assert set(letters([apart.held_out(number) for number in range(4)])) == {"b"}


@pytest.mark.usefixtures("one_process")
def test_a_split_that_the_job_does_not_need_may_be_empty(corpora: Path, tmp_path: Path) -> None:
    """40 documents give none to the default's test split; Megatron would look for one for ever."""
    blend = [0.5, str(corpora / "a"), 0.5, str(corpora / "b")]
    for options in ({"blend": [str(corpora / "a")]}, {"blend": blend}, {"train_blend": blend}):
        one = dataset(corpora, split=[999.0, 0.5, 0.5], held_out=0, **options)
        one.prepare(tmp_path / "run")
        assert len(one.train(29)) == SEQ + 1
    two = dataset(corpora, blend=blend, split=[969.0, 30.0, 1.0], held_out=2)
    two.prepare(tmp_path / "run")
    assert len(two.held_out(1)) == SEQ + 1


@pytest.mark.usefixtures("one_process")
def test_indices_are_built_once_and_not_for_other_content(corpora: Path, tmp_path: Path) -> None:
    options = {"blend": [str(corpora / "a")], "cache": str(tmp_path / "cache")}
    first = dataset(corpora, **options)
    first.prepare(tmp_path / "run")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(files) == 6  # document, sample and shuffle index of two splits
    assert not (tmp_path / "run").exists()
    again = dataset(corpora, **options)
    again.prepare(tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")} == files
    before = [first.train(number).tolist() for number in range(30)]
    assert [again.train(number).tolist() for number in range(30)] == before
    build([(Path("a"), "z" * 60)] * 30, ByteTokenizer(), corpora / "a")  # the same path, other text
    other = dataset(corpora, **options)
    assert other.fingerprint != first.fingerprint
    other.prepare(tmp_path / "run")
    assert set(letters([other.train(number) for number in range(30)])) == {"z"}


@pytest.mark.usefixtures("one_process")
def test_without_compiled_helpers_the_indices_are_the_same(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "megatron.core.datasets.helpers_cpp", reason="Megatron's helpers are not compiled here"
    )
    weighted = [0.7, str(corpora / "a"), 0.3, str(corpora / "b")]
    plain = [str(corpora / letter) for letter in "abc"]

    def drawn(name: str) -> list[list[int]]:
        found = []
        for blend, train_, held in ((weighted, 300, 8), (plain, 40, 4), (plain[:1], 150, 3)):
            one = dataset(corpora, blend=blend, train=train_, held_out=held, cache=str(tmp_path / name))
            one.prepare(tmp_path)
            assert ("numpy" in one.description) == (name == "numpy")
            found += [one.train(number).tolist() for number in range(train_)]
            found += [one.held_out(number).tolist() for number in range(held)]
        return found

    compiled = drawn("compiled")
    monkeypatch.delitem(sys.modules, "megatron.core.datasets.helpers", raising=False)
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)  # an import fails
    assert drawn("numpy") == compiled


def test_index_helpers_equal_the_compiled_ones_also_on_odd_documents() -> None:
    from nemo_fp8_recipes.training.data import index_helpers

    compiled = pytest.importorskip(
        "megatron.core.datasets.helpers_cpp", reason="Megatron's helpers are not compiled here"
    )
    generator = np.random.default_rng(3)
    for _ in range(200):
        sizes = generator.integers(0, 20, size=generator.integers(1, 12)).astype(np.int32)
        epochs, seq, extra = int(generator.integers(1, 4)), int(generator.integers(2, 9)), 1
        documents = generator.permutation(np.tile(np.arange(len(sizes)), epochs)).astype(np.int32)
        if sizes.sum() * epochs <= seq + 1 or sizes.sum() < 2:
            continue
        for drop in (True, False):
            arguments = (sizes, documents, seq, epochs, int(sizes.sum()), drop, extra)
            ours = index_helpers.build_sample_idx_int32(*arguments)
            theirs = compiled.build_sample_idx_int32(*arguments)
            assert ours.dtype == theirs.dtype
            assert ours.tolist() == theirs.tolist(), arguments


@pytest.mark.parametrize(
    ("options", "key", "said"),
    [
        ({"blend": ["missing"]}, "data.blend", "missing.bin"),
        ({"blend": ["a"], "vocab_size": 200}, "model.vocab_size", "a vocabulary of 256"),
        ({"blend": ["a"], "samples": 29}, "data.samples", "less than the job takes: 30"),
        (
            {"blend": ["a"], "split": [1.0, 0.0, 0.0]},
            "data.split",
            "0 documents with 0 tokens to the held-out",
        ),
        ({"train_blend": ["a"]}, "data.valid_blend", "no files for the held-out loss"),
    ],
)
def test_what_cannot_be_trained_on_is_one_clear_error(
    corpora: Path, monkeypatch: pytest.MonkeyPatch, options: dict, key: str, said: str
) -> None:
    monkeypatch.chdir(corpora)
    with pytest.raises(DataError) as caught:
        dataset(corpora, **options)
    assert caught.value.key == key
    assert said in str(caught.value)


@pytest.mark.usefixtures("one_process")
def test_files_that_give_too_little_or_other_tokens_are_refused(corpora: Path, tmp_path: Path) -> None:
    once = dataset(corpora, blend=[str(corpora / "a"), str(corpora / "b")], train=1000)
    with pytest.raises(DataError, match=r"gives its files once: \d+ sequences, and the job takes 1000"):
        once.prepare(tmp_path / "run")
    file = tmp_path / "file"
    file.write_text("")
    unwritable = dataset(corpora, blend=[str(corpora / "a")], cache=str(file))
    with pytest.raises(DataError, match="Cannot keep the indices"):
        unwritable.prepare(tmp_path / "run")
    (corpora / "d.idx").write_bytes(index_bytes(np.array([600]), np.dtype(np.uint16)))
    (corpora / "d.bin").write_bytes(np.full(600, 300, dtype=np.uint16).tobytes())
    foreign = dataset(corpora, blend=[str(corpora / "d")], split=[1.0, 0.0, 0.0], train=3, held_out=0)
    foreign.prepare(tmp_path / "run")
    with pytest.raises(DataError, match="holds token 300, and the model has 256"):
        foreign.train(0)


@pytest.mark.parametrize(
    "words", [[0.3, "a", "b"], [0.3, "a", 0.7], ["a", 0.3], [0.0, "a"], [float("nan"), "a"]]
)
def test_a_blend_without_a_meaning_is_refused(words: list) -> None:
    with pytest.raises(ConfigError, match=r"data\.blend"):
        read_blend("data.blend", words)


def test_blends_are_written_as_megatron_lm_takes_them() -> None:
    assert read_blend("data.blend", ["a", "b"]) == (["a", "b"], None)
    assert read_blend("data.blend", [0.3, "a", 1, "b"]) == (["a", "b"], [0.3, 1.0])
    assert read_blend("data.blend", ["30", "a", "70", "b"]) == (["a", "b"], [30.0, 70.0])


@pytest.mark.slow
def test_a_job_on_token_files_goes_on_from_the_middle_with_the_same_losses(
    corpora: Path, tmp_path: Path
) -> None:
    words = (
        "fp8_recipe=tensorwise",
        "data=megatron_indexed",
        f"data.blend=[0.6,{corpora}/a,0.4,{corpora}/b]",
        "data.split=[80,20,0]",
        "training.eval_batches=1",
        "training.steps=8",
        "training.save_every=3",
        "training.keep_checkpoints=9",
        "telemetry.enabled=false",
    )
    whole = train(tmp_path / "whole", *words)
    assert len(whole.losses) == 8
    assert whole.record["result"]["held_out_loss"] > 0
    assert "megatron_indexed: 2 file(s), 80 documents" in whole.output
    rows = json.loads((whole.path / "manifest.json").read_text())["rows"]
    assert any(row["recipe"] == "tensorwise" for row in rows)
    shutil.copytree(whole.path, tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:06d}")
    index = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/.data_index").rglob("*.npy")}
    assert index
    resumed = train(tmp_path / "run", *words, resume=True)
    assert "after step 3 of 8" in resumed.output
    assert resumed.losses == whole.losses
    assert resumed.record["result"] == whole.record["result"]
    assert {path: path.stat().st_mtime_ns for path in index} == index
