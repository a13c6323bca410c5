"""Contexts, locality rings, multi-hop and long answers: what is asked, and that the published figures stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_training import EDITS, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import Edit, EvaluationConfig, Message, Probe
from peft_locft.data.edits import Prompt
from peft_locft.data.leaks import trained_prompts_record
from peft_locft.data.relations import same_subject
from peft_locft.evaluation import EditEvaluator
from peft_locft.evaluation.asked_items import AskedItems, Sources, asked_items
from peft_locft.evaluation.contexts import CONTEXTS, EXAMPLES, FIRST_TURN, PARAGRAPH, in_context
from peft_locft.evaluation.items import TOKENS_BESIDE_ANSWER, ItemEncoder, Reply
from peft_locft.evaluation.kinds import ALL_KINDS, BY_PROBES, asked_kinds
from peft_locft.evaluation.metrics import METRICS
from peft_locft.evaluation.rings import BEGINNINGS, same_relation
from peft_locft.evaluation.tabulation import PairedReplies

SPAIN = Edit(
    prompt="The capital of Spain is",
    target="Paris",
    subject="Spain",
    ground_truth="Madrid",
    rephrasings=("Spain is ruled from",),
    locality=(Probe("Spain has a coast in the", kind="same_subject"),),
    portability=(Probe("The king of Spain lives in", "Paris", kind="multi_hop"), Probe("Who?", "Felipe")),
)
PERU = Edit(prompt="The capital of Peru is", target="Rome", subject="Peru", ground_truth="Lima")
SPEAKS = Edit(prompt="Louis speaks", target="Danish", subject="Louis", ground_truth="French")
CHINESE = Edit(prompt="西班牙的首都是", target="巴黎", ground_truth="马德里")
NAMES = ("Ghana", "Malta")


def asked(
    edits: list[Edit], trained: frozenset[str] = frozenset(), template: str | None = None, **args: Any
) -> AskedItems:
    tokenizer = make_tokenizer("gpt2", chat_template=template)
    sources = Sources(tokenizer, frozenset(), lambda subjects, num: NAMES, lambda edits: [None] * len(edits))
    return asked_items(edits, EvaluationConfig(chat_template="off", **args), sources)


# ---------------------------------------------------------------------- contexts


def test_answers_have_the_tokens_that_they_need() -> None:
    """Short answers end early, but none before the target; long ones are as long as they were asked."""
    tokenizer = make_tokenizer("gpt2")
    long = replace(SPAIN, target="Paris, " * 30)
    found = {}
    for edit in (SPAIN, long):
        items = asked([edit], contexts=["question_answer"], probes=["belief"]).items
        encoder = ItemEncoder(items, tokenizer, max_new_tokens=40)
        by_prompt = dict(zip(encoder._by_prompt, encoder.questions(), strict=True))
        found[edit.target] = {item.kind: by_prompt[item.asked].max_new_tokens for item in items}
    short, longer = found.values()
    assert short["reliability"] == longer["reliability"] == 40
    yes = len(tokenizer(" Yes").input_ids) + TOKENS_BESIDE_ANSWER
    assert short["reliability_question_answer"] == 16 and short["belief_yes_no_new"] == max(8, yes)
    length = len(tokenizer(" " + long.target).input_ids)
    assert length > 40 and longer["reliability_question_answer"] == length + TOKENS_BESIDE_ANSWER


def test_a_prompt_in_each_context() -> None:
    plain = Prompt("Who is it?")
    assert in_context(plain, "question_answer").text == "Question: Who is it?\nAnswer:"
    shots = in_context(plain, "few_shot").text
    assert shots.startswith(f"Question: {EXAMPLES[0][0]}\nAnswer: {EXAMPLES[0][1]}\n\nQuestion:")
    assert shots.endswith("\n\nQuestion: Who is it?\nAnswer:")
    assert in_context(plain, "after_paragraph") == Prompt(f"{PARAGRAPH}\n\nWho is it?", None)
    assert in_context(plain, "chat") == Prompt("Who is it?", ())
    system = (Message("system", "Be brief."),)
    assert in_context(Prompt("Who is it?", system), "second_turn") == Prompt("Who is it?", (*system, *FIRST_TURN))


def test_prompts_and_rephrasings_are_asked_in_every_context() -> None:
    found = asked([SPAIN, PERU], template="chatml", contexts=["all"])
    for context in CONTEXTS:
        assert [item.edit for item in found.items if item.kind == f"reliability_{context}"] == [0, 1]
        (item,) = [item for item in found.items if item.kind == f"generalization_{context}"]
        assert item.asked == in_context(Prompt("Spain is ruled from"), context)
        assert item.expected == "Paris"
    assert found.notes == []


def test_a_context_that_is_not_there_says_why() -> None:
    found = asked([SPAIN, CHINESE], contexts=["chat", "few_shot"])
    assert not any(item.kind.endswith("_chat") for item in found.items)
    assert found.kinds["reliability_chat"].none == "the tokenizer has no chat template"
    assert [item.edit for item in found.items if item.kind == "reliability_few_shot"] == [0]
    assert found.notes == ["1 of 2 edits were asked in no context but the chat template: the language is not English."]


# ---------------------------------------------------------------------- locality


def test_the_same_subject_is_asked_for_other_facts_only() -> None:
    # Peru's prompt has the same relation; where relations are not named, a shared answer tells that two are one
    assert same_subject([SPAIN, PERU, SPEAKS], seed=0, num=2)[0] == ["Spain speaks"]
    assert set(same_subject([SPAIN, PERU, SPEAKS], seed=0, num=2)[2]) == {"The capital of Louis is"}
    seat = Edit(prompt="The seat of Rome is", target="Madrid", subject="Rome", ground_truth="Lyon")
    assert same_subject([SPAIN, seat], seed=0, num=2) == [[], []]
    named = [replace(SPAIN, relation="capital"), replace(seat, relation="seat")]
    assert same_subject(named, seed=0, num=2) == [["The seat of Spain is"], ["The capital of Rome is"]]
    assert same_subject([SPAIN, replace(SPEAKS, language="fr")], seed=0, num=2) == [[], []]
    # retained while training, they would not measure what an edit does to other facts
    trained = frozenset(trained_prompts_record(["Spain speaks"])["sha256"])
    assert same_subject([SPAIN, PERU, SPEAKS], seed=0, num=2, trained=trained)[0] == []


def test_names_that_the_adapter_was_trained_on_are_left_out() -> None:
    trained = frozenset(trained_prompts_record(["The capital of Ghana is"])["sha256"])
    assert same_relation([SPAIN, PERU], NAMES, trained, seed=0) == [["The capital of Malta is"], []]
    assert same_relation([SPAIN], ["Ghana"], trained, seed=0) == [[]]
    prompts = same_relation([SPAIN, PERU], NAMES, frozenset(), seed=0)
    assert {each for own in prompts for each in own} == {f"The capital of {name} is" for name in NAMES}


def test_three_rings() -> None:
    found = asked([SPAIN, SPEAKS, CHINESE], probes=["locality_rings"])
    by_kind = {kind: [item for item in found.items if item.kind == kind] for kind in BY_PROBES["locality_rings"]}
    of_spain = [item.prompt for item in by_kind["locality_same_subject"] if item.edit == 0]
    assert of_spain == ["Spain has a coast in the", "Spain speaks"]  # the data set's own first
    assert {item.edit for item in by_kind["locality_same_relation"]} == {0, 1}
    assert {item.prompt for item in by_kind["locality_unrelated"]} <= set(BEGINNINGS)
    assert {item.edit for item in by_kind["locality_unrelated"]} == {0, 1}
    assert {item.other for items in by_kind.values() for item in items if item.edit == 0} == {"Paris"}


def test_over_reach_is_the_share_that_say_the_target() -> None:
    found = asked([SPAIN], probes=["locality_rings"])
    items = [item for item in found.items if item.kind == "locality_same_relation"]
    before, after = [Reply("Rome", "Rome"), Reply("Paris", "Paris")], [Reply("Paris", "Paris, of course")] * 2
    kinds = {name: ALL_KINDS[name] for name in BY_PROBES["locality_rings"]}
    columns, missing = PairedReplies([SPAIN], items, after, before, kinds).scored(["generation"]).columns()
    says = columns["locality_same_relation_says_target"]
    assert says.before is not None
    assert (says.before.tolist(), says.after.tolist()) == ([0.5], [1.0])
    assert columns["locality_same_relation_first_word_unchanged"].after.tolist() == [0.5]
    assert missing["locality_same_subject_says_target"] == "no other edit's relation fits"


# ---------------------------------------------------------------------- the rest


def test_multi_hop_is_a_group_of_its_own_beside_portability() -> None:
    found = asked([SPAIN], probes=["multi_hop"])
    assert [item.prompt for item in found.items if item.kind == "portability_multi_hop"] == [
        "The king of Spain lives in"
    ]
    assert sum(item.kind == "portability" for item in found.items) == 2


def test_kinds_name_metrics_that_there_are() -> None:
    assert {name for kind in ALL_KINDS.values() for name in kind.metrics} == set(METRICS)
    assert list(asked_kinds([], [])) == ["reliability", "generalization", "locality", "portability"]
    assert set(asked_kinds(CONTEXTS, list(BY_PROBES))) == set(ALL_KINDS) - {"cross_lingual"}
    assert all(kind.paper_names(metric) for kind in ALL_KINDS.values() for metric in kind.metrics)


def test_settings_that_name_nothing_are_refused() -> None:
    assert EvaluationConfig(contexts=["all"]).contexts == list(CONTEXTS)
    assert EvaluationConfig(probes=["multi_hop", "belief"]).probes == ["belief", "multi_hop"]
    with pytest.raises(ValueError, match=r"contexts: found 'cot'; expected one or more of question_answer, .*, all"):
        EvaluationConfig(contexts=["cot"])
    with pytest.raises(ValueError, match=r"probes: found text; expected a list: probes=\['belief'\]"):
        EvaluationConfig(probes="belief")  # type: ignore[arg-type]


def test_the_published_figures_stay_as_they_are_and_prompts_are_asked_once() -> None:
    model, tokenizer = peft_model(max_position_embeddings=512), make_tokenizer("llama2")
    target = "It is a city by the sea, and it is large. The king lives there, and so do many others."
    edits = [replace(EDITS[0], target=target), *EDITS[1:]]
    plain = EditEvaluator(model, tokenizer, edits, progress=False).evaluate()
    whole = EditEvaluator(model, tokenizer, edits, EvaluationConfig(contexts=["all"], probes=["all"]), progress=False)
    report = whole.evaluate()
    assert {name: report.results[name] for name in plain.results} == plain.results
    assert report.rows[: len(plain.rows)] != [] and len(report.rows) == len(whole.items)
    asked_prompts = [question.prompt for question in whole.encoder.questions()]
    assert len(set(asked_prompts)) == len(asked_prompts) == len({item.asked for item in whole.items})
    assert report.missing["reliability_chat_exact_match"] == "the tokenizer has no chat template"
