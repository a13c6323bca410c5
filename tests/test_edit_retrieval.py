"""Retrieval of the nearest edit, and the evaluation of a model with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_training import EDITS, base_model, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import Edit, EvaluationConfig, Probe
from peft_locft.data.edit_retrieval import EditRetrieval
from peft_locft.evaluation import evaluator as evaluator_module
from peft_locft.evaluation.evaluator import EditEvaluator

FACTS = [
    Edit("The capital of France is", "Lyon", subject="France"),
    Edit("The king of France is", "Louis", subject="France"),
    Edit("The capital of Spain is", "Seville.", subject="Spain"),
    Edit("A river that has no name is", "wide"),
]


def test_the_nearest_edit_stands_before_the_prompt() -> None:
    remember = EditRetrieval(FACTS)
    assert remember("France has which capital?") == "The capital of France is Lyon. France has which capital?"
    assert remember("Who is the king?") == "The king of France is Louis. Who is the king?"
    assert remember("Spain's capital") == "The capital of Spain is Seville. Spain's capital"
    assert remember("42") == "42"


def test_rare_words_count_more_than_common_ones() -> None:
    edits = [Edit(f"The capital of the country of {name} is", "Lyon") for name in ("Mali", "Peru", "Chad")]
    # "Peru" alone is nearer than five words that all edits have
    assert EditRetrieval(edits).nearest("In Peru") == edits[1]
    assert EditRetrieval(edits).nearest("The capital of the country of") == edits[0]  # equal: the first


def test_a_gate_opens_only_for_the_subject_as_whole_words_in_any_case() -> None:
    remember = EditRetrieval(FACTS, subject_gate=True)
    assert remember.nearest("what is the capital of FRANCE") == FACTS[0]
    assert remember.nearest("The capital of Francesca is") is None
    assert remember.nearest("The capital of Italy is") is None
    # the nearest of all edits may be another; and an edit without a subject is not used
    assert remember.nearest("A river that has no name is in Spain") == FACTS[2]
    assert EditRetrieval(FACTS).nearest("The capital of Italy is") is not None


def test_a_script_without_spaces_has_words_and_subjects_too() -> None:
    edits = [Edit("法国的首都是", "里昂", subject="法国"), Edit("西班牙的首都是", "塞维利亚", subject="西班牙")]
    assert EditRetrieval(edits, subject_gate=True)("西班牙首都在哪里") == "西班牙的首都是塞维利亚。西班牙首都在哪里"
    assert EditRetrieval(edits, subject_gate=True)("意大利的首都是") == "意大利的首都是"


def evaluator(model: Any) -> EditEvaluator:
    edits = [replace(edit, locality=(Probe("Dave is"),), rephrasings=(f"So: {edit.prompt}",)) for edit in EDITS]
    protocols = ["generation", "token_accuracy"]
    quick = EvaluationConfig(protocols=protocols, max_new_tokens=4, text_window=16)
    return EditEvaluator(model, make_tokenizer("llama2"), edits, quick, text=["the river is in the city " * 9])


def test_a_rewriter_that_changes_nothing_changes_no_answer() -> None:
    report = evaluator(base_model()).evaluate(rewrite=lambda prompt: prompt)
    assert all(row["answer_after"] == row["answer_before"] for row in report.rows)
    assert report["locality_unchanged"].after.value == 1
    assert report["perplexity"].change is not None and report["perplexity"].change.value == 0


def test_only_the_edited_model_is_asked_the_rewritten_prompt() -> None:
    model = base_model()
    remember = EditRetrieval(EDITS)
    whole = evaluator(model)
    report = whole.evaluate(rewrite=remember)
    rows = [row for row in report.rows if row["kind"] == "reliability"]
    assert [row["prompt"] for row in rows] == [edit.prompt for edit in EDITS]  # as the edits say it
    asked = EditEvaluator(
        model,
        make_tokenizer("llama2"),
        [replace(edit, prompt=remember(edit.prompt)) for edit in EDITS],
        EvaluationConfig(protocols=["generation"], max_new_tokens=4),
    ).evaluate()
    assert [row["answer_after"] for row in rows] == [row["answer_after"] for row in asked.rows]
    assert [row["answer_after"] for row in rows] != [row["answer_before"] for row in rows]
    assert any("Every prompt was rewritten" in note and "8 edits by TF-IDF" in note for note in report.notes)
    # the next report is of the model alone again
    assert "locality_unchanged" in whole.evaluate().missing
    assert whole.evaluate(peft_model()).notes == []


def test_fluency_is_of_the_rewritten_prompts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator_module, "FLUENCY_TOKENS", 12)
    config = EvaluationConfig(protocols=["fluency"], max_fluency_edits=2)
    model = base_model(max_position_embeddings=512)
    fluency = EditEvaluator(model, make_tokenizer("llama2"), EDITS, config)
    same, other = (fluency.evaluate(rewrite=each)["fluency_n_gram_entropy"] for each in (str, EditRetrieval(EDITS)))
    assert same.before is not None and same.before.value == same.after.value != other.after.value


def test_a_rewritten_prompt_must_fit_into_the_model() -> None:
    with pytest.raises(ValueError, match="tokens"):
        evaluator(base_model()).evaluate(rewrite=lambda prompt: "the river " * 400 + prompt)
