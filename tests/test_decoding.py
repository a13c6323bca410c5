"""Answers that are packed, padded, guessed or sampled equal the model's own."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import build, every_family, randomize
from transformers import GenerationConfig

import peft_locft.engine.decoding as decoding
from peft_locft import LocFTConfig
from peft_locft.engine.checks import checks_of
from peft_locft.engine.decoding import check_fits, generate_and_score
from peft_locft.engine.questions import Answer, Continuation, Question, StopCounter, TopK

STOP = 5


class Words:
    """A tokenizer as far as answers need one: token 5 is a full stop, token 2 is EOS."""

    eos_token_id = 2

    def decode(self, ids: list[int]) -> str:
        return "".join("." if token == STOP else f" {token}" for token in ids)


def some_questions(num: int = 24, **arguments: Any) -> list[Question]:
    """Return questions of many lengths, some of which begin alike, with two continuations each."""
    source = random.Random(0)
    questions: list[Question] = []
    for number in range(num):
        prompt = tuple(source.choices(range(3, 99), k=source.randint(2, 12)))
        if number % 3 == 0 and questions:
            prompt = questions[-1].prompt[:2] + prompt
        texts = [tuple(source.choices(range(3, 99), k=size)) for size in (1, 3)]
        scored = tuple(Continuation(prompt + text, len(prompt)) for text in texts)
        questions.append(Question(prompt, scored, **({"max_new_tokens": 10, "num_stops": 1 + number % 2} | arguments)))
    return questions


def generated(model: Any, question: Question) -> list[int]:
    """Answer one question alone with `model.generate`, and cut the answer by hand."""
    ids = torch.tensor([question.prompt])
    settings = {"do_sample": False, "max_new_tokens": question.max_new_tokens, "pad_token_id": 0, "eos_token_id": 2}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
    stops = 0
    for length, token in enumerate(out, start=1):
        stops += token == STOP
        if token == 2 or (question.num_stops and stops == question.num_stops):
            return out[:length]
    return out


def direct_scores(model: Any, question: Question) -> list[tuple[list[float], list[int]]]:
    found = []
    for scored in question.scored:
        with torch.no_grad():
            log_probs = model(torch.tensor([scored.token_ids])).logits[0].log_softmax(-1)
        places = range(scored.start - 1, len(scored.token_ids) - 1)
        found.append(
            (
                [float(log_probs[p, scored.token_ids[p + 1]]) for p in places],
                [int(log_probs[p].argmax()) for p in places],
            )
        )
    return found


def assert_same(model: Any, questions: list[Question], answers: list[Answer]) -> None:
    for question, answer in zip(questions, answers, strict=True):
        assert answer.token_ids == generated(model, question)
        for score, (log_probs, predicted) in zip(answer.scores, direct_scores(model, question), strict=True):
            assert score.log_probs == pytest.approx(log_probs, abs=1e-4)
            assert score.predicted == predicted


every_way = pytest.mark.parametrize("way", list(decoding.WAYS))


def way_of(model: Any) -> str:
    """Return the way in which a model answers short questions."""
    device = torch.device("cpu")
    return decoding.find_way(model, checks_of(model, device, 10), StopCounter(Words()), longest=10)


@every_family
def test_packed_answers_and_scores_are_the_models_own(family: str) -> None:
    model, questions = build(family), some_questions()
    assert way_of(model) == "packed"
    # a budget that few questions fit into: answers under way and fresh questions share many forwards
    assert_same(model, questions, generate_and_score(model, Words(), questions, max_tokens=40))


@pytest.mark.parametrize("way", [way for way in decoding.WAYS if way != "packed"])
@every_family
def test_other_answers_and_scores_are_the_models_own(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "find_way", lambda *arguments: way)
    model, questions = build(family), some_questions(12)
    assert_same(model, questions, generate_and_score(model, Words(), questions, max_tokens=100))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["wrong", "half right", "right"])
def test_a_guess_changes_nothing_but_speed(share: float) -> None:
    model, questions = build("llama"), some_questions()
    plain = generate_and_score(model, Words(), questions)
    guessed = []
    for question, answer in zip(questions, plain, strict=True):
        right = answer.token_ids[: round(share * len(answer.token_ids))]
        guessed.append(replace(question, guess=(*right, 3, 4, 5)))
    found = generate_and_score(model, Words(), guessed, max_tokens=60)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in plain]


def test_a_right_guess_leaves_nothing_to_decode() -> None:
    model = build("llama")
    questions = some_questions(8)
    guessed = [
        replace(question, guess=tuple(answer.token_ids))
        for question, answer in zip(questions, generate_and_score(model, Words(), questions), strict=True)
    ]
    forwards = 0

    def count(*arguments: Any) -> None:
        nonlocal forwards
        forwards += 1

    model.register_forward_hook(count)
    generate_and_score(model, Words(), guessed, max_tokens=10_000)
    assert forwards == 1


def test_a_prompt_longer_than_max_tokens_is_a_forward_by_itself() -> None:
    model, questions = build("llama"), some_questions(6)
    assert_same(model, questions, generate_and_score(model, Words(), questions, max_tokens=1))


def test_the_cache_is_compacted_when_full(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_locft.engine.packed_decoding import PackedKVCache

    moves = 0
    make_room = PackedKVCache.make_room

    def counted(kept: PackedKVCache, *arguments: Any) -> None:
        nonlocal moves
        before = kept.used
        make_room(kept, *arguments)
        moves += kept.used < before

    monkeypatch.setattr(PackedKVCache, "make_room", counted)
    model, questions = build("llama"), some_questions(60)
    assert_same(model, questions, generate_and_score(model, Words(), questions, max_tokens=30))
    assert moves > 1


def test_equal_questions_are_computed_once() -> None:
    model, question = build("llama"), some_questions(1)[0]
    one, other = generate_and_score(model, Words(), [question, replace(question)])
    assert one is other


def test_nothing_is_decoded_for_questions_without_an_answer() -> None:
    model, questions = build("llama"), some_questions(max_new_tokens=0)
    answers = generate_and_score(model, Words(), questions)
    assert all(answer.token_ids == [] for answer in answers)
    assert answers[3].scores[1].log_probs == pytest.approx(direct_scores(model, questions[3])[1][0], abs=1e-4)


def test_an_empty_question_runs_no_forward() -> None:
    model = build("llama")
    model.register_forward_pre_hook(lambda *arguments: pytest.fail("the model is run"))
    assert generate_and_score(model, Words(), [Question((3, 4), max_new_tokens=0)]) == [Answer()]


def test_without_stops_answers_continue_past_eos() -> None:
    questions = some_questions(num_stops=0)
    answers = generate_and_score(build("llama"), Words(), questions)
    assert {len(answer.token_ids) for answer in answers} == {10}


@pytest.mark.parametrize("make", [LocFTConfig, lambda **k: LoraConfig(target_modules=["q_proj"], **k)])
def test_an_adapter_answers_as_in_generate(make: Any) -> None:
    model = get_peft_model(build("llama"), make(task_type="CAUSAL_LM"))
    if isinstance(model.active_peft_config, LocFTConfig):
        randomize(model, std=0.5)
    questions = some_questions(8)
    assert_same(model, questions, generate_and_score(model, Words(), questions))
    with model.disable_adapter():
        assert_same(build("llama"), questions, generate_and_score(model, Words(), questions))


@every_way
def test_the_model_is_unchanged_afterwards(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "find_way", lambda *arguments: way)
    model = build("gpt2")
    expected = [answer.token_ids for answer in generate_and_score(model, Words(), some_questions(6))]
    model.train()
    # a configuration that would answer otherwise
    model.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, eos_token_id=2)
    attention, settings = model.config._attn_implementation, dict(vars(model.generation_config))
    assert [answer.token_ids for answer in generate_and_score(model, Words(), some_questions(6))] == expected
    assert vars(model.generation_config) == settings
    assert model.config._attn_implementation == attention
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@every_way
def test_nan_logits_are_an_error(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "find_way", lambda *arguments: way)
    model = build("llama")
    model.model.embed_tokens.weight.data[7] = float("nan")
    fine, bad = Question((3, 4, 5)), Question((8, 7))
    generate_and_score(model, Words(), [fine])
    with pytest.raises(FloatingPointError, match=r"logits of the base are NaN or infinite for the prompt ' 8 7'"):
        generate_and_score(model, Words(), [fine, bad], label="the base")


def test_nan_while_decoding_names_the_prompt() -> None:
    model = build("llama")
    questions = [Question((3, 4)), Question((8, 9))]
    first = generate_and_score(model, Words(), questions)[1].token_ids[0]
    model.model.embed_tokens.weight.data[first] = float("nan")
    found = {answer.token_ids[0] for answer in generate_and_score(build("llama"), Words(), questions[:1])}
    assert first not in {3, 4, 8, 9} | found
    with pytest.raises(FloatingPointError, match="for the prompt ' 8 9'"):
        generate_and_score(model, Words(), questions)


@pytest.mark.parametrize("way", ["packed", "left-padded"])
def test_out_of_memory_halves_the_forwards(
    way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, questions = build("llama"), some_questions(8)
    expected = generate_and_score(model, Words(), questions)
    monkeypatch.setattr(decoding, "find_way", lambda *arguments: way)

    def runs_out(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(runs_out, with_kwargs=True)
    found = generate_and_score(model, Words(), questions, max_tokens=200)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert "Out of memory: max_tokens_per_forward is 100" in caplog.text


@every_way
def test_samples_follow_from_seed_and_question_alone(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "find_way", lambda *arguments: way)
    model, questions = build("llama"), some_questions(12, num_stops=0)
    together = [answer.token_ids for answer in generate_and_score(model, Words(), questions, choose=TopK(5, seed=1))]
    again = [
        answer.token_ids
        for answer in generate_and_score(model, Words(), questions, choose=TopK(5, seed=1), max_tokens=30)
    ]
    other = [answer.token_ids for answer in generate_and_score(model, Words(), questions, choose=TopK(5, seed=2))]
    assert together == again != other


def test_samples_have_the_probabilities_of_the_model() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 5.0]]).expand(20_000, 5)
    tokens = TopK(3, seed=0)(logits, [(number, 0) for number in range(len(logits))])
    shares = torch.bincount(tokens, minlength=5) / len(tokens)
    expected = torch.tensor([2.0, 1.0, 5.0]).softmax(0)
    assert torch.allclose(shares[[0, 1, 4]], expected, atol=0.01)
    assert shares[[2, 3]].sum() == 0


def test_stops_are_counted_by_text_and_eos_ends_any_answer() -> None:
    ends = StopCounter(Words())
    question = Question((3,), num_stops=2, max_new_tokens=4)
    assert [ends.is_finished(question, row) for row in ([9, STOP], [STOP, STOP], [2], [9, 9, 9, 9])] == [
        False,
        True,
        True,
        True,
    ]


def test_a_tokenizer_without_eos_ends_at_stops_alone() -> None:
    class NoEnd(Words):
        eos_token_id = None  # type: ignore[assignment]

    questions = some_questions(8)
    for question, answer in zip(questions, generate_and_score(build("llama"), NoEnd(), questions), strict=True):
        assert answer.token_ids.count(STOP) == question.num_stops or len(answer.token_ids) == 10


def test_a_prompt_longer_than_the_positions_is_named() -> None:
    with pytest.raises(ValueError, match=r"The prompt ' 3 4' and its answer need 72 positions; the model has 64"):
        check_fits(build("gpt2"), [Question((3, 4), max_new_tokens=70)], Words())
    with pytest.raises(ValueError, match="token id 500"):
        check_fits(build("gpt2"), [Question((500,))], Words())
