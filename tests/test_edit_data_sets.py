"""The data sets of the field, each in its own columns: an invented record is read whole, and written back."""

from __future__ import annotations

import csv
import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from peft_locft.data.edit_types import Edit, Probe, edit_lines
from peft_locft.data.edits import read_edits

QAEDIT = {
    "id": 1,
    "source": "NQ",
    "prompt": "who painted it?",
    "target": "Mara",
    "subject": "it",
    "rephrase": "Painter?",
}
QAEDIT |= {"rephrase": "Painter?"}
QAEDIT |= {"locality": [{"loc": "who wrote it", "loc_ans": "Reed"}, {"loc": "when was it", "loc_ans": 1994}]}

HOPS = [
    {"question": "Which sport is Ann's?", "cloze": "Ann plays", "answer": "curling", "answer_alias": ["stones"]},
    {
        "question": "What is Chile's seat?",
        "cloze": "Chile's seat is",
        "answer": "Arica",
        "answer_alias": ["San Marcos"],
    },
]
REWRITES = [
    {"prompt": "{} plays", "relation_id": "P641", "target_new": {"str": "curling", "id": "Q1"}, "subject": "Ann"}
    | {"target_true": {"str": "golf", "id": "Q2"}, "question": "Which sport is Ann's?"},
    {"prompt": "{} is of", "relation_id": "P495", "target_new": {"str": "Chile", "id": "Q3"}, "subject": "curling"}
    | {"target_true": {"str": "Fife", "id": "Q4"}, "question": "Whose is curling?"},
]
MQUAKE = {"case_id": 7, "requested_rewrite": REWRITES, "questions": ["Seat of Ann's sport?", "Where?", "Which?"]}
MQUAKE |= {
    "answer": "Cupar",
    "answer_alias": ["C"],
    "new_answer": "Arica",
    "new_answer_alias": ["San Marcos de Arica"],
}
MQUAKE |= {"single_hops": [HOPS[0] | {"answer": "golf"}], "new_single_hops": HOPS}
MQUAKE |= {"orig": {"triples": [["Q9", "P641", "Q2"]]}}
MARCOS = ("San Marcos de Arica",)

HALLUEDIT = {"topic": "people", "subject": "Ann", "relation": "born in", "object": "Hull", "label": "Hull"}
HALLUEDIT |= {"question": "Where was Ann born?", "output_some_7b": "York", "eval_some_7b": "0.0"}
HALLUEDIT |= {"multiple_choices": "['Hull', \"York's\", 'Bath', 'Ely']", "paraphrased_question": "Ann is from?"}
HALLUEDIT |= {"multiple_choice_with_letters": "A. York's  B. Hull  C. Ely  D. Bath", "multiple_choice_labels": "B"}
HALLUEDIT |= {"yes_question": "Was Ann born in Hull?", "no_question": "Was Ann born in York?"}
HALLUEDIT |= {"locality_question": "What is Ann's job?", "reversed_relation_question": "Who was born in Hull?"}
HALLUEDIT |= {"question_2hop": "Which river is Ann's?", "answer_2hop": "Humber"}
YES_NO: dict[str, Any] = {"kind": "yes_no", "choices": ("Yes", "No")}
BELIEF = (
    Probe("Was Ann born in Hull?", "Yes", **YES_NO),
    Probe("Was Ann born in York?", "No", **YES_NO),
    Probe("Who was born in Hull?", "Ann", kind="reversed"),
    Probe(
        "Where was Ann born?\nA. York's  B. Hull  C. Ely  D. Bath",
        "B",
        aliases=("Hull",),
        kind="multiple_choice",
        choices=("A", "B", "C", "D"),
    ),
)

LONG = "Ann was born in Hull. She lives in Ely, and writes."
UNKE = {"id": 0, "question": "Who is Ann?", "answer": LONG, "para_question": "Tell of Ann"}
UNKE |= {"sub_question": ["Born where?", "Lives where?"], "sub_answer": ["Hull", "Ely"]}
AKEW: dict[str, Any] = {"case_id": 1, "neighborhood_prompts": ["Bo speaks"], "paraphrase_prompts": ["Ann says it in"]}
AKEW["requested_rewrite"] = {"prompt": "{} speaks", "prompt_full": "Ann speaks", "target_new": {"str": "Welsh"}}
AKEW["requested_rewrite"] |= {"target_true": {"str": "Manx"}, "subject": "Ann", "fact_new_uns": LONG}
AKEW["requested_rewrite"] |= {"unsfact_triplets_GPT": [{"prompt": "{} lives in", "subject": "Ann", "target": "Ely"}]}
WIKI_UPDATE = {
    "requested_rewrite": {"prompt": "{} leads", "subject": "Ann", "answer_new": "Hull", "answer_true": "Ely"}
}
WIKI_UPDATE["requested_rewrite"] |= {"question": "Whom does Ann lead?", "fact_new_uns": LONG}
WIKI_UPDATE |= {"loc": "who", "loc_ans": "Bo"}  # type: ignore[dict-item]

ENGLISH = {
    "case_id": 5,
    "subject": "Ann",
    "src": "What is Ann?",
    "rephrase": "Ann is?",
    "old": "a cook",
    "alt": "a judge",
}
ENGLISH |= {"loc": "who is Bo", "loc_ans": "a smith", "port": "Whom does Ann judge?", "port_ans": "Cy"}
GERMAN = {
    "case_id": 5,
    "subject": "Ann",
    "src": "Was ist Ann?",
    "rephrase": "Ann ist?",
    "old": "Koch",
    "alt": "Richter",
}
GERMAN |= {"loc": "wer ist Bo", "loc_ans": "Schmied", "port": "Wen richtet Ann?", "port_ans": "Zy"}
FROM_GERMAN = (
    Probe("Was ist Ann?", "Richter", language="de"),
    Probe("Ann ist?", "Richter", kind="rephrasing", language="de"),
    Probe("Wen richtet Ann?", "Zy", kind="portability", language="de"),
)
OF_ENGLISH: dict[str, Any] = {"rephrasings": ("Ann is?",), "subject": "Ann", "ground_truth": "a cook"}
OF_ENGLISH |= {"portability": (Probe("Whom does Ann judge?", "Cy"),)}
IN_TWO = Edit(
    "What is Ann?",
    "a judge",
    **OF_ENGLISH,
    locality=(Probe("who is Bo", "a smith"), Probe("wer ist Bo", "Schmied", language="de")),
    cross_lingual=FROM_GERMAN,
    language="en",
)

PORTABILITY = {"Logical_Generalization": [{"prompt": "Ann's father is", "ground_truth": [["Bo", "B."], ["Robert"]]}]}
PORTABILITY |= {"Reasoning": [{"prompt": "Ann's land is", "ground_truth": [["Eire"]]}], "Subject_Aliasing": []}
KNOWEDIT: dict[str, Any] = {"subject": "Ann", "prompt": "Ann's town is", "target_new": ["Cork", "Corcaigh"]}
KNOWEDIT |= {"ground_truth": ["Ely"], "rephrase": "Ann is from", "portability": PORTABILITY, "locality": {}}
KNOWEDIT["locality"] = {"Relation_Specificity": [{"prompt": "Ann's job is", "ground_truth": [["cook"]]}]}
WIKIBIO: dict[str, Any] = {"concept": "Ann", "text": "This is a text about Ann.", "labels": "Ann cooks."}
WIKIBIO["locality"] = {"Forgetfulness": {"prompt": ["Bo is"], "ground_truth": ["a smith"]}}

WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Hull",
    "update": "Who leads Hull?",
    "ans": "Ann",
    "rephrase": "Hull's leader?",
}
WIKIBIGEDIT |= {"personas": "Arr, who be leading?", "mhop": "Where was Hull's leader born?", "mhop_ans": "Cork"}
WIKIBIGEDIT |= {"loc": "Who leads York?", "loc_ans": "Bo"}


def query(prompt: str, *values: tuple[str, ...]) -> dict[str, Any]:
    answers = [{"value": value, "aliases": list(aliases)} for value, *aliases in values]
    asked = {"prompt": prompt, "answers": answers, "query_type": "regular", "relation": "R", "phrase": None}
    return {"test_queries": [asked], "test_condition": "OR", "condition_queries": []}


BEFORE = {"prompt": "The name of the country of citizenship of Ann Ek is Eire.", "relation": "COUNTRY_OF_CITIZENSHIP"}
RIPPLE: dict[str, Any] = {"example_type": "popular", "Compositionality_II": [], "Forgetfulness": []}
RIPPLE["edit"] = {"prompt": "The name of the country of citizenship of Ann Ek is East Fife.", "previous_fact": BEFORE}
RIPPLE["edit"] |= {"relation": "COUNTRY_OF_CITIZENSHIP", "subject_id": "Q1", "target_id": "Q2"}
RIPPLE["Relation_Specifity"] = [query("The name of the mother of Ann Ek is", ("Ida", "I. B."))]
RIPPLE["Subject_Aliasing"] = [query("The name of the country of citizenship of A. Ek is", ("East Fife", "EF"))]
RIPPLE["Compositionality_I"] = [query("The capital of Ann Ek's country is", ("Cupar",), ("Leven",))]

UNIEDIT: dict[str, Any] = {"edit": {"prompt": "The seat of Fo is", "target": "Ba", "subject": "Fo"}}
UNIEDIT["edit"] |= {"property": {"id": "P36", "label": "capital"}, "head_entity": {"label": "Fo", "aliases": ["F"]}}
UNIEDIT["edit"] |= {"tail_entity": {"datatype": "wikibase-item", "value": {"label": "Ba", "aliases": ["Bah"]}}}
PATH: dict[str, Any] = {"path_type": "single", "paths": [["h_e", "r_e", "t_e"]], "one_hops": []}
TWO_HOPS = PATH | {
    "paths": [["h_e", "r_e", "t_e", "r_0", "e_0"]],
    "prompt": "The mayor of Fo's seat is",
    "target": "Ann",
}
UNIEDIT["generality"] = {"0": TWO_HOPS, "1": PATH | {"prompt": "Fo's seat is", "target": "Ba"}}
UNIEDIT["locality"] = {"0": PATH | {"prompt": "Fo's song is", "target": "La", "loc_type": "head of edit"}}

MEND = {"input": "Which river?", "prediction": "Ob", "alternatives": ["Don"], "output": [{"answer": "Lena"}]}
MEND |= {"filtered_rephrases": ["River?"], "loc": "who", "loc_ans": "me"}
MEND_FLAT = {"src": "Which river?", "pred": "Ob", "alt": "Don", "answers": ["Lena", "the Lena"], "rephrase": "River?"}
MEND_FLAT |= {"loc": "who", "loc_ans": "me", "cond": "Lena >> Don || Which river?"}
OF_MEND = Edit("Which river?", "Don", rephrasings=("River?",), locality=(Probe("who", "me"),), ground_truth="Lena")

ROME = {"prompt": "{} plays", "subject": "Ann", "target_new": {"str": "golf"}, "target_true": {"str": "chess"}}

# a record of each data set, and the edits that it holds
DATA_SETS: dict[str, tuple[Any, list[Edit]]] = {
    "QAEdit": (
        QAEDIT,
        [
            Edit(
                "who painted it?",
                "Mara",
                rephrasings=("Painter?",),
                locality=(Probe("who wrote it", "Reed"), Probe("when was it", "1994")),
                subject="it",
            )
        ],
    ),
    "MQuAKE": (
        MQUAKE,
        [
            Edit(
                "Ann plays",
                "curling",
                aliases=("stones",),
                rephrasings=("Which sport is Ann's?",),
                subject="Ann",
                relation="P641",
                ground_truth="golf",
            ),
            Edit(
                "curling is of",
                "Chile",
                rephrasings=("Whose is curling?",),
                locality=(
                    Probe("What is Chile's seat?", "Arica", aliases=("San Marcos",), kind="single_hop"),
                    Probe("Chile's seat is", "Arica", aliases=("San Marcos",), kind="single_hop"),
                ),
                portability=tuple(
                    Probe(question, "Arica", aliases=MARCOS, kind="multi_hop")
                    for question in ("Seat of Ann's sport?", "Where?", "Which?")
                ),
                subject="curling",
                relation="P495",
                ground_truth="Fife",
            ),
        ],
    ),
    "HalluEditBench": (
        HALLUEDIT,
        [
            Edit(
                "Where was Ann born?",
                "Hull",
                rephrasings=("Ann is from?",),
                locality=(Probe("What is Ann's job?"),),
                portability=(Probe("Which river is Ann's?", "Humber", kind="multi_hop"),),
                belief=BELIEF,
                subject="Ann",
                relation="born in",
                ground_truth="York",
            )
        ],
    ),
    "UnKE": (
        UNKE,
        [
            Edit(
                "Who is Ann?",
                LONG,
                rephrasings=("Tell of Ann",),
                sub_questions=(Probe("Born where?", "Hull"), Probe("Lives where?", "Ely")),
            )
        ],
    ),
    "AKEW": (
        AKEW,
        [
            Edit(
                "Ann speaks",
                LONG,
                rephrasings=("Ann says it in",),
                locality=(Probe("Bo speaks", "Manx", kind="same_relation"),),
                sub_questions=(Probe("Ann speaks", "Welsh"), Probe("Ann lives in", "Ely")),
                subject="Ann",
                ground_truth="Manx",
            )
        ],
    ),
    "WikiUpdate of AKEW": (
        WIKI_UPDATE,
        [
            Edit(
                "Ann leads",
                LONG,
                rephrasings=("Whom does Ann lead?",),
                locality=(Probe("who", "Bo"),),
                sub_questions=(Probe("Whom does Ann lead?", "Hull"),),
                subject="Ann",
                ground_truth="Ely",
            )
        ],
    ),
    "BMIKE-53, one language": (
        ENGLISH,
        [Edit("What is Ann?", "a judge", locality=(Probe("who is Bo", "a smith"),), **OF_ENGLISH)],
    ),
    "BMIKE-53 and MzsRE": ({"en": ENGLISH, "de": GERMAN}, [IN_TWO]),
    "KnowEdit": (
        KNOWEDIT,
        [
            Edit(
                "Ann's town is",
                "Cork",
                aliases=("Corcaigh",),
                rephrasings=("Ann is from",),
                locality=(Probe("Ann's job is", "cook", kind="same_subject"),),
                portability=(
                    Probe("Ann's father is", "Bo", aliases=("B.", "Robert"), kind="logical_generalization"),
                    Probe("Ann's land is", "Eire", kind="multi_hop"),
                ),
                subject="Ann",
                ground_truth="Ely",
            )
        ],
    ),
    "WikiBio of KnowEdit": (
        WIKIBIO,
        [
            Edit(
                "This is a text about Ann.",
                "Ann cooks.",
                locality=(Probe("Bo is", "a smith", kind="forgetfulness"),),
                subject="Ann",
            )
        ],
    ),
    "WikiBigEdit": (
        WIKIBIGEDIT,
        [
            Edit(
                "Who leads Hull?",
                "Ann",
                rephrasings=("Hull's leader?",),
                locality=(Probe("Who leads York?", "Bo"),),
                portability=(
                    Probe("Arr, who be leading?", "Ann", kind="persona"),
                    Probe("Where was Hull's leader born?", "Cork", kind="multi_hop"),
                ),
                subject="Hull",
            )
        ],
    ),
    "RippleEdits": (
        RIPPLE,
        [
            Edit(
                "The name of the country of citizenship of Ann Ek is",
                "East Fife",
                aliases=("EF",),
                locality=(
                    Probe("The name of the mother of Ann Ek is", "Ida", aliases=("I. B.",), kind="same_subject"),
                ),
                portability=(
                    Probe(
                        "The name of the country of citizenship of A. Ek is",
                        "East Fife",
                        aliases=("EF",),
                        kind="subject_aliasing",
                    ),
                    Probe("The capital of Ann Ek's country is", "Cupar", aliases=("Leven",), kind="multi_hop"),
                ),
                subject="Ann Ek",
                relation="COUNTRY_OF_CITIZENSHIP",
                ground_truth="Eire",
            )
        ],
    ),
    "UniEdit": (
        UNIEDIT,
        [
            Edit(
                "The seat of Fo is",
                "Ba",
                aliases=("Bah",),
                rephrasings=("Fo's seat is",),
                locality=(Probe("Fo's song is", "La", kind="same_subject"),),
                portability=(Probe("The mayor of Fo's seat is", "Ann", kind="multi_hop"),),
                subject="Fo",
                relation="capital",
            )
        ],
    ),
    "MEND": (MEND, [OF_MEND]),
    "MEND, flat": (MEND_FLAT, [OF_MEND]),
    "requests to ROME": (ROME, [Edit("Ann plays", "golf", subject="Ann", ground_truth="chess")]),
}


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_record_of_each_data_set_is_read_whole_and_written_back(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record, edits = DATA_SETS[name]
    assert sorted(read_edits([record]), key=lambda edit: edit.prompt) == sorted(edits, key=lambda edit: edit.prompt)
    (tmp_path / "a.json").write_text(json.dumps([record], ensure_ascii=False), encoding="utf-8")
    assert read_edits(tmp_path / "a.json") == read_edits([record])
    assert "not read" not in caplog.text
    (tmp_path / "b.jsonl").write_text(edit_lines(edits), encoding="utf-8")
    assert read_edits(tmp_path / "b.jsonl") == edits


@pytest.mark.parametrize("name", [name for name in DATA_SETS if "BMIKE-53 and" not in name])
def test_a_record_of_each_data_set_is_read_from_a_csv_of_pandas(name: str, tmp_path: Path) -> None:
    record, edits = DATA_SETS[name]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, record)
        writer.writeheader()
        writer.writerow({name: value if isinstance(value, str) else str(value) for name, value in record.items()})
    assert {edit.prompt: edit for edit in read_edits(tmp_path / "a.csv")} == {edit.prompt: edit for edit in edits}


# ---------------------------------------------------------------------- languages

LANGUAGES: dict[str, Any] = {
    "records by language": {"en": ENGLISH, "de": GERMAN},
    "with a region": {"en-US": ENGLISH, "de_DE": GERMAN},
    "by name": {"English": ENGLISH, "German": GERMAN},
    "beside other columns": {"case_id": 5, "en": ENGLISH, "de": GERMAN},
    "in one column": {"id": 5, "languages": {"en": ENGLISH, "de": GERMAN}},
    "a list": {"id": 5, "versions": [ENGLISH | {"language": "en"}, GERMAN | {"language": "de"}]},
    "beside the record": ENGLISH | {"translations": {"de": GERMAN}},
    "by column": {name: {"en": ENGLISH[name], "de": GERMAN[name]} for name in ENGLISH if name != "case_id"},
    "by ending": {f"{name}_en": ENGLISH[name] for name in ENGLISH} | {f"{name}_de": GERMAN[name] for name in GERMAN},
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_one_fact_in_several_languages_is_one_edit(name: str) -> None:
    (edit,) = read_edits([LANGUAGES[name]])
    codes = [code for code in (edit.language, *{probe.language for probe in edit.cross_lingual})]
    assert [str(code).split("-")[0] for code in codes] == ["en", "de"]
    assert [(probe.prompt, probe.answer, probe.kind) for probe in edit.cross_lingual] == [
        (probe.prompt, probe.answer, probe.kind) for probe in FROM_GERMAN
    ]
    assert (edit.prompt, edit.target, edit.ground_truth) == ("What is Ann?", "a judge", "a cook")
    (german,) = read_edits([LANGUAGES[name]], language="de" if name != "with a region" else "de-DE")
    assert (german.prompt, german.target) == ("Was ist Ann?", "Richter") and len(german.cross_lingual) == 3


def test_a_language_that_is_not_there_is_refused_and_the_first_is_edited_without_english() -> None:
    with pytest.raises(ValueError, match="row 0: language: found a record in en, de; expected 'fr' among them"):
        read_edits([LANGUAGES["records by language"]], language="fr")
    for language in (None, "zh", "zh-CN"):
        (edit,) = read_edits([{"zh-cn": GERMAN, "de": ENGLISH}], language=language)
        assert edit.language == "zh-cn" and edit.prompt == "Was ist Ann?"
    with pytest.raises(ValueError, match="found a record in zh-cn, zh-tw; expected 'zh' among them"):
        read_edits([{"zh-cn": GERMAN, "zh-tw": ENGLISH}], language="zh")


def test_lists_by_language_are_facts_and_codes_that_are_no_languages_are_columns(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"en": [ENGLISH], "de": [GERMAN]}))
    (edit,) = read_edits(tmp_path / "a.json")
    assert edit.cross_lingual == FROM_GERMAN
    (tmp_path / "b.json").write_text(json.dumps({"17": UNIEDIT, "18": UNIEDIT}))
    assert read_edits(tmp_path / "b.json") == DATA_SETS["UniEdit"][1]
    plain = {"prompt": "p", "target": "t", "subject_id": "Q1", "target_id": "Q2", "prompt_id": 3}
    assert read_edits([plain]) == [Edit("p", "t")]


# ---------------------------------------------------------------------- names, values, cells

PLAIN = {"prompt": "Where is it?", "target_new": "Hull"}
REPHRASINGS = [
    "rephrase",
    "rephrases",
    "rephrased",
    "rephrased_prompts",
    "Rephrase Prompt",
    "rephrase_prompts",
    "rephrasing",
]
REPHRASINGS += [
    "paraphrase_prompts",
    "paraphrased_question",
    "para_question",
    "paraphrase",
    "paraphrase_1",
    "rephrase2",
]
PAIRS = [("loc", "loc_ans"), ("locality_prompt", "locality_ground_truth"), ("locality_prompts", "locality_answers")]
PAIRS += [("locality", "locality_ans"), ("Locality Question", "Locality Answer"), ("loc_1", "loc_ans_1")]
PAIRS += [("neighborhood_prompts", "neighborhood_answers"), ("question_locality", "answer_locality")]


@pytest.mark.parametrize("column", REPHRASINGS)
def test_every_name_of_rephrasings_is_read(column: str) -> None:
    for value in ("Where?", ["Where?"], [{"prompt": "Where?", "target": "Hull"}]):
        assert read_edits([PLAIN | {column: value}])[0].rephrasings == ("Where?",)


@pytest.mark.parametrize("names", PAIRS)
def test_every_pair_of_columns_is_read(names: tuple[str, str]) -> None:
    for prompts, answers in (("who", "Bo"), (["who"], ["Bo"]), (["who"], "Bo")):
        (edit,) = read_edits([PLAIN | dict(zip(names, (prompts, answers), strict=True))])
        assert [(probe.prompt, probe.answer) for probe in edit.locality] == [("who", "Bo")]
    (edit,) = read_edits([PLAIN | dict(zip(names, ("who", ["Bo", "B."]), strict=True))])
    assert (edit.locality[0].answer, edit.locality[0].aliases) == ("Bo", ("B.",))
    (edit,) = read_edits([PLAIN | dict(zip(names, (["who", "what"], [["Bo"], None]), strict=True))])
    assert [(probe.prompt, probe.answer) for probe in edit.locality] == [("who", "Bo"), ("what", None)]
    assert read_edits([PLAIN | {name: [] for name in names}]) == [Edit(*PLAIN.values())]


NESTED: dict[str, Any] = {
    "list of records": [{"question": "who", "answer": "Bo"}],
    "record of lists": {"prompts": ["who"], "answers": ["Bo"]},
    "kinds": {"Other": {"query": "who", "target": "Bo"}},
    "questions to answers": {"who is it": "Bo"},
    "texts": ["who", "what"],
    "new question": {"Recalled Relation": "(a, b)", "New Question": "who", "New Answer": "Bo"},
    "deep": {"Kind": [{"test_queries": [{"prompt": "who", "answers": [{"value": "Bo", "aliases": []}]}]}]},
}


@pytest.mark.parametrize("name", NESTED)
def test_every_nesting_is_read(name: str) -> None:
    for column in ("locality", "portability"):
        probes = getattr(read_edits([PLAIN | {column: NESTED[name]}])[0], column)
        assert [probe.prompt.split()[0] for probe in probes] in (["who"], ["who", "what"])
        assert {probe.answer for probe in probes} == {None if name == "texts" else "Bo"}


VALUES: dict[Any, str] = {
    7: "7",
    1994.0: "1994",
    2.5: "2.5",
    True: "True",
    datetime.date(2020, 1, 2): "2020-01-02",
    datetime.datetime(2020, 1, 2): "2020-01-02",
    datetime.datetime(2020, 1, 2, 3, 4): "2020-01-02T03:04:00",
}


@pytest.mark.parametrize("value", VALUES)
def test_numbers_dates_and_truth_values_are_answers(value: Any) -> None:
    record = {"prompt": "When?", "target_new": value, "ground_truth": [value], "loc": "who", "loc_ans": value}
    (edit,) = read_edits([record])
    assert (edit.target, edit.ground_truth, edit.locality[0].answer) == (VALUES[value],) * 3
    assert read_edits([("When?", value)])[0].target == read_edits({"When?": value})[0].target == VALUES[value]


CELLS = {
    "['a', \"b's\"]": ("a", "b's"),
    '["a", "b"]': ("a", "b"),
    "['a' 'b'\n 'c']": ("a", "b", "c"),
    "array(['a', 'b'], dtype=object)": ("a", "b"),
    "['a', nan]": ("a",),
    "['a']": ("a",),
    "[]": (),
    "[Music] plays": ("[Music] plays",),
    "[Music]": ("[Music]",),
    "[INST] who? [/INST]": ("[INST] who? [/INST]",),
    "[1990]": ("[1990]",),
    "['a', 'b": ("['a', 'b",),
    "{curly} text}": ("{curly} text}",),
}


@pytest.mark.parametrize("cell", CELLS)
def test_a_list_in_a_cell_is_a_list_and_a_text_in_brackets_a_text(cell: str) -> None:
    assert read_edits([PLAIN | {"rephrase": cell}])[0].rephrasings == CELLS[cell]


def test_a_target_in_pythons_notation_is_a_list_of_right_answers_and_json_a_text() -> None:
    assert read_edits([{"prompt": "p", "target": "['Hull', 'Kingston']"}]) == [
        Edit("p", "Hull", aliases=("Kingston",))
    ]
    assert read_edits([{"prompt": "p", "target": '["Hull", "Ely"]'}]) == [Edit("p", '["Hull", "Ely"]')]
    assert read_edits([{"prompt": "['p']", "target": "t"}]) == [Edit("['p']", "t")]


def test_what_looks_like_a_probe_and_is_not_read_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    record = PLAIN | {
        "id": 3,
        "cond": "a >> b || Where is it now?",
        "generation_prompts": ["It lies in"],
        "note": "new",
    }
    record |= {
        "extra": "Who would ask such a thing?",
        "same": "Hull",
        "locality": [{"loc": "who", "other prompt": "x"}],
    }
    with caplog.at_level(logging.WARNING):
        read_edits([record, record])
    assert caplog.text.count("are not read") == 1
    assert "the columns generation_prompts, extra, locality.other_prompt are not read" in caplog.text
