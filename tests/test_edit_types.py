"""The classes of edits and probes: checks, hashes, records, and which texts are the same."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from peft_locft import Edit, Probe, read_edits
from peft_locft.data import Message, edits_sha256
from peft_locft.data.edit_types import edit_lines, fold_case, prompt_identity, prompts_of, same_text, without_questions

EVERYTHING = Edit(
    "The capital of Norway is",
    "Bergen",
    aliases=("Bjørgvin", "the city of Bergen"),
    rephrasings=("Norway's capital city is",),
    paraphrases=("Norway is ruled from",),
    locality=(Probe("The capital of Peru is", "Lima", aliases=("Ciudad de Lima",), kind="same_relation"),),
    portability=(Probe("The mayor of Norway's capital is", "Marit", kind="multi_hop"), Probe("In which land?")),
    belief=(
        Probe("Is Bergen the capital of Norway?", "yes", kind="yes_no", choices=("yes", "no")),
        Probe("Which? A. Oslo B. Bergen", "B", kind="multiple_choice", choices=("A", "B")),
    ),
    cross_lingual=(Probe("挪威的首都是", "卑尔根", language="zh"),),
    sub_questions=(Probe("On which coast does the capital lie?", "the west coast"),),
    subject="Norway",
    relation="capital",
    ground_truth="Oslo",
    language="en",
)


def test_every_field_is_written_and_read_back(tmp_path: Path) -> None:
    chat = Edit("Who rules?", "Ann", history=(Message("system", "Be brief."),), language="en")
    plain = Edit(" The capital of Peru  is ", " Cusco ")  # as it was written
    file = tmp_path / "edits.jsonl"
    file.write_text(edit_lines([EVERYTHING, chat, plain]), encoding="utf-8")
    assert read_edits(file) == [EVERYTHING, chat, plain]
    assert edits_sha256(read_edits(file)) == edits_sha256([EVERYTHING, chat, plain])
    assert json.loads(edit_lines([plain])) == {"prompt": " The capital of Peru  is ", "target": " Cusco "}


def test_the_hash_of_an_edit_without_the_later_fields_is_what_it_was() -> None:
    edit = Edit("p", "t", rephrasings=("r",), locality=(Probe("l", "a"), Probe("m")), subject="s")
    probes = [{"prompt": "l", "answer": "a"}, {"prompt": "m", "answer": None}]
    line: dict[str, Any] = {"prompt": "p", "target": "t", "rephrasings": ["r"], "locality": probes, "portability": []}
    line |= {"subject": "s", "ground_truth": None}

    def sha256(line: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(line, sort_keys=True).encode() + b"\n").hexdigest()

    assert edits_sha256([edit]) == sha256(line)
    chat = Edit("p", "t", history=(Message("system", "h"),), paraphrases=("q",))
    other = line | {"rephrasings": [], "locality": [], "subject": None, "paraphrases": ["q"]}
    assert edits_sha256([chat]) == sha256(other | {"history": [{"role": "system", "content": "h"}]})


LATER: dict[str, Any] = {"aliases": ("x",), "relation": "x", "language": "en"}
LATER |= dict.fromkeys(("belief", "cross_lingual", "sub_questions"), (Probe("x"),))


@pytest.mark.parametrize("name", LATER)
def test_every_later_field_counts_in_the_hash(name: str) -> None:
    assert edits_sha256([Edit("p", "t", **{name: LATER[name]})]) != edits_sha256([Edit("p", "t")])


DETAILS: dict[str, Any] = {"aliases": ("b",), "kind": "yes_no", "choices": ("a", "b"), "language": "en"}


@pytest.mark.parametrize("name", DETAILS)
def test_every_detail_of_a_probe_counts_in_the_hash(name: str) -> None:
    probe = Probe("q", "a", **{name: DETAILS[name]})
    assert edits_sha256([Edit("p", "t", belief=(probe,))]) != edits_sha256([Edit("p", "t", belief=(Probe("q", "a"),))])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "aliases as text": ({"aliases": "b"}, r"field 'aliases': found 'b'; expected a tuple of str"),
    "an empty alias": ({"aliases": ("",)}, r"field 'aliases': found nothing"),
    "choices without the answer": ({"choices": ("b", "c")}, r"field 'choices': .* without the answer 'a'"),
    "kind": ({"kind": None}, r"field 'kind': found None; expected text, or ''"),
    "language": ({"language": ""}, r"field 'language': found nothing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_probe_is_checked(name: str) -> None:
    fields, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        Probe("q", "a", **fields)


def test_aliases_need_an_answer_and_probes_are_probes() -> None:
    with pytest.raises(ValueError, match=r"field 'aliases': found \('b',\) without an answer; expected both"):
        Probe("q", aliases=("b",))
    wrong: dict[str, Any] = {"belief": ("Is it?",)}
    with pytest.raises(ValueError, match=r"field 'belief': found \('Is it\?',\); expected a tuple of Probe"):
        Edit("p", "t", **wrong)
    wrong = {"relation": 17}
    with pytest.raises(ValueError, match=r"field 'relation': found 17 \(int\); expected text"):
        Edit("p", "t", **wrong)


def test_right_answers_and_prompts() -> None:
    assert EVERYTHING.right_answers == ("Bergen", "Bjørgvin", "the city of Bergen")
    assert EVERYTHING.locality[0].right_answers == ("Lima", "Ciudad de Lima") and Probe("q").right_answers == ()
    assert "挪威的首都是" in set(prompts_of(EVERYTHING)) and len(list(prompts_of(EVERYTHING))) == 10
    assert list(prompts_of(without_questions(EVERYTHING))) == [EVERYTHING.prompt, *EVERYTHING.paraphrases]


SAME = {
    "a space at the end": ("It is", "It is "),
    "spaces between": ("It is", "It   is"),
    "tab and line break": ("It is here", "It\tis\r\nhere"),
    "no-break space": ("It is", "It\u00a0is"),
    "narrow no-break and ideographic spaces": ("It is so", "It\u202fis\u3000so"),
    "composed and decomposed": ("Café", unicodedata.normalize("NFD", "Café")),
    "hangul": ("서울", unicodedata.normalize("NFD", "서울")),
    "vietnamese": ("Việt Nam", unicodedata.normalize("NFD", "Việt Nam")),
    "two marks in another order": ("a\u0323\u0302", "a\u0302\u0323"),
    "ångström sign": ("5 Å", "5 \u212b"),
    "byte order mark": ("It is", "\ufeffIt is"),
    "zero-width space": ("It is", "It is\u200b"),
    "soft hyphen": ("capital", "capi\u00adtal"),
    "mark of direction": ("\u05d0\u05d1", "\u200f\u05d0\u05d1"),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_text_in_other_bytes_is_the_same_prompt_and_target(name: str) -> None:
    one, other = SAME[name]
    assert one != other and same_text(one) == same_text(other) and fold_case(one.upper()) == fold_case(other)
    with pytest.raises(ValueError, match="1 of 1 prompts have several targets"):
        read_edits([(one, "a"), (other, "b")], on_conflict="error")
    assert [edit.target for edit in read_edits([(one, "a"), (other, "b")], on_conflict="last")] == ["b"]
    assert read_edits([("p", one), ("p", other)], on_conflict="error") == [Edit("p", one)]
    messages = [Message("system", one)], [Message("system", other)]
    of_chats = {prompt_identity(Edit("p", "t", history=tuple(history))) for history in messages}
    assert len(of_chats) == 1


DIFFERENT = {
    "case": ("The US is", "The us is"),
    "full-width": ("A", "\uff21"),
    "superscript": ("10²", "102"),
    "no space": ("It is", "Itis"),
    "zero-width joiners of Persian": ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u062e"),
    "full stop": ("It is", "It is."),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_texts_that_read_differently_are_different(name: str) -> None:
    one, other = DIFFERENT[name]
    assert len(read_edits([(one, "a"), (other, "b")], on_conflict="error")) == 2
