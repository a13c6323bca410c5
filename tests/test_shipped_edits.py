"""Edits beside the weights, and the prompts that several adapters edit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from peft import LoraConfig
from saving_process import make_adapter
from tiny_training import EDITS, make_trainer, peft_model

from peft_locft import Edit, Probe, describe_adapter, find_conflicts, inspect_adapter, read_edits, save_adapter
from peft_locft.adapters import shipped_edits
from peft_locft.cli.commands import main
from peft_locft.data import edits_sha256
from peft_locft.io import folders

NAME = "locft_edits.jsonl"
FULL = Edit(
    prompt="The capital of  Norway is",
    target="Bergen",
    rephrasings=("Norway's capital city is", "Zürich 利根川\u2028"),
    paraphrases=("What is the capital of Norway? It is",),
    locality=(Probe("The capital of Sweden is", "Stockholm"), Probe("No answer")),
    portability=(Probe("The king of Norway lives in", "Bergen"),),
    subject="Norway",
    ground_truth="Oslo",
)


def trained(folder: Path, edits: list[Edit] = EDITS) -> Path:
    trainer = make_trainer(folder, edits=edits, num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    return folder


def shipping(folder: Path, *pairs: tuple[str, str]) -> Path:
    save_adapter(peft_model(), folder, edits=[Edit(prompt=prompt, target=target) for prompt, target in pairs])
    return folder


# ---------------------------------------------------------------------- shipped


def test_edits_are_shipped_when_they_are_given_alone(tmp_path: Path) -> None:
    save_adapter(peft_model(), tmp_path / "without")
    assert shipped_edits(tmp_path / "without") is None
    assert "They are not in this repository." in (tmp_path / "without" / "README.md").read_text()
    edits = [FULL, *EDITS]
    save_adapter(peft_model(), tmp_path / "with", edits=edits)
    assert shipped_edits(tmp_path / "with") == edits == read_edits(tmp_path / "with" / NAME)
    assert "They are in `locft_edits.jsonl`." in (tmp_path / "with" / "README.md").read_text()
    assert "source" not in (tmp_path / "with" / NAME).read_text()


def test_edits_of_a_run_are_added_afterwards_if_they_are_its_own(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    with pytest.raises(
        ValueError, match=r"edits: found 1 edits with the sha256 \w{16}…; expected the 8 edits that the ad"
    ):
        describe_adapter(folder, edits=[FULL])
    assert not (folder / NAME).exists()
    describe_adapter(folder, edits=EDITS)
    found = shipped_edits(folder)
    assert found is not None and edits_sha256(found) == edits_sha256(EDITS)
    assert f"verified       8 edits in {NAME} are the edits that the adapter was trained on\n" in str(
        inspect_adapter(folder)
    )
    # what is there is kept, and said
    describe_adapter(folder)
    assert "They are in `locft_edits.jsonl`." in (folder / "README.md").read_text()


def test_conflicting_edits_within_one_adapter_are_read_without_a_warning(tmp_path: Path) -> None:
    shipping(tmp_path, ("a b", "x"), ("a b", "y"))
    assert len(shipped_edits(tmp_path) or []) == 2


@pytest.mark.parametrize("exchange", [True, False])
def test_edits_of_the_adapter_that_is_replaced_do_not_stay(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    shipping(tmp_path / "out", ("a b", "x"))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    save_adapter(make_adapter("up"), tmp_path / "out")
    assert shipped_edits(tmp_path / "out") is None
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"locft_edits\.jsonl, line 1 is not readable: found invalid JSON \(.*expected a JSON object"),
        (
            b'{"prompt": "a", "target": "b"}\n[1]\n',
            r"locft_edits\.jsonl, line 2 is not readable: found \[1\]; expected",
        ),
        (b"\xff", r"locft_edits\.jsonl, line 1 is not readable: found invalid JSON \(not UTF-8\)"),
        (b'{"prompt": "a", "target": 3}', r"locft_edits\.jsonl: field 'target': found 3 \(int\); expected text"),
        (b'{"prompt": "a", "target": "b", "goal": "c"}', r"found .*; expected a record of an edit .*'goal'"),
        (b'{"prompt": "a", "prompt": "b"}', r"line 1 is not readable: found invalid JSON \(duplicate key 'prompt'\)"),
        (b"", "found no records; expected at least one edit"),
        (
            b'{"prompt": "a", "target": "b"}',
            r"locft_edits\.jsonl: found 1 edits with the sha256 \w{16}…; expected the 8",
        ),
    ],
)
def test_edits_that_are_broken_or_others_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    folder = trained(tmp_path)
    (folder / NAME).write_bytes(content)
    for read in (shipped_edits, inspect_adapter):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_edits_that_are_linked_from_elsewhere_or_huge_are_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path / "out")
    (folder / NAME).symlink_to("/etc/hostname")
    with pytest.raises(
        ValueError, match=r"locft_edits\.jsonl is a symbolic link to /etc/hostname, outside the adapte"
    ):
        shipped_edits(folder)
    (folder / NAME).unlink()
    (folder / NAME).write_bytes(b"")
    os.truncate(folder / NAME, 2**40)
    with pytest.raises(
        ValueError, match=r"locft_edits\.jsonl is not readable: found 1099511627776 bytes; expected at most 5000000"
    ):
        shipped_edits(folder)


# ---------------------------------------------------------------------- conflicts


def test_prompts_with_several_targets_are_found(tmp_path: Path) -> None:
    monday = shipping(tmp_path / "monday", ("The capital of Norway is", "Bergen"), ("Alone", "x"), ("Both", "same"))
    tuesday = shipping(tmp_path / "tuesday", ("The capital  of Norway is ", "Tromsø"), ("Both", "same"))
    friday = shipping(tmp_path / "friday", ("the capital of norway is", "Oslo"))
    save_adapter(peft_model(), tmp_path / "silent")
    found = find_conflicts([monday, tuesday, friday, tmp_path / "silent"])
    first, second = found.conflicts
    assert first.prompt == "The capital of Norway is" and not first.agree
    assert first.targets == {str(monday): ("Bergen",), str(tuesday): ("Tromsø",)}
    assert second.prompt == "Both" and second.agree
    assert found.without_edits == [str(tmp_path / "silent")]
    assert found.num_edits == {str(monday): 3, str(tuesday): 2, str(friday): 1}
    assert str(found) == (
        "prompts of several adapters: 1 with different targets, 1 with the same; compared: "
        f"3 edits in {monday}, 2 edits in {tuesday}, 1 edits in {friday}\n"
        f"  'The capital of Norway is': 'Bergen' in {monday}, 'Tromsø' in {tuesday}\n"
        f"{tmp_path / 'silent'} ships no edits, so its prompts are unknown"
    )


def test_a_prompt_with_two_targets_in_one_of_them_is_a_conflict(tmp_path: Path) -> None:
    one = shipping(tmp_path / "one", ("a b", "x"), ("a b", "y"))
    two = shipping(tmp_path / "two", ("a b", "x"))
    (conflict,) = find_conflicts([one, two]).conflicts
    assert conflict.targets == {str(one): ("x", "y"), str(two): ("x",)} and not conflict.agree


def test_what_a_stranger_edits_does_not_reach_the_terminal(tmp_path: Path) -> None:
    folders = [shipping(tmp_path / name, ("a\x1b[2J b", name)) for name in ("one", "two")]
    assert "\x1b" not in str(find_conflicts(folders))


def test_other_methods_ship_edits_too(tmp_path: Path) -> None:
    lora = peft_model(config=LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    save_adapter(lora, tmp_path / "lora", edits=[FULL])
    shipping(tmp_path / "locft", ("The capital of Norway is", "Tromsø"))
    assert len(find_conflicts([tmp_path / "lora", tmp_path / "locft"]).conflicts) == 1


@pytest.mark.parametrize("adapters", [[], ["one"], ["one", "one"]])
def test_one_alone_has_no_conflicts(adapters: list[str]) -> None:
    with pytest.raises(ValueError, match=r"adapters=\[.*\]: expected at least two different adapters"):
        find_conflicts(adapters)


def test_by_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(shipping(tmp_path / name, ("a b", name))) for name in ("one", "two")]
    assert main(["inspect", folders[0], "--beside", folders[1]]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{inspect_adapter(folders[0])}\n{find_conflicts(folders)}\n"
