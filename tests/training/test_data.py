"""Datasets and batch plans: order, splits, independence of the number of ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from nemo_fp8_recipes.errors import DataError
from nemo_fp8_recipes.training.data import BatchPlan, MockDataset, StdlibTextDataset
from nemo_fp8_recipes.training.schema import MockConfig, StdlibTextConfig

SEQ = 16


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Twelve small files, of which the third, sixth, … are held out with held_out_every=3."""
    for index in range(12):
        (tmp_path / f"m{index:02d}.py").write_bytes(bytes([65 + index]) * 100)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_bytes(b"!" * 1000)
    (tmp_path / "notes.txt").write_bytes(b"?" * 1000)
    return tmp_path


def text(library: Path, **changes: object) -> StdlibTextDataset:
    config = StdlibTextConfig(**{"path": str(library), "held_out_every": 3, **changes})
    return StdlibTextDataset(config, seq_length=SEQ, vocab_size=256)


def test_every_byte_is_a_label_once_an_epoch(library: Path) -> None:
    dataset = text(library)
    corpus = b"".join(bytes([65 + index]) * 100 for index in range(12) if index % 3 != 2)
    windows = (len(corpus) - 1) // SEQ
    labels = [bytes(dataset.train(number).tolist())[1:] for number in range(windows)]
    expected = [corpus[start * SEQ + 1 : start * SEQ + SEQ + 1] for start in range(windows)]
    assert sorted(labels) == sorted(expected)
    assert labels != expected, "the order is not shuffled"


def test_held_out_files_are_never_trained_on(library: Path) -> None:
    dataset = text(library)
    trained = {byte for number in range(200) for byte in dataset.train(number).tolist()}
    held_out = {byte for number in range(50) for byte in dataset.held_out(number).tolist()}
    assert held_out == {65 + index for index in range(2, 12, 3)}
    assert not trained & held_out
    assert not trained & set(b"!?")


def test_a_sequence_depends_on_its_number_alone(library: Path) -> None:
    forward = text(library)
    in_order = [forward.train(number) for number in range(150)]
    again = text(library)
    for number in (149, 3, 77, 3):  # epochs visited in any order
        assert torch.equal(again.train(number), in_order[number])
    assert forward.fingerprint == again.fingerprint


def test_epochs_and_seeds_have_their_own_order(library: Path) -> None:
    dataset, other = text(library), text(library, seed=5)
    windows = 49
    first = [dataset.train(number).tolist() for number in range(windows)]
    second = [dataset.train(windows + number).tolist() for number in range(windows)]
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != [other.train(number).tolist() for number in range(windows)]
    assert dataset.fingerprint != other.fingerprint


def test_changed_text_changes_the_fingerprint(library: Path) -> None:
    before = text(library).fingerprint
    (library / "m02.py").write_bytes(b"z" * 100)
    assert text(library).fingerprint != before


def test_the_own_standard_library_is_there() -> None:
    dataset = StdlibTextDataset(
        StdlibTextConfig(max_bytes=200_000, held_out_every=5), seq_length=128, vocab_size=256
    )
    sample = b"".join(bytes(dataset.train(number).tolist()) for number in range(100))
    assert sample.count(b"def ") > 5


@pytest.mark.parametrize(
    ("changes", "vocab", "key"),
    [
        ({"path": "/nowhere/at/all"}, 256, "data.path"),
        ({"pattern": "*.nothing"}, 256, "data.path"),
        ({}, 255, "model.vocab_size"),
    ],
)
def test_missing_data_is_one_clear_error(library: Path, changes: dict, vocab: int, key: str) -> None:
    config = StdlibTextConfig(**{"path": str(library), **changes})
    with pytest.raises(DataError) as caught:
        StdlibTextDataset(config, seq_length=SEQ, vocab_size=vocab)
    assert caught.value.key == key


def test_text_shorter_than_a_sequence_is_refused(library: Path) -> None:
    with pytest.raises(DataError, match="less than one sequence"):
        StdlibTextDataset(
            StdlibTextConfig(path=str(library), held_out_every=3), seq_length=5000, vocab_size=256
        )


def test_mock_follows_one_rule_but_for_the_noise() -> None:
    dataset = MockDataset(MockConfig(alphabet=10, noise=0.2), seq_length=200, vocab_size=256)
    successors: dict[int, list[int]] = {}
    for number in range(20):
        tokens = dataset.train(number).tolist()
        for current, following in itertools.pairwise(tokens):
            successors.setdefault(current, []).append(following)
    for following in successors.values():
        most = max(following.count(token) for token in set(following))
        assert 0.7 < most / len(following) < 0.95  # 0.8 by rule, and a tenth of the noise by chance
    assert not torch.equal(dataset.train(0), dataset.held_out(0))
    assert torch.equal(dataset.train(7), dataset.train(7))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_sees_the_same_sequences_on_any_number_of_ranks(ranks: int) -> None:
    plans = [BatchPlan(16, 2, rank, ranks) for rank in range(ranks)]
    seen = sorted(
        number for plan in plans for micro in range(plan.micro_batches) for number in plan.numbers(48, micro)
    )
    assert seen == list(range(48, 64))


def test_batches_are_shifted_by_one(library: Path) -> None:
    plan = BatchPlan(4, 2, 0, 1)
    batches = list(plan.step(text(library).train, 0, "cpu"))
    assert len(batches) == 2
    for batch in batches:
        assert batch["tokens"].shape == batch["labels"].shape == (2, SEQ)
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert batch["position_ids"][0].tolist() == list(range(SEQ))
