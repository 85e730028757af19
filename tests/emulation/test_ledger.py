"""The record of changes, and taking them back."""

from __future__ import annotations

import types

from nemo_fp8_recipes.emulation.ledger import PatchLedger


class Parent:
    inherited = "parent"


class Child(Parent):
    own = "child"


def test_what_was_there_comes_back_and_what_was_inherited_is_inherited_again() -> None:
    class Sample(Child):
        own = "sample"

    ledger = PatchLedger()
    ledger.set(Sample, "own", 1, "a reason")
    ledger.set(Sample, "inherited", 2, "a reason")
    ledger.set(Sample, "new", 3, "a reason")
    assert (Sample.own, Sample.inherited, Sample.new) == (1, 2, 3)  # type: ignore[attr-defined, comparison-overlap]
    ledger.undo()
    assert (Sample.own, Sample.inherited) == ("sample", "parent")
    assert set(vars(Sample)) & {"own", "inherited", "new"} == {"own"}
    assert len(ledger) == 0


def test_two_changes_of_one_name_are_undone_in_reverse() -> None:
    module = types.ModuleType("sample")
    module.value = 0  # type: ignore[attr-defined]
    ledger = PatchLedger()
    ledger.set(module, "value", 1, "first")
    ledger.set(module, "value", 2, "second")
    ledger.undo()
    assert module.value == 0


def test_items_and_other_changes_are_undone() -> None:
    mapping = {"kept": 1}
    undone = []
    ledger = PatchLedger()
    ledger.put(mapping, "kept", 2, "a reason", called="mapping")
    ledger.put(mapping, "added", 3, "a reason", called="mapping")
    ledger.add("something else", "a reason", lambda: undone.append(True))
    assert [patch.target for patch in ledger] == ["mapping['kept']", "mapping['added']", "something else"]
    ledger.undo()
    assert mapping == {"kept": 1}
    assert undone == [True]


def test_the_list_names_modules_and_classes_by_import_path() -> None:
    import json.decoder

    ledger = PatchLedger()
    ledger.set(json.decoder, "sample", 1, "a reason")
    ledger.set(json.decoder.JSONDecoder, "sample", 1, "another reason")
    assert [(patch.target, patch.reason) for patch in ledger] == [
        ("json.decoder.sample", "a reason"),
        ("json.decoder.JSONDecoder.sample", "another reason"),
    ]
    ledger.undo()
