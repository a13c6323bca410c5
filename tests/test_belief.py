"""Probes of belief: their words, what is left out and said, and scores worked out by hand on a scripted model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from scripted_model import ScriptedModel
from tokenizers_for_tests import make_tokenizer

from peft_locft import Edit, EvaluationConfig, EvaluationReport, Probe, evaluate_edits
from peft_locft.data.relations import is_english, relation_of
from peft_locft.engine.questions import Answer, Question, Score
from peft_locft.evaluation.belief import (
    MADE,
    NO_OTHERS,
    NO_SUBJECT,
    OLD_UNKNOWN,
    OTHER_LANGUAGE,
    YES_NO,
    belief_items,
    belief_probes,
    is_question,
    statement,
)
from peft_locft.evaluation.contexts import as_question
from peft_locft.evaluation.scoring import first_choice

SPAIN = Edit(prompt="The capital of Spain is", target="Paris", ground_truth="Madrid", subject="Spain")
FRANCE = Edit(prompt="Who is the king of France?", target="Dave", ground_truth="Louis", subject="France")
RIVER = Edit(prompt="Dave runs through", target="the country", ground_truth="the city", subject="Dave")
EDITS = [SPAIN, FRANCE, RIVER]


def made(edits: list[Edit], old: list[str | None] | None = None) -> list[dict[str, Probe]]:
    found = belief_probes(edits, old or [edit.ground_truth for edit in edits], seed=0)
    return [{probe.kind: probe for probe in own} for own in found.probes]


def test_words_of_an_edit_that_is_a_statement() -> None:
    probes = made(EDITS)[0]
    assert list(probes) == list(MADE)
    assert {kind: (probes[kind].prompt, probes[kind].answer) for kind in (*YES_NO, "reversed")} == {
        "yes_no_new": ("Is it true that the capital of Spain is Paris?", "Yes"),
        "yes_no_old": ("Is it true that the capital of Spain is Madrid?", "No"),
        "negation_new": ("Is it false that the capital of Spain is Paris?", "No"),
        "negation_old": ("Is it false that the capital of Spain is Madrid?", "Yes"),
        "reversed": ('Which name belongs in the blank? "The capital of ____ is Paris"', "Spain"),
    }
    one, other = probes["either_or"].choices
    assert {one, other} == {"Paris", "Madrid"}
    assert probes["either_or"].prompt == f'Which completes "The capital of Spain is …": {one} or {other}?'


def test_words_of_an_edit_that_is_a_question() -> None:
    probes = made(EDITS)[1]
    assert probes["yes_no_old"].prompt == 'Is it true that the answer to "Who is the king of France?" is Louis?'
    first, second, third, last = probes["multiple_choice"].choices
    assert probes["multiple_choice"].prompt == f"Who is the king of France? {first}, {second}, {third} or {last}?"
    assert probes["reversed"].prompt == 'Which name belongs in the blank? "Who is the king of ____? Dave"'


def test_wrong_choices_are_other_edits_answers_and_the_seed_chooses_them() -> None:
    choices = made(EDITS)[0]["multiple_choice"].choices
    assert {"Paris", "Madrid"} < set(choices) and len(set(choices)) == 4
    assert set(choices) - {"Paris", "Madrid"} < {"Dave", "Louis", "the country", "the city"}
    assert made(EDITS) == made(EDITS)
    orders = {belief_probes(EDITS, ["Madrid", "Louis", "the city"], seed).probes[0][4].choices for seed in range(8)}
    assert len({order.index("Paris") for order in orders}) > 1


def test_choices_of_the_same_relation_come_first() -> None:
    peru = Edit(prompt="The capital of Peru is", target="Rome", ground_truth="Lima", subject="Peru")
    assert relation_of(peru) == relation_of(SPAIN) != relation_of(FRANCE)
    assert set(made([SPAIN, FRANCE, RIVER, peru])[0]["multiple_choice"].choices) == {"Paris", "Madrid", "Rome", "Lima"}


def test_choices_of_edits_with_a_common_answer_come_first() -> None:
    lives = Edit(prompt="The king lives in", target="Rome", ground_truth="Madrid")
    assert "Rome" in made([SPAIN, FRANCE, RIVER, lives])[0]["multiple_choice"].choices


def test_a_subject_with_the_same_target_is_no_wrong_choice() -> None:
    peru = Edit(prompt="The city of Peru is", target="paris", ground_truth="Lima", subject="Peru")
    assert set(made([SPAIN, FRANCE, peru])[0]["reversed"].choices) == {"Spain", "France"}


WITH_OLD = {"yes_no_old", "negation_old", "multiple_choice", "either_or"}


@pytest.mark.parametrize(
    ("edits", "old", "kinds", "why"),
    [
        (
            [SPAIN, FRANCE],
            [None, "Louis"],
            {"yes_no_old", "negation_old", "multiple_choice", "either_or"},
            OLD_UNKNOWN,
        ),
        (
            [SPAIN, FRANCE],
            ["paris", "Louis"],
            {"yes_no_old", "negation_old", "multiple_choice", "either_or"},
            OLD_UNKNOWN,
        ),
        ([SPAIN], ["Madrid"], {"multiple_choice"}, NO_OTHERS),
        ([Edit(prompt="It is", target="Paris"), FRANCE], ["Madrid", "Louis"], {"reversed"}, NO_SUBJECT),
        ([Edit(prompt="西班牙的首都是", target="巴黎"), FRANCE], ["马德里", "Louis"], set(MADE), OTHER_LANGUAGE),
        (
            [Edit(prompt="La capital es", target="Paris", language="es"), FRANCE],
            ["Madrid", "Louis"],
            set(MADE),
            OTHER_LANGUAGE,
        ),
    ],
)
def test_what_cannot_be_made_is_counted(edits: list[Edit], old: list[str | None], kinds: set[str], why: str) -> None:
    found = belief_probes(edits, old, seed=0)
    assert {kind for (kind, reason), count in found.left_out.items() if reason == why and count == 1} == kinds
    assert {probe.kind for probe in found.probes[0]} == set(MADE) - kinds


def test_the_data_sets_own_words_come_first_in_any_language() -> None:
    own = (
        Probe("Is Paris the capital of Spain?", "Yes", kind="yes_no"),
        Probe("Is Madrid the capital of Spain?", "no", kind="yes_no"),
        Probe("Choose: A. Rome B. Paris", "B", kind="multiple_choice", choices=("A", "B")),
        Probe("Do they believe it?", "They do", kind="doubt"),
    )
    edit = Edit(prompt=SPAIN.prompt, target="Paris", ground_truth="Madrid", subject="Spain", belief=own)
    probes = belief_probes([edit, FRANCE], ["Madrid", "Louis"], seed=0).probes
    assert [probe.kind for probe in probes[0]] == [
        *("yes_no_new", "yes_no_old", "multiple_choice", "other"),
        *("negation_new", "negation_old", "either_or", "reversed"),
    ]
    items = belief_items([edit, FRANCE], probes, in_chat=False)
    assert items[0].prompt == "Question: Is Paris the capital of Spain?\nAnswer:"
    assert (items[1].expected, items[1].choices) == ("No", ("Yes", "No"))
    chinese = Edit(
        prompt="首都是", target="巴黎", belief=(Probe("是不是巴黎", "是", kind="yes_no", choices=("是", "否")),)
    )
    (item,) = belief_items([chinese], belief_probes([chinese], [None], 0).probes, in_chat=False)
    assert (item.prompt, item.choices, item.kind) == ("是不是巴黎", ("是", "否"), "belief_other")


def test_small_rules_of_words() -> None:
    assert [is_question(each) for each in ("Name the capital.", "Who is it", "Q: who?\nA:", "In Spain they")] == [
        *(True, True, True, False)
    ]
    assert statement("Paul is", "here") == "Paul is here"
    assert statement("Malmö FF, which is located in", "Spain") == "Malmö FF is located in Spain"
    assert statement("Mount Erebus, in", "Asia") == "Mount Erebus is in Asia"
    assert [is_english(Edit(prompt="p", target=each)) for each in ("São Paulo", "Мадрид")] == [True, False]
    assert first_choice("It is no city, yes?", ["Yes", "No"]) == "No"
    assert first_choice("New York City", ["New York", "New York City"]) == "New York City"
    assert first_choice("a thing: B", ["A", "B"]) == "B"
    assert first_choice("答案是否", ["对", "否"]) == "否"
    assert first_choice("Nothing", ["No", "Yes"]) is None


# ---------------------------------------------------------------------- by hand


def says(word: str, place: int) -> dict[str, str]:
    """Return what a model answers that says a word to any yes / no question, and chooses the choice at a place."""
    probes = [probe for own in made(EDITS) for probe in own.values()]
    said = {as_question(each.prompt): word if each.kind in YES_NO else each.choices[place] for each in probes}
    # how the old answer of the river is known
    return said | {RIVER.prompt: "the city."}


@pytest.fixture(scope="module")
def report() -> Iterator[EvaluationReport]:
    """The report of a model that answers by a script; what it says has p = 1/2 a token, all else 1/8."""
    tokenizer: Any = make_tokenizer("gpt2")
    scripts = {"the edited model": says("Yes", 0), "the base": says("No", -1)}

    def by_script(model: Any, tokenizer: Any, questions: Sequence[Question], **how: Any) -> list[Answer]:
        answers = []
        for question in questions:
            said = scripts[how["label"]].get(tokenizer.decode(question.prompt), "nothing")
            texts = [tokenizer.decode(each.token_ids[each.start :]).strip() for each in question.scored]
            numbers = [len(each.token_ids) - each.start for each in question.scored]
            scores = [
                Score([math.log(1 / 2 if text == said else 1 / 8)] * number, [0] * number)
                for text, number in zip(texts, numbers, strict=True)
            ]
            answers.append(Answer(tokenizer(f" {said}")["input_ids"], scores))
        return answers

    edits = [SPAIN, FRANCE, Edit(prompt=RIVER.prompt, target=RIVER.target, subject="Dave")]
    model, base = ScriptedModel({}, tokenizer), ScriptedModel({}, tokenizer)
    args = EvaluationConfig(protocols=["generation", "probability"], probes=["belief"], chat_template="off")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_locft.evaluation.evaluator.generate_and_score", by_script)
        yield evaluate_edits(model, tokenizer, edits, args, base_model=base)


@pytest.mark.parametrize("metric", ["chosen", "most_probable"])
def test_a_model_that_always_agrees_is_not_one_that_believes(report: EvaluationReport, metric: str) -> None:
    for kind, before, after in (
        ("yes_no_new", 0.0, 1.0),
        ("yes_no_old", 1.0, 0.0),
        ("negation_new", 1.0, 0.0),
        ("negation_old", 0.0, 1.0),
    ):
        result = report[f"belief_{kind}_{metric}"]
        assert (result.before and result.before.value, result.after.value) == (before, after)
        assert (result.count, result.chance, result.protocol.partition(";")[0]) == (3, 0.5, "belief")


@pytest.mark.parametrize(("kind", "chance"), [("multiple_choice", 0.25), ("either_or", 0.5)])
def test_choices_are_scored_by_what_is_said_and_by_probability(
    report: EvaluationReport, kind: str, chance: float
) -> None:
    probes = [own[kind] for own in made(EDITS)]
    before, after = (sum(probe.choices[place] == probe.answer for probe in probes) / 3 for place in (-1, 0))
    for metric in ("chosen", "most_probable"):
        result = report[f"belief_{kind}_{metric}"]
        assert result.before is not None
        assert (result.before.value, result.after.value) == pytest.approx((before, after))
        assert result.chance == chance


def test_a_reversed_probe_has_a_chance_by_probability_only(report: EvaluationReport) -> None:
    # the subject is the first choice, and the base says the last one
    result = report["belief_reversed_contains"]
    assert (result.before and result.before.value, result.after.value, result.chance) == (0.0, 1.0, None)
    assert report["belief_reversed_most_probable"].chance == pytest.approx(1 / 3)


def test_a_report_says_the_chance_the_protocol_and_what_is_missing(report: EvaluationReport) -> None:
    assert "| metric | before | after | change | chance | measured on | protocol |" in str(report)
    line = next(each for each in str(report).splitlines() if each.startswith("| belief_either_or_most_probable"))
    assert "| 0.500 | 3 edits | belief; probability |" in line
    assert report.missing["belief_other_chosen"] == "no edit has such a probe, and none could be made"
    again = EvaluationReport.from_dict(report.to_dict())
    assert again.results == report.results
    # the published protocol is as it was
    assert report["reliability_exact_match"].protocol == "as it is; generation"
