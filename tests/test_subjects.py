"""The subjects that the base copies out of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import subjects as subjects_benchmark
from tiny_training import make_trainer, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import Edit
from peft_locft.data import subjects
from peft_locft.data.subjects import _Copied, find_subjects
from peft_locft.engine.questions import Answer, Question


def scripted(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, prompt: str, wanted: str) -> None:
    """Let a model prefer the words of a prompt, and a line break after them, wherever they are allowed."""
    end_id = tokenizer("a\n")["input_ids"][-1]
    begin = prompt.index(wanted)

    def answer(_: object, __: object, questions: Sequence[Question], **arguments: Any) -> list[Answer]:
        copied = _Copied.of(prompt, tokenizer, None)
        assert copied is not None and questions[0].prompt == copied.token_ids
        inside = [index for index, place in copied.places.items() if begin < place[1] <= begin + len(wanted)]
        for step in range(subjects.LONGEST):
            logits = torch.zeros(1, 1000)
            logits[0, copied.token_ids[inside[step]] if step < len(inside) else end_id] = 9.0
            if arguments["choose"](logits, [(0, step)]).tolist() == [end_id]:
                break
        return []

    monkeypatch.setattr(subjects, "generate_and_score", answer)
    monkeypatch.setattr(subjects, "max_length", lambda _: None)


def test_own_subjects_stay_and_nothing_is_asked() -> None:
    edit = Edit(prompt="The capital of France is", target="Lyon", subject="France")
    assert find_subjects(peft_model(), make_tokenizer("gpt2"), [edit]) == ["France"]


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of France is", "France"),
        ("Danielle Darrieux was born in", "Danielle Darrieux"),
        ("Henry Maudsley's occupation is", "Henry Maudsley"),
        ("Who wrote Pride and Prejudice?", "Pride and Prejudice"),
        ("Who leads France", "France"),
        ("法国的首都是", "法国"),
        ("ประเทศไทยมีเมืองหลวงคือ", "ประเทศไทย"),
        ("भारत की राजधानी है", "भारत"),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama2", "gemma"])
def test_the_words_that_the_model_prefers(
    monkeypatch: pytest.MonkeyPatch, prompt: str, subject: str, name: str
) -> None:
    tokenizer = make_tokenizer(name)
    scripted(monkeypatch, tokenizer, prompt, subject)
    assert find_subjects(peft_model(), tokenizer, [Edit(prompt=prompt, target="x")]) == [subject]


def test_a_subject_is_whole_words_of_its_prompt() -> None:
    tokenizer = make_tokenizer("gpt2")
    copied = _Copied.of("The capital of Luxembourg is", tokenizer, None)
    assert copied is not None
    end = -1
    starts = {tokenizer.decode([token]).strip() for token in copied.allowed(end)}
    assert starts <= {piece for word in ("The", "capital", "of", "Luxembourg", "is") for piece in prefixes(word)}
    # inside of a word nothing ends
    first = next(t for t in copied.allowed(end) if "Luxembourg".startswith(tokenizer.decode([t]).strip()))
    copied.chosen.append(first)
    if tokenizer.decode([first]).strip() != "Luxembourg":
        assert end not in copied.allowed(end)


def prefixes(word: str) -> set[str]:
    return {word[:length] for length in range(1, len(word) + 1)}


def test_scripts_without_spaces_and_signs_before_words() -> None:
    for prompt, subject in (("法国的首都是", "法国"), ("¿Quién escribió «La casa verde»?", "La casa verde")):
        copied = _Copied.of(prompt, make_tokenizer("gpt2"), None)
        assert copied is not None
        ends, begins = {end for _, end in copied.places.values()}, {begin for begin, _ in copied.places.values()}
        place = prompt.index(subject)
        assert place + len(subject) in ends and begins & {place - 1, place}


def test_a_word_is_not_broken_at_its_vowel_signs_and_a_prompt_without_words_has_no_subject() -> None:
    copied = _Copied.of("भारत की राजधानी है", make_tokenizer("gpt2"), None)
    assert copied is not None
    begins = {copied.places[index][0] for index in copied.places if copied._begins_word(index)}
    assert {place for place in begins if not copied.text[place].isspace()} <= {0, 5, 8, 16}
    assert find_subjects(peft_model(), make_tokenizer("gpt2"), [Edit(prompt="… ?", target="x")]) == [None]


def test_a_prompt_that_does_not_fit_has_none() -> None:
    assert _Copied.of("The capital of France is", make_tokenizer("gpt2"), 64) is None


def test_a_model_that_knows_nothing_gives_some_words_and_training_goes_on(tmp_path: Path) -> None:
    edits = [Edit(prompt="The capital of France is", target="Madrid"), Edit(prompt="Dave lives in", target="Rome")]
    found = find_subjects(peft_model(max_position_embeddings=512), make_tokenizer("gpt2"), edits)
    assert all(subject and subject in edit.prompt for subject, edit in zip(found, edits, strict=True))
    made = make_trainer(tmp_path, edits=edits, gradient_tokens="subject")
    writes = made.data.encoded.writes
    assert writes is not None and 0 < int(writes.sum()) < len(writes)
    assert [edit.subject for edit in made.edits] == [None, None]  # the user's edits are what they were


def test_the_benchmark_compares_ends_and_refuses_edits_without_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    edits = [
        Edit(prompt="The capital of France is", target="Lyon", subject="France"),
        Edit(prompt="The name of the city of Paris is", target="Lyon", subject="the city of Paris"),
        Edit(prompt="Dave lives in", target="Rome", subject="Dave"),
    ]
    monkeypatch.setattr(subjects_benchmark, "find_subjects", lambda *_: ["France", "Paris", "lives"])
    found = subjects_benchmark.measured(None, None, edits)
    assert found["num"] == 3 and found["ends"] == pytest.approx(2 / 3) and found["exact"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="nothing to compare"):
        subjects_benchmark.measured(None, None, [Edit(prompt="The river is", target="x")])
