"""Which edits an adapter holds, and what becomes of them: no model is trained here."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from tiny_training import EDITS, make_trainer, peft_model

from peft_locft import Edit, Probe, describe_adapter, save_adapter
from peft_locft.adapters import adapter_edits
from peft_locft.data import edit_id, merge_edit_lists
from peft_locft.data.edit_lists import describe_edits, read_lines_to_forget

OSLO = Edit(prompt="The capital of Norway is", target="Bergen")
BERN = Edit(prompt="The capital of  Switzerland is", target="Zürich")
RIGA = Edit(prompt="The capital of Latvia is", target="Liepāja")
KNOWN = [OSLO, BERN, RIGA]


def test_an_id_follows_from_prompt_and_target_alone() -> None:
    expected = hashlib.sha256(json.dumps([BERN.prompt, BERN.target]).encode()).hexdigest()[:12]
    assert edit_id(BERN) == expected
    assert edit_id(Edit(prompt=BERN.prompt, target=BERN.target, rephrasings=("x",), source="a:1")) == expected
    assert edit_id(Edit(prompt=BERN.prompt, target="Genf")) != expected
    # not of the two run together
    assert edit_id(Edit(prompt="a b", target="c")) != edit_id(Edit(prompt="a", target="b c"))


def test_new_edits_are_added_and_replace_known_prompts() -> None:
    tromso = Edit(prompt="The capital  of Norway is", target="Tromsø")
    rome = Edit(prompt="The capital of Italy is", target="Milan")
    plan = merge_edit_lists(KNOWN, [rome, tromso])
    assert (plan.kept, plan.added, plan.replaced, plan.withdrawn) == ([BERN, RIGA], [rome], [tromso], [])
    assert plan.edits == [BERN, RIGA, tromso, rome]
    assert plan.restored_prompts == []
    assert str(plan) == "2 kept, 1 added, 1 replaced, 0 withdrawn"


def test_a_known_edit_that_comes_again_is_kept_with_the_probes_of_both() -> None:
    old = Edit(prompt=OSLO.prompt, target=OSLO.target, rephrasings=("a",), locality=(Probe("p", "q"),))
    new = Edit(prompt=OSLO.prompt, target=OSLO.target, rephrasings=("b",), subject="Norway")
    plan = merge_edit_lists([old, RIGA], [new])
    merged = Edit(
        prompt=OSLO.prompt, target=OSLO.target, rephrasings=("a", "b"), locality=(Probe("p", "q"),), subject="Norway"
    )
    assert plan.edits == plan.kept == [merged, RIGA]


@pytest.mark.parametrize(
    "line",
    [
        edit_id(BERN),
        f"  {edit_id(BERN)}\tanything behind it",
        describe_edits([BERN]),
        BERN.prompt,
        " The capital of Switzerland  is",
    ],
)
def test_an_edit_is_withdrawn_by_its_id_or_prompt(line: str) -> None:
    plan = merge_edit_lists(KNOWN, forget=["", line, line])
    assert (plan.kept, plan.withdrawn) == ([OSLO, RIGA], [BERN])
    assert plan.restored_prompts == [BERN.prompt]


def test_a_prompt_that_another_edit_has_is_not_given_back_to_the_base() -> None:
    twice = [*KNOWN, Edit(prompt=OSLO.prompt, target="Tromsø")]
    one = merge_edit_lists(twice, forget=[edit_id(OSLO)])
    assert one.withdrawn == [OSLO] and one.restored_prompts == []
    both = merge_edit_lists(twice, forget=[OSLO.prompt])
    assert both.withdrawn == [twice[0], twice[3]] and both.restored_prompts == [OSLO.prompt]
    # a newer target takes the place of both
    assert merge_edit_lists(twice, [Edit(prompt=OSLO.prompt, target="Hamar")]).kept == [BERN, RIGA]


def test_lines_that_mean_nothing_are_named_with_the_nearest_edits() -> None:
    near = edit_id(RIGA)[:-1] + "-"
    with pytest.raises(ValueError, match=r"2 lines name no edit of the adapter") as refused:
        merge_edit_lists(KNOWN, forget=["The capital of Norwya is", OSLO.prompt, near])
    said = str(refused.value)
    assert f"'The capital of Norwya is': {edit_id(OSLO)}  'The capital of Norway is'" in said
    assert f"'{near}': {edit_id(RIGA)}  'The capital of Latvia is'" in said
    with pytest.raises(ValueError, match=r"'0 1': nothing near"):
        merge_edit_lists(KNOWN, forget=["0 1"])


def test_a_contradiction_and_an_empty_rest_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'The capital of Norway  is' is withdrawn and also among the new edits"):
        merge_edit_lists(KNOWN, [Edit(prompt="The capital of Norway  is", target="Hamar")], [edit_id(OSLO)])
    with pytest.raises(ValueError, match=r"it withdraws all 3 edits, so none would be left"):
        merge_edit_lists(KNOWN, forget=map(edit_id, KNOWN))


def test_lines_to_forget_are_read(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\n  two\n")
    assert read_lines_to_forget(file) == read_lines_to_forget(str(file)) == read_lines_to_forget(["one ", "", "two"])
    file.write_text("\n \n")
    with pytest.raises(ValueError, match=r"forget: .*ids\.txt names no edit"):
        read_lines_to_forget(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"ids\.txt:1: found byte 0xff at offset 0; expected UTF-8"):
        read_lines_to_forget(file)
    with pytest.raises(FileNotFoundError):
        read_lines_to_forget(tmp_path / "none.txt")


def test_held_edits_are_those_that_the_adapter_was_trained_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", edits=EDITS[:5], num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match=r"out ships no edits, so .*`locft train --trained_edits FILE`"):
        adapter_edits(tmp_path / "out")
    # the file of which it took the first five
    assert adapter_edits(tmp_path / "out", EDITS) == EDITS[:5]
    with pytest.raises(
        ValueError, match=r"trained_edits: found 4 edits, the first 4 with .*; expected the 5 edits that"
    ):
        adapter_edits(tmp_path / "out", EDITS[:4])
    with pytest.raises(ValueError, match=r"trained_edits: found 7 edits, the first 5 with (the )?sha256 \w{16}…"):
        adapter_edits(tmp_path / "out", EDITS[1:])
    describe_adapter(tmp_path / "out", edits=EDITS[:5])
    assert adapter_edits(tmp_path / "out") == EDITS[:5]


def test_an_adapter_without_a_record_cannot_vouch_for_a_file(tmp_path: Path) -> None:
    save_adapter(peft_model(), tmp_path, edits=KNOWN)
    assert adapter_edits(tmp_path) == KNOWN
    with pytest.raises(ValueError, match=r"does not record which edits it was trained on"):
        adapter_edits(tmp_path, KNOWN)


def test_the_list_has_a_line_for_each_edit_whatever_is_in_it() -> None:
    lines = describe_edits([OSLO, Edit(prompt="two\nlines \x1b[2J", target="x")]).split("\n")
    assert lines[0] == f"{edit_id(OSLO)}  'The capital of Norway is' -> 'Bergen'"
    assert re.fullmatch(r"[0-9a-f]{12}  'two\\nlines \\x1b\[2J' -> 'x'", lines[1])
    assert len(lines) == 2
