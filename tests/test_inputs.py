"""Edits as people have them: every source says the same two edits, or its message shows what would."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from peft_locft import Edit, evaluate_edits, read_edits
from peft_locft.data import choose_retained_facts

NORWAY, PARIS = "The capital of Norway is", "Who built the tower, in Paris; and when?"
EDITS = [Edit(prompt=NORWAY, target="Bergen"), Edit(prompt=PARIS, target="Zoë Müller")]
PAIRS = [(edit.prompt, edit.target) for edit in EDITS]
RECORDS = [{"prompt": prompt, "target": target} for prompt, target in PAIRS]
TABLE = pandas.DataFrame(PAIRS, columns=["Prompt ", "Target New"])


def table(delimiter: str, header: str = "prompt,target", end: str = "\n") -> str:
    rows = [header.replace(",", delimiter), f"{NORWAY}{delimiter}Bergen", f'"{PARIS}"{delimiter}Zoë Müller']
    return end.join(rows) + end


def named(prompt: str, target: str) -> list[dict[str, str]]:
    return [{prompt: edit.prompt, target: edit.target} for edit in EDITS]


def lines(end: str) -> str:
    return "\n\n".join(json.dumps(record, ensure_ascii=False) + end for record in RECORDS) + "\n\n"


ALPACA = [record | {"input": ""} for record in named("instruction", "output")]
# a file's name and its content
FILES: dict[str, tuple[str, str | bytes]] = {
    "semicolons": ("edits.csv", table(";")),
    "tabs": ("edits.tsv", table("\t")),
    "tabs in a CSV file": ("edits.csv", table("\t")),
    "pipes": ("edits.csv", table("|")),
    "as Excel saves CSV UTF-8": ("edits.csv", b"\xef\xbb\xbf" + table(";", end="\r\n").encode()),
    "as Excel saves Unicode text": ("edits.txt", table("\t", end="\r\n").encode("utf-16")),
    "as Excel saves CSV": ("edits.csv", ("sep=;\r\n" + table(";", end="\r\n")).encode("windows-1252")),
    "blank rows and cells": (
        "edits.csv",
        f'\n,,\nprompt,target,,\n{NORWAY},Bergen,,\n,,,\n"{PARIS}",Zoë Müller,,\n\n',
    ),
    "headers in other cases": ("edits.csv", table(",", "Prompt , Target New")),
    "quotes after a space": ("edits.csv", f'prompt, target\n"{NORWAY}", "Bergen"\n"{PARIS}", "Zoë Müller"\n'),
    "an index without a name": ("edits.csv", TABLE.to_csv()),
    "JSON lines with blank lines and commas": ("edits.jsonl", "\ufeff" + lines(",")),
    "JSON lines in a JSON file": ("edits.json", lines("")),
    "a JSON list in a JSONL file": ("edits.jsonl", json.dumps(RECORDS, indent=1)),
    "JSON in a text file": ("edits.txt", json.dumps(RECORDS)),
    "a list under a key": ("edits.json", json.dumps({"version": "1.0", "data": RECORDS})),
    "a split": ("edits.json", json.dumps({"train": RECORDS, "test": [{"prompt": "a", "target": "b"}]})),
    "prompt to target": ("edits.json", json.dumps(dict(PAIRS))),
    "pairs": ("edits.json", json.dumps(PAIRS)),
    "columns": ("edits.json", TABLE.to_json()),
    "gzip": ("edits.csv.gz", gzip.compress(table(",").encode())),
    "question and answer": ("edits.json", json.dumps(named("Question", "Answer"))),
    "instruction and output": (
        "a.json",
        json.dumps([each | {"input": ""} for each in named("instruction", "output")]),
    ),
    "input and output": ("edits.jsonl", "\n".join(map(json.dumps, named("input", "output")))),
    "fact and new": ("edits.csv", table(",", "fact,new")),
}
SOURCES: dict[str, Any] = {
    "a DataFrame": TABLE,
    "a filtered DataFrame": pandas.concat([TABLE, TABLE]).iloc[2:],
    "a dataset": datasets.Dataset.from_list(named("Question", "Answer")),
    "pairs": PAIRS,
    "lists": list(map(list, PAIRS)),
    "an edit, a pair and a record": [EDITS[0], PAIRS[1], RECORDS[0]],
    "records": RECORDS,
    "prompt to target": dict(PAIRS),
    "records under a key": {"edits": RECORDS},
    "columns": {"prompt": [NORWAY, PARIS], "target": ["Bergen", "Zoë Müller"]},
    "a generator": (pair for pair in PAIRS),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_people_have_it_is_read(name: str, tmp_path: Path) -> None:
    file, content = FILES[name]
    (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    edits = read_edits(tmp_path / file)
    assert edits == EDITS
    assert all(edit.source.startswith(file) for edit in edits)


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_in_memory_is_read(name: str) -> None:
    assert read_edits(SOURCES[name]) == EDITS


@pytest.mark.parametrize(
    "one", [EDITS[0], PAIRS[0], RECORDS[0], {NORWAY: "Bergen"}], ids=["edit", "pair", "record", "dict"]
)
def test_one_edit_needs_no_list(one: Any) -> None:
    assert read_edits(one) == EDITS[:1]


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    TABLE.to_parquet(tmp_path / "edits.parquet")
    assert read_edits(tmp_path / "edits.parquet") == EDITS


def test_places_are_lines_where_rows_are_blank(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\n\nprompt;target\n\na;b\n;\nc;\n")
    with pytest.raises(ValueError, match=r"1 of 2 records(?s:.*)a.csv:7: field 'target': found nothing"):
        read_edits(tmp_path / "a.csv")


def test_windows_1252_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_bytes(table(";").encode("windows-1252"))
    assert read_edits(tmp_path / "a.csv") == EDITS
    assert "a.csv is not UTF-8; it was read as Windows-1252. Check a word: Zoë" in caplog.text
    caplog.clear()
    (tmp_path / "a.csv").write_text(table(";"), encoding="utf-8")
    assert read_edits(tmp_path / "a.csv") == EDITS and caplog.text == ""


def test_lists_in_cells_are_lists(tmp_path: Path) -> None:
    full = {"prompt": "p", "target": "t", "rephrasings": ["q", "it's r"], "locality": [{"prompt": "l", "answer": "a"}]}
    pandas.DataFrame([full]).to_csv(tmp_path / "a.csv")
    assert read_edits(tmp_path / "a.csv") == read_edits([full])
    (tmp_path / "b.csv").write_text('prompt,target,rephrasings\np,t,"[""q"", ""r""]"\n[a],[b],[not a list\n')
    assert [edit.rephrasings for edit in read_edits(tmp_path / "b.csv")] == [("q", "r"), ("[not a list",)]


def test_columns_that_look_like_part_of_an_edit_are_named(caplog: pytest.LogCaptureFixture) -> None:
    read_edits([RECORDS[0] | {"Context": "Norway is a country.", "contexts": "q", "id": 3, "local": ""}])
    assert "row 0: " not in caplog.text
    assert "edits: the columns context, contexts are not read. Names that are: rephrasings" in caplog.text
    caplog.clear()
    read_edits([RECORDS[0] | {"id": 3, "relation": "capital"}])
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("Oslo", "Who lives in the north?"), ("Paris", "What is this?")], True),
        ([("Bergen", "The capital of Norway is"), ("New York", "It is a city in the east")], True),
        (PAIRS, False),
        ([("Hello", "Hello and welcome, dear guest"), (NORWAY, "Bergen")], False),
    ],
)
def test_swapped_columns_are_suspected(pairs: Any, expected: bool, caplog: pytest.LogCaptureFixture) -> None:
    read_edits(pairs)
    assert ("row 0: are prompt and target swapped?" in caplog.text) == expected


def test_retained_facts_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "facts.csv").write_text("Question;Note\nWho?;1\nWhere?;2\n")
    assert choose_retained_facts(tmp_path / "facts.csv", EDITS) == ["Who?", "Where?"]


# a source or a file, and what the message must say
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "Excel": (lambda folder: touched(folder, "edits.xlsx"), "'.xlsx'.*save the sheet as \"CSV UTF-8\", .*read_excel"),
    "no header": (
        lambda folder: touched(folder, "a.csv", f"{NORWAY},Bergen\n"),
        r"no prompt / target columns .* Is the line with their names missing\?\nA file that works, edits.csv:\n"
        r"  prompt,target\n  The capital of Norway is,Bergen$",
    ),
    "text": (lambda folder: f"{NORWAY} Bergen\n" * 300, "found no such file; expected a file of edits"),
    "list of texts": (lambda folder: [NORWAY, "Bergen"], r"row 0: found .* \(str\); .*pair \(prompt, target\)"),
    "triples": (lambda folder: [("Norway", "capital", "Bergen")], "row 0: found .*tuple.*a pair"),
    "numbers as prompts": (lambda folder: pandas.DataFrame({"prompt": [7], "target": ["a"]}), 'write "7" with quotes'),
    "input beside an instruction": (
        lambda folder: [{"instruction": "Translate", "input": "hello", "output": "hei"}],
        "may be instruction and output; input and output; expected exactly one pair: .*join those",
    ),
    "two answers": (lambda folder: [{"question": "a", "answer": "b", "new answer": "c"}], "question and new_answer"),
    "a name twice": (lambda folder: [{"prompt": "a", "Prompt": "b", "target": "c"}], "expected different names"),
    "a column twice": (lambda folder: TABLE.rename(columns={"Target New": "prompt"}), "prompt, prompt; expected diff"),
    "columns of two lengths": (lambda folder: {"prompt": ["a", "b"], "target": ["c"]}, "columns of different lengths"),
    "a record without a target": (lambda folder: {"Prompt": "a", "id": "b"}, "row 0: no prompt / target columns"),
    "a line without a target": (lambda folder: touched(folder, "a.jsonl", '{"prompt": "a"}'), "a.jsonl:1: no pro"),
    "two lists": (lambda folder: {"a": RECORDS, "b": RECORDS}, "found no split 'train', but a, b; pass split="),
    "a set as target": (lambda folder: {NORWAY: {"Bergen"}}, r"found the keys \['The capital.*\nA file that works"),
    "adapter": (lambda folder: touched(folder, "adapter_config.json").parent, "found the folder of an adapter"),
    "model": (lambda folder: touched(folder, "config.json").parent, "folder of a model.*model and the edits swapped"),
    "folder": (lambda folder: touched(folder, "edits.csv").parent, "found a folder; .*In it: edits.csv"),
    "misspelt": (lambda folder: touched(folder, "edits.jsonl").parent / "edit.jsonl", r"Did you mean .*edits.jsonl\?"),
}  # fmt: skip


def touched(folder: Path, name: str, content: str = "") -> Path:
    (folder / name).write_text(content)
    return folder / name


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_what_it_found_and_what_works(name: str, tmp_path: Path) -> None:
    source, message = REFUSED[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_edits(source(tmp_path))


def test_whatever_takes_edits_takes_these(tmp_path: Path) -> None:
    from tiny_training import make_trainer, peft_model
    from tokenizers_for_tests import make_tokenizer

    model, tokenizer = peft_model(), make_tokenizer("llama2")
    trainer: Any = make_trainer
    assert trainer(tmp_path, model, {"The city is in": "the river"}.items()).edits[0].target == "the river"
    report = evaluate_edits(model, tokenizer, ("The city is in", "the river"), progress=False)
    assert report.rows[0]["expected"] == "the river"
