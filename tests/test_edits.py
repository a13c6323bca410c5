import csv
import hashlib
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from peft_locft.data.edits import Edit, Probe, edits_sha256, read_edits

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

FULL = Edit(
    prompt="p",
    target="t",
    rephrasings=("r1", "r2"),
    locality=(Probe("l1", "a1"), Probe("l2", "a2")),
    portability=(Probe("q", "a"),),
    subject="s",
    ground_truth="g",
)
ABOUT = {"subject": "s", "ground_truth": "g"}
PROBES = {"locality_prompt": ["l1", "l2"], "locality_ground_truth": ["a1", "a2"]}
PROBES |= {"portability_prompt": ["q"], "portability_ground_truth": ["a"]}
KINDS: dict[str, Any] = {"portability": {"0": {"prompt": "q", "ground_truth": "a"}}}
KINDS["locality"] = [{"prompt": "l1", "ground_truth": [["a1"]]}, {"prompt": "l2", "ground_truth": [["a2"]]}]
COLUMNS: dict[str, Any] = {"portability": {"prompt": "q", "ground_truth": "a"}}
COLUMNS["locality"] = {"prompt": ["l1", "l2"], "ground_truth": ["a1", "a2"]}
OURS: dict[str, Any] = {"portability": [{"prompt": "q", "answer": "a"}]}
OURS["locality"] = [{"prompt": "l1", "answer": "a1"}, {"prompt": "l2", "answer": "a2"}]
ZSRE: dict[str, Any] = {"loc": ["l1", "l2"], "loc_ans": ["a1", "a2"]}
ZSRE["portability"] = {"Recalled Relation": "(x, y)", "New Question": "q", "New Answer": "a"}
# each says all that FULL says, in another vocabulary
RECORDS: dict[str, dict[str, Any]] = {
    "ours": {"prompt": "p", "target": "t", "rephrasings": ["r1", "r2"]} | ABOUT | OURS,
    "easyedit": {"prompt": "p", "target_new": "t", "rephrase_prompt": ["r1", "r2"]} | ABOUT | PROBES,
    "kinds of probes": {"prompt": "p", "target_new": "t", "rephrase_prompt": ["r1", "r2"]} | ABOUT | KINDS,
    "columns of probes": {"prompt": "p", "target_new": "t", "paraphrase_prompts": ["r1", "r2"]} | ABOUT | COLUMNS,
    "zsre": {"src": "p", "alt": "t", "rephrase": ["r1", "r2"], "subject": "s", "answers": ["g", "alias"]} | ZSRE,
    "trl": {"prompt": "p", "completion": "t", "rephrasings": ["r1", "r2"]} | ABOUT | PROBES,
    "other columns besides": {"src": "p", "alt": "t", "rephrase": ["r1", "r2"], "pred": None, "n": 7} | ABOUT | PROBES,
}
DATASET = datasets.Dataset.from_list([RECORDS["easyedit"]])


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    return path


@pytest.mark.parametrize("name", RECORDS)
def test_every_vocabulary_says_the_same_from_every_source(name: str, tmp_path: Path) -> None:
    record = RECORDS[name]
    dataset = datasets.Dataset.from_list([record])
    dataset.to_parquet(tmp_path / "edits.parquet")
    by_source: dict[str | Path, str] = {
        write(tmp_path, "edits.json", json.dumps([record], indent=1)): "edits.json:2",
        write(tmp_path, "EDITS.JSONL", "\n" + json.dumps(record)): "EDITS.JSONL:2",
        str(tmp_path / "edits.parquet"): "edits.parquet: row 0",
    }
    for source, place in by_source.items():
        assert read_edits(source) == [FULL]
        assert read_edits(source)[0].source == place
    numpy, iterable = dataset.with_format("numpy"), dataset.to_iterable_dataset()
    sources: list[Any] = [dataset, numpy, iterable, [record], iter([record])]
    for in_memory in sources:
        assert read_edits(in_memory) == [FULL]


def test_csv_says_the_same(tmp_path: Path) -> None:
    flat = {"prompt": "p", "target_new": "t", "rephrase": "r", "loc": "l", "loc_ans": "a"} | ABOUT
    empty = dict.fromkeys(flat, "") | {"prompt": 'Who said "Hi,\nyou"?', "target_new": "They"}
    with (tmp_path / "edits.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, flat)
        writer.writeheader()
        writer.writerows([empty, flat])
        file.write("\r\n")
    short, whole = read_edits(tmp_path / "edits.csv")
    assert short == Edit(prompt='Who said "Hi,\nyou"?', target="They")
    assert whole == read_edits([flat])[0]
    assert [edit.source for edit in (short, whole)] == ["edits.csv:2", "edits.csv:4"]


def test_counterfact_as_first_published_and_conversations() -> None:
    rewrite = {"prompt": "{}?", "subject": "s", "target_new": {"str": "t"}, "target_true": {"str": "g", "id": "Q1"}}
    record = {"requested_rewrite": rewrite, "paraphrase_prompts": ["r"], "neighborhood_prompts": ["l1", "l2"]}
    same = {"src": "s?", "alt": "t", "rephrase": "r", "neighbor": ["l1", "l2"], "neighbor_ans": ["g", "g"]} | ABOUT
    assert read_edits([record]) == read_edits([same])
    turns = {"prompt": [{"role": "user", "content": "Who?"}], "completion": [{"role": "assistant", "content": " Me"}]}
    # the space that begins a completion is kept
    assert read_edits([turns]) == [Edit(prompt="Who?", target=" Me", history=())]


@pytest.mark.parametrize("nothing", [None, "", " ", float("nan"), []])
def test_what_is_left_out_is_absent(nothing: object) -> None:
    optional = [*PROBES, *KINDS, *ABOUT, "rephrase", "rephrasings", "loc", "loc_ans", "answers"]
    assert read_edits([{"src": "a", "alt": "b"} | dict.fromkeys(optional, nothing)]) == [Edit(prompt="a", target="b")]
    assert read_edits([{"src": "a", "alt": "b", "loc": ["c"], "loc_ans": nothing}])[0].locality == (Probe("c"),)


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    records = [{"prompt": f"line\n{{{number}, [", "target": "]}"} for number in range(4)]
    indented = json.dumps(records, indent=4)
    lines = [number for number, line in enumerate(indented.split("\n"), start=1) if line.strip() == "{"]
    assert [edit.source for edit in read_edits(write(tmp_path, "a.json", indented))] == [f"a.json:{n}" for n in lines]
    together = write(tmp_path, "b.json", " \r\n[" + ",".join(map(json.dumps, records)) + "]\n")
    assert {edit.source for edit in read_edits(together)} == {"b.json:2"}
    separated = write(tmp_path, "c.jsonl", "\ufeff" + "\r\n\r\n".join(map(json.dumps, records)))
    assert [edit.source for edit in read_edits(separated)] == ["c.jsonl:1", "c.jsonl:3", "c.jsonl:5", "c.jsonl:7"]


def test_edits_in_memory_are_checked_and_named_where_they_have_no_place() -> None:
    named = Edit(prompt="a", target="b", source="here")
    first, second = read_edits([named, Edit(prompt="c", target="d")])
    assert first is named
    assert second.source == "row 1"


def test_splits() -> None:
    splits = datasets.DatasetDict(train=DATASET, test=datasets.Dataset.from_dict({"src": ["a"], "alt": ["b"]}))
    assert read_edits(splits) == [FULL]
    assert read_edits(splits, split="test") == [Edit(prompt="a", target="b")]


def test_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        if name == "owner/nothing":
            raise datasets.exceptions.DatasetNotFoundError(f"{name} does not exist")
        return DATASET

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert read_edits("owner/edits-v1.0", split="test") == [FULL]
    with pytest.raises(FileNotFoundError, match=r"owner/nothing: found neither a file nor a dataset .*does not exist"):
        read_edits("owner/nothing")
    assert asked == [("owner/edits-v1.0", "test"), ("owner/nothing", "train")]
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner", "edits-v1.0", "")
    with pytest.raises(ValueError, match=r"found '.0'; expected one of .json"):
        read_edits("owner/edits-v1.0")
    assert len(asked) == 2, "what is there as a path is not looked for on the Hub"


def test_repeats_become_one_edit_that_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    first = Edit(prompt="a", target="b", rephrasings=("r",), locality=(Probe("p", "q"),), source="x:1")
    again = Edit(prompt="a", target="b", rephrasings=("r", "s"), locality=(Probe("p", "q"), Probe("t")), subject="u")
    with caplog.at_level(logging.INFO, logger="peft_locft.data.edits"):
        (edit,) = read_edits([first, again, first])
    assert edit == again
    assert edit.source == "x:1"
    assert "Read 3 edits; merged them to 1" in caplog.text


CONFLICT = [Edit(prompt=prompt, target=target) for prompt, target in zip("abaac", "xyzxd", strict=True)]


def test_conflicts_are_warned_of_and_kept() -> None:
    with pytest.warns(UserWarning, match=r"1 of 3 prompts(?s:.*)'a': 'x' \(row 0\), 'z' \(row 2\)") as caught:
        edits = read_edits(CONFLICT)
    assert edits == [CONFLICT[0], CONFLICT[1], CONFLICT[2], CONFLICT[4]]
    assert caught[0].filename == __file__


def test_conflicts_can_be_errors_or_settled_by_the_last() -> None:
    with pytest.raises(ValueError, match=r'1 of 3 prompts have several targets(?s:.*)on_conflict="last"'):
        read_edits(CONFLICT, on_conflict="error")
    # "ax" comes first and again after "az": the last word counts
    assert read_edits(CONFLICT, on_conflict="last") == [CONFLICT[0], CONFLICT[1], CONFLICT[4]]


def test_sha256_is_of_what_edits_say() -> None:
    line = b"""\
{"ground_truth": "g", "locality": [{"answer": "a1", "prompt": "l1"}, {"answer": "a2", "prompt": "l2"}], \
"portability": [{"answer": "a", "prompt": "q"}], "prompt": "p", "rephrasings": ["r1", "r2"], "subject": "s", \
"target": "t"}\n"""
    known = hashlib.sha256(line).hexdigest()
    assert edits_sha256([FULL]) == edits_sha256(read_edits([RECORDS["zsre"]])) == known
    others = [Edit(prompt="a", target="b"), Edit(prompt="ab", target="b"), Edit(prompt="a", target="b", subject="b")]
    hashes = {edits_sha256(edits) for edits in ([FULL], others, others[::-1], *([edit] for edit in others))}
    assert len(hashes) == 6


# a file's name, what is in it, and what the message must say
BAD_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "empty file": ("a.jsonl", "\n", "a.jsonl.*: found no records"),
    "empty list": ("a.json", "[]", "found no records"),
    "empty table": ("a.csv", "src,alt\n", "found no records"),
    "other suffix": (
        "a.yaml",
        "a",
        r"a.yaml: found '.yaml'; expected one of .json, .*convert or rename",
    ),
    "archive": ("a.zip", "a", "found '.zip'.*unpack"),
    "broken gzip": ("a.json.gz", "a", "a.json.gz: found a broken gzip file .*expected a whole one"),
    "empty object": ("a.json", "{}", "found no records"),
    "one value": ("a.json", "3", "a.json:1: found a int; expected a list of records"),
    "records without columns": ("a.json", "{}\n{}", "a.json:1: no prompt / target columns recognized"),
    "broken list": ("a.json", '[{},\n {"a": 1}', "a.json:2: found broken JSON at column 10 .*fix it there"),
    "broken line": ("a.jsonl", '{"src": "a", "alt": "b"}\n{"src": b}', "a.jsonl:2: found broken JSON at column 9"),
    "not a record": ("a.json", '[{"src": "a", "alt": "b"},\n3]', r"a.json:2: found 3 \(int\); expected a record"),
    "Cyrillic": (
        "a.csv",
        b"src,alt\n\xe3\xee\xf0,\xc1",
        "a.csv:2: found byte 0xe3 at offset 8; expected UTF",
    ),
    "Japanese": ("a.csv", b"src,alt\nmany letters and,\x93\x8c\x8b\x9e", "a.csv:2: found byte 0x93"),
    "empty JSON": ("a.json", "\ufeff \n", "found no records"),
    "two encodings": (
        "a.csv",
        b"src,alt\na,\xc3\xa9\nb,\xe9",
        "a.csv:3: found byte 0xe9 at offset 15; expected",
    ),
    "no Windows-1252": ("a.csv", b"src,alt\na,abc\x81", "a.csv:2: found byte 0x81 at offset 13; expected UTF-8"),
    "broken UTF-16": ("a.csv", b"\xff\xfea\0,", "found bytes that are not UTF-16, as its first bytes say"),
    "UTF-16 without a mark": ("a.csv", "src,alt".encode("utf-16-le"), "found bytes that are no text"),
    "Excel": ("a.csv", b"PK\x03\x04\xff\x00", "a.csv: found a zip archive or an Excel file; expected text"),
    "the same key twice": (
        "a.json",
        '{"a": "b", "a": "c"}',
        "a.json: found duplicate key 'a'; expected each name once",
    ),
    "short row": ("a.csv", "src,alt\na,b\na\n", "a.csv:3: found 1 cells; expected 2"),
    "long row": ("a.csv", "src,alt\na,b,c\n", "a.csv:2: found 3 cells; expected 2.*quotes"),
    "open quote": ("a.csv", 'src,alt\na,b\n"a,b\n', "a.csv:3: found broken CSV .*unexpected end of data"),
    "doubled column": (
        "a.csv",
        "src,alt,alt\na,b,c\n",
        "found src, alt, alt; expected different column names",
    ),
    "blank cell": ("a.csv", "src,alt\na, \n", r"a.csv:2: field 'alt': found nothing \(''\).*add it"),
    "broken parquet": ("a.parquet", b"PAR1", "a.parquet: found broken Parquet"),
    "unknown columns": (
        "a.csv",
        "ask,tell\na,b",
        r"a.csv:2: no prompt / target columns .* ask, tell; .*ZsRE",
    ),
    "two vocabularies": (
        "a.csv",
        "prompt,target_new,completion\na,b,c",
        "several .*exactly one .*rename or rem",
    ),
    "missing column": ("a.jsonl", '{"src": "a", "alt": "b"}\n{"src": "a"}', "a.jsonl:2: field 'alt': found only src"),
    "no rewrite": ("a.jsonl", '{"requested_rewrite": "a"}', "field 'requested_rewrite': found 'a'; expected prompt"),
    "half a rewrite": ("a.jsonl", '{"requested_rewrite": {"prompt": "a"}}', "target_new.str and target_true.str"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_with_line(name: str, tmp_path: Path) -> None:
    file_name, content, message = BAD_FILES[name]
    with pytest.raises(ValueError, match=message):
        read_edits(write(tmp_path, file_name, content))


# fields that a record {"src": "a", "alt": "b"} is given, and what the message must say
BAD_FIELDS: dict[str, tuple[dict[str, object], str]] = {
    "null target": ({"alt": None}, r"'alt': found nothing \(None\); expected text: add it"),
    "NaN target": ({"alt": float("nan")}, r"'alt': found nothing \(nan\)"),
    "blank prompt": ({"src": "\n"}, "'src': found nothing"),
    "number": ({"src": 12}, r"'src': found 12 \(int\); expected text: write \"12\" with quotes"),
    "record as target": ({"alt": {"id": "b"}}, r"'alt': found .*; expected text, or a record with one of value, str"),
    "infinite": ({"alt": float("inf")}, r"'alt': found inf \(float\); expected text"),
    "half a character": ({"alt": "\ud83d"}, "'alt': unpaired UTF-16 surrogate .*re-export the file as UTF-8"),
    "number as rephrasing": ({"rephrase": ["c", 3]}, "'rephrase': found 3"),
    "answer without question": ({"loc_ans": "c"}, "'loc': found nothing"),
    "fewer answers": ({"loc": ["c", "d"], "loc_ans": ["e"]}, r"'loc_ans': found 2 prompts and \['e'\]; expected one"),
    "one answer for two": ({"loc": ["c", "d"], "loc_ans": "e"}, "'loc_ans': found 2 prompts and 'e'; expected"),
    "number for probes": ({"locality": [3]}, "'locality': found 3 .int.; expected text"),
    "number in a probe": ({"locality": {"kind": [{"prompt": 3, "answer": "c"}]}}, "'locality.kind.prompt': found 3"),
    "two turns": (
        {"alt": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]},
        "'src': found messages with the roles user, assistant, user; expected a conversation whose last two are",
    ),
    "other role": (
        {"src": [{"role": "system", "content": "a"}]},
        "'src': found messages .* system, assistant; expected",
    ),
    "no message": ({"src": ["Who?"]}, "'src': found 'Who\\?'; expected messages such as"),
    "no role": ({"src": [{"content": "Who?"}]}, "'src.role': found nothing"),
    "no content": ({"src": [{"role": "user"}]}, "'src.content': found nothing"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_field_is_named_with_its_record(name: str, tmp_path: Path) -> None:
    given, message = BAD_FIELDS[name]
    content = "\n" + json.dumps({"src": "a", "alt": "b"} | given)
    with pytest.raises(ValueError, match=f"1 of 1 records(?s:.*)a.jsonl:2: field {message}"):
        read_edits(write(tmp_path, "a.jsonl", content))


make_edit: Any = Edit
read_anything: Any = read_edits
BAD_ARGUMENTS: dict[str, tuple[Callable[[], object], str]] = {
    "no file": (lambda: read_edits("nowhere/a.json"), "nowhere/a.json: found no such file; expected a file"),
    "folder": (lambda: read_edits(Path(__file__).parent), "found a folder; expected a file"),
    "on_conflict": (lambda: read_anything([FULL], on_conflict="all"), "found 'all'; expected one of warn, error"),
    "split": (lambda: read_edits(datasets.DatasetDict(test=DATASET)), "found no split 'train', but test; pass split="),
    "number": (lambda: read_anything(7), "source: found 7; expected a path, a dataset, a DataFrame, a list"),
    "bytes": (lambda: read_anything(b"a"), "source: found b'a'; expected a path"),
    "edit without target": (lambda: Edit(prompt="a", target=" "), "field 'target': found nothing"),
    "number as target": (lambda: make_edit(prompt="a", target=3), "field 'target': found 3"),
    "text as rephrasings": (lambda: make_edit(prompt="a", target="b", rephrasings="c"), "expected a tuple of str"),
    "empty rephrasing": (lambda: Edit(prompt="a", target="b", rephrasings=("",)), "'rephrasings': found nothing"),
    "pairs as probes": (lambda: make_edit(prompt="a", target="b", locality=("c", "d")), "expected a tuple of Probe"),
    "number as subject": (lambda: make_edit(prompt="a", target="b", subject=3), "field 'subject': found 3"),
    "probe without prompt": (lambda: Probe(""), "field 'prompt': found nothing"),
    "empty answer": (lambda: Probe("a", ""), "field 'answer': found nothing"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument_is_named(name: str) -> None:
    call, message = BAD_ARGUMENTS[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call()


def test_all_bad_records_are_counted_and_ten_listed(tmp_path: Path) -> None:
    lines = ['{"src": "a", "alt": "b"}', *['{"src": "a"}', '{"src": 3, "alt": "b"}', "{"] * 5]
    with pytest.raises(ValueError, match="15 of 16 records cannot be read") as caught:
        read_edits(write(tmp_path, "a.jsonl", "\n".join(lines)))
    places = [line.split(": ")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert places == [f"a.jsonl:{line}" for line in range(2, 12)]


@pytest.mark.parametrize(("name", "num_conflicts"), [("zsre_3k.json", 0), ("counterfact_3k.json", 7)])
def test_published_data_is_read_whole(name: str, num_conflicts: int) -> None:
    if not (SHARED_DATA / name).is_file():
        pytest.skip(f"{SHARED_DATA / name} is not there")
    assert len(read_edits(SHARED_DATA / name, on_conflict="last")) == 3000 - num_conflicts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if num_conflicts else "error")
        edits = read_edits(SHARED_DATA / name)
    assert len(edits) == 3000
    for edit in edits:
        assert len(edit.rephrasings) == len(edit.locality) == 1 and edit.subject and edit.ground_truth


# ---------------------------------------------------------------------- paraphrases to train on


def test_paraphrases_are_read_and_merged_beside_rephrasings() -> None:
    record = {"prompt": "p", "target": "t", "rephrase": "asked"}
    edits = read_edits([record | {"paraphrases": ["a", "b"]}, record | {"paraphrases": "b"}, record])
    assert [(edit.paraphrases, edit.rephrasings) for edit in edits] == [(("a", "b"), ("asked",))]
    with pytest.raises(ValueError, match=r"field 'paraphrases': found \['a'\]; expected a tuple of str"):
        Edit(prompt="p", target="t", paraphrases=["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="field 'paraphrases': found nothing"):
        Edit(prompt="p", target="t", paraphrases=(" ",))


def test_only_edits_with_paraphrases_have_another_hash_than_before_there_were_any() -> None:
    edit = Edit(
        prompt="The capital of Norway is",
        target="Bergen",
        rephrasings=("Norway's capital is",),
        locality=(Probe("Oslo is"),),
        subject="Norway",
    )
    # of a record that has no such field
    assert edits_sha256([edit]) == "4192c5853949508c4f6d579eac3bbd49819bca0aaa9c9fea2a20ec40c9eaf187"
    hashes = {edits_sha256([replace(edit, paraphrases=texts)]) for texts in ((), ("a",), ("a", "b"), ("b", "a"))}
    assert len(hashes) == 4
