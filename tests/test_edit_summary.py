"""What is said of edits, how they are written in our own form, and how they are split: `locft edits`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_locft.cli import main
from peft_locft.data.edit_split import split_edits
from peft_locft.data.edit_summary import summarize_edits
from peft_locft.data.edit_types import Edit, Probe, fold_case, prompts_of
from peft_locft.data.edits import read_edits
from peft_locft.workflows.edit_files import convert_edits

RECORDS: list[dict[str, Any]] = [
    {"prompt": f"The seat of land {n} is", "target": f"town {n}", "subject": f"land {n}", "rephrase": f"Seat {n}?"}
    | {
        "locality": [
            {"prompt": "who", "answer": "Bo", "aliases": ["B."]},
            {"prompt": f"what {n}", "kind": "unrelated"},
        ]
    }
    | {"portability": [{"prompt": f"Mayor {n}?", "answer": "Ann", "kind": "multi_hop", "language": "de"}]}
    | {"language": "en", "other questions": ["Who would ask that?"]}
    for n in range(20)
]
AGAIN = [RECORDS[3], RECORDS[4] | {"target": "another"}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "in.json").write_text(json.dumps(RECORDS + AGAIN, indent=1))
    return tmp_path / "in.json"


def test_everything_that_was_understood_is_said(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    summary = summarize_edits(file)
    assert (len(summary.edits), summary.num_read) == (21, 22) and caplog.text == ""
    assert summary.num_probes == {"locality": {"": 21, "unrelated": 21}, "portability": {"multi_hop": 21}}
    assert summary.languages == {"en": 21, "de": 21} and summary.left_out == {"other_questions": 22}
    said = str(summary).splitlines()
    assert said[:7] == [
        "in.json: 21 edits, after merging 1 repeat",
        "  rephrasings: 21",
        "  locality: 42 (21 of no named kind, 21 unrelated; 21 with several right answers; 21 without an answer)",
        "  portability: 21 (21 multi_hop)",
        "  subject: of 21 edits",
        "  languages of edits and probes: en 21, de 21",
        "  conflicts: prompts with several targets: 1",
    ]
    assert said[7].startswith("    'The seat of land 4 is': 'town 4' (in.json:") and "'another' (in.json:" in said[7]
    assert said[8:12] == ["  left out:", "    other_questions, in 22 records", "", "3 examples:"]
    assert "    'The seat of land 0 is' -> 'town 0'" in said
    assert "    locality[0]: 'who' -> 'Bo' or 'B.'" in said and "    rephrasings[0]: 'Seat 0?'" in said
    assert "    portability[0] (multi_hop, de): 'Mayor 0?' -> 'Ann'" in said


def test_conflicts_are_settled_as_asked(file: Path) -> None:
    assert len(summarize_edits(file, on_conflict="last").edits) == 20
    with pytest.raises(ValueError, match="1 of 20 prompts have several targets"):
        summarize_edits(file, on_conflict="error")


def test_a_folder_of_files_is_read_together(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("question,object,subject\nWho?,Bo,Cy\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "target": "t"}\n')
    (tmp_path / "notes.md").write_text("none")
    summary = summarize_edits(tmp_path)
    assert [edit.source for edit in summary.edits] == ["a.jsonl:1", "b.csv:2"]
    assert str(summary).splitlines()[-1] == "    'Who?' -> 'Bo'"
    with pytest.raises(FileNotFoundError, match="found a folder; expected a file of edits"):
        summarize_edits(Path(__file__).parent)


def test_the_command_prints_and_writes_what_is_read_back(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = file.parent / "new" / "out.jsonl"
    assert main(["edits", str(file), "--output", str(out), "--on-conflict", "last"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"\n\nwrote 20 edits to {out}\n")
    assert printed.startswith(str(summarize_edits(file, on_conflict="last")))
    assert read_edits(out) == summarize_edits(file, on_conflict="last").edits
    assert main(["edits", str(file), "--output", str(out)]) == 2
    assert f"locft edits: {out} is there. Nothing was changed." in capsys.readouterr().err
    assert len(read_edits(out)) == 20
    assert main(["edits", str(file), "--output", str(out), "--overwrite"]) == 0


def test_bad_input_is_refused_before_anything_is_written(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = file.parent / "out.jsonl"
    bad = file.parent / "bad.json"
    bad.write_text('[{"prompt": "a", "target": null}]')
    calls: dict[tuple[str, ...], str] = {
        (str(bad), "--output", str(out)): "bad.json:1: field 'target': found nothing",
        (str(file), "--split", "0.5"): "output is missing: split writes two files",
        (str(file), "--output", str(out.with_suffix(".csv"))): "expected a name that ends in .jsonl",
        (str(file), "--output", str(out), "--split", "21"): "found 21 for 21 edits; expected a share between 0 and 1",
        (str(file), "--output", str(out), "--split", "2.5"): "split: found 2.5 for 21 edits",
        (str(file), "--output", str(out), "--split", "nan"): "split: found nan for 21 edits",
        (str(file), "--output", str(out), "--split", "0.01"): "split: found 0.01 for 21 edits",
        (str(file.parent / "none.json"),): "found no such file",
    }
    for words, message in calls.items():
        assert main(["edits", *words]) == 2
        assert message in capsys.readouterr().err
    assert sorted(each.name for each in file.parent.iterdir()) == ["bad.json", "in.json"]


def test_a_split_is_two_files_that_share_nothing(file: Path) -> None:
    out = file.parent / "out.jsonl"
    done = convert_edits(file, output=out, split=0.75, seed=1, on_conflict="last")
    train, held_out = (read_edits(each) for each in done.files)
    assert [each.name for each in done.files] == ["out.train.jsonl", "out.held_out.jsonl"]
    assert len(train) == 15 and len(held_out) == 5
    assert sorted(edit.target for edit in train + held_out) == sorted(edit.target for edit in done.summary.edits)
    again = convert_edits(file, output=out, split=15, seed=1, on_conflict="last", overwrite=True)
    assert again.files == done.files and read_edits(out.with_suffix(".train.jsonl")) == train
    other = convert_edits(file, output=out, split=15, seed=2, on_conflict="last", overwrite=True)
    assert other.files != {} and read_edits(out.with_suffix(".train.jsonl")) != train


def test_edits_that_share_a_subject_or_a_trained_question_stay_together() -> None:
    shared = [
        Edit("The seat of Peru is", "Cusco", subject="Peru"),
        Edit("Peru lies in", "Asia", subject="PERU"),
        Edit("A", "b", rephrasings=("the  seat of Peru is ",)),
        Edit("C", "d", portability=(Probe("A"),)),
        Edit("E", "f", source="x:1"),
        Edit("G", "h", source="x:1"),
    ]
    alone = [Edit(f"alone {n}", "x", locality=(Probe("who is asked of all"),)) for n in range(14)]
    edits = [*shared[:2], *alone, *shared[2:]]
    for seed in range(8):
        train, held_out = split_edits(edits, 9, seed=seed)
        assert len(train) in (8, 9) and len(train) + len(held_out) == 20
        trained = {fold_case(edit.prompt) for edit in train}
        assert not trained & {fold_case(prompt) for edit in held_out for prompt in prompts_of(edit)}
        assert {len({*shared[:4]} & {*train}), len({*shared[4:]} & {*train})} <= {0, 2, 4}
        assert [edit for edit in edits if edit in train] == train  # in the order in which they were given
    with pytest.raises(ValueError, match="split: found 1 edits to train on, but at least 2 edits stay together"):
        split_edits(shared[:2] + shared[4:], 1)
