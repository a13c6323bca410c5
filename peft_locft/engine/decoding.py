"""Generate answers to many questions, and score given continuations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from ..tuner.presets import find_decoder_layers
from .forward_plan import ForwardPlan, find_packing
from .memory import MOST_TOKENS, run_halving
from .model_state import check_vocabulary, evaluating, max_length
from .packed_decoding import PackedDecoder, num_tokens
from .padding import batches_by_length, pad_right
from .prefix_tree import PrefixTree
from .questions import Answer, Choice, Question, Score, StopCounter, greedy
from .tail import Tail, logits_at

MOST_TOKENS_ON_CPU = 512
MOST_LOGITS = 2**29  # of one forward: 2 GiB in float32
FEWEST_WITH_PROGRESS = 100  # questions


def generate_and_score(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    choose: Choice = greedy,
    max_tokens: int | None = None,
    label: str = "the model",
    progress: bool = True,
) -> list[Answer]:
    """Return an answer to each question: generated tokens, and scores of continuations.

    Prompts are packed, not padded; shared prefixes are computed once; a finished answer makes room for the next
    question. If the model does not use transformers' attention interface, questions are padded and answered by
    `model.generate`. Both give the same answers, up to floating-point rounding.

    Args:
        model: a decoder-only language model. It is in evaluation mode during the call.
        tokenizer: the model's tokenizer.
        questions: equal questions are computed once.
        choose: chooses the next token from logits; [`TopK`] samples.
        max_tokens: the largest number of tokens in one forward; `None`: chosen by the device. It is halved, with a
            warning, when memory runs out.
        label: the model's name in messages, such as "the base".
        progress: show a progress bar, if there are at least 100 questions.

    Returns:
        The answers, in the order of the questions; equal questions share one object.

    Raises:
        FloatingPointError: if the model's logits are NaN or infinite.
    """
    distinct = [question for question in dict.fromkeys(questions) if question.scored or question.max_new_tokens]
    if not distinct:
        return [Answer() for _ in questions]
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    most = MOST_TOKENS_ON_CPU if embedding.device.type == "cpu" else MOST_TOKENS
    max_tokens = max_tokens or max(1, min(most, MOST_LOGITS // embedding.shape[0]))
    ends = StopCounter(tokenizer, label=label, model=model)

    def answer_all(max_tokens: int) -> list[Answer]:
        hidden = not progress or len(distinct) < FEWEST_WITH_PROGRESS
        with tqdm(total=len(distinct), desc=f"running {label}", leave=False, disable=hidden) as bar, evaluating(model):
            return _answer(model, distinct, embedding.device, max_tokens, ends, choose, bar)

    answers, _ = run_halving(answer_all, max_tokens, smallest=1, option="max_tokens_per_forward")
    by_question = dict(zip(distinct, answers, strict=True))
    return [by_question.get(question) or Answer() for question in questions]


def _answer(
    model: nn.Module,
    questions: Sequence[Question],
    device: torch.device,
    max_tokens: int,
    ends: StopCounter,
    choose: Choice,
    progress: tqdm[Any],
) -> list[Answer]:
    layers = _packable_layers(model, questions, device)
    if layers is not None:
        return PackedDecoder(model, layers, device, max_tokens, ends, choose).answer(questions, progress)
    return _answer_padded(model, questions, device, max_tokens, ends, choose, progress)


def check_fits(model: nn.Module, questions: Sequence[Question], tokenizer: Any) -> None:
    """Check that a model's vocabulary has the tokens of all questions, and that prompts and answers fit its positions.

    Raises:
        ValueError: if they do not; it names the first prompt that is too long.
    """
    most = max_length(model)
    largest = 0
    for question in questions:
        largest = max(largest, *question.prompt, *(token for scored in question.scored for token in scored.token_ids))
        needed = max(
            len(question.prompt) + question.max_new_tokens, *(len(each.token_ids) for each in question.scored), 0
        )
        if most is not None and needed > most:
            raise ValueError(
                f"The prompt {tokenizer.decode(list(question.prompt))!r} and its answer need {needed} positions; the "
                f"model has {most}. Shorten the prompt, or lower max_new_tokens."
            )
    check_vocabulary(model, torch.tensor(largest))


def _packable_layers(model: nn.Module, questions: Sequence[Question], device: torch.device) -> nn.ModuleList | None:
    """Return the decoder layers; `None` if packing changes the logits of a short, a middle or a long prompt."""
    try:
        _, layers = find_decoder_layers(model)
    except ValueError:
        return None
    by_length = sorted({question.prompt for question in questions}, key=len)
    # the tree leaves out the last token of each row
    trial = [(*prompt, 0) for prompt in {by_length[0], by_length[len(by_length) // 2], by_length[-1]}]
    tokens = torch.tensor([token for prompt in trial for token in prompt])
    offsets = torch.tensor([0, *map(len, trial)]).cumsum(0)
    numbers = torch.arange(len(trial))
    tree = PrefixTree.of(tokens, offsets, numbers)
    found = find_packing(model, ForwardPlan(Tail(layers, 0), tree, device), numbers, narrow=False)
    return layers if found.packed else None


# ---------------------------------------------------------------------- padded, for attention of a model's own


def _answer_padded(
    model: nn.Module,
    questions: Sequence[Question],
    device: torch.device,
    max_tokens: int,
    ends: StopCounter,
    choose: Choice,
    progress: tqdm[Any],
) -> list[Answer]:
    answers = [Answer() for _ in questions]
    for batch in batches_by_length([num_tokens(question) for question in questions], max_tokens):
        for number in batch:
            answers[number].scores = _score(model, questions[number], device, ends)
        to_generate = [number for number in batch if questions[number].max_new_tokens]
        if to_generate:
            _generate(model, questions, answers, to_generate, device, ends, choose)
        progress.update(len(batch))
    return answers


def _score(model: nn.Module, question: Question, device: torch.device, ends: StopCounter) -> list[Score]:
    """Score the continuations of one question in one forward, padded on the right."""
    if not question.scored:
        return []
    rows = [torch.tensor(scored.token_ids) for scored in question.scored]
    input_ids, mask = pad_right(rows, device)
    where = [(r, t) for r, scored in enumerate(question.scored) for t in range(scored.start, len(scored.token_ids))]
    row, column = torch.tensor(where, device=device).unbind(dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
    logits = logits_at(model, row, column - 1, inputs).logits.float()
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise ends.not_finite(question)
    log_probs = iter((logits.gather(1, input_ids[row, column, None])[:, 0] - logits.logsumexp(dim=-1)).tolist())
    predicted = iter(logits.argmax(dim=-1).tolist())
    lengths = [len(scored.token_ids) - scored.start for scored in question.scored]
    return [Score([next(log_probs) for _ in range(n)], [next(predicted) for _ in range(n)]) for n in lengths]


def _generate(
    model: Any,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    batch: Sequence[int],
    device: torch.device,
    ends: StopCounter,
    choose: Choice,
) -> None:
    """Answer a batch with `model.generate`, padded on the left, until every answer ends."""
    batch_questions = [questions[number] for number in batch]
    prompts = [list(question.prompt) for question in batch_questions]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    class ChoiceProcessor(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            bad = (~scores.amax(dim=-1).isfinite()).nonzero().flatten().tolist()
            if bad:
                raise ends.not_finite(batch_questions[bad[0]])
            tokens = choose(scores, [(number, input_ids.shape[1] - width) for number in batch])
            return torch.full_like(scores, -math.inf).scatter(1, tokens[:, None], 0.0)

    class EndOfAnswers(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            rows = zip(batch_questions, input_ids[:, width:].tolist(), strict=True)
            return torch.tensor([ends.is_finished(question, row) for question, row in rows], device=input_ids.device)

    # the model's own configuration may sample, or penalize repetition; `evaluating` restores it
    own = vars(model.generation_config)
    own.clear()
    own.update(vars(GenerationConfig(pad_token_id=0)))
    generated = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max(question.max_new_tokens for question in batch_questions),
        do_sample=False,
        logits_processor=[ChoiceProcessor()],
        stopping_criteria=[EndOfAnswers()],
    )
    for number, question, row in zip(batch, batch_questions, generated[:, width:].tolist(), strict=True):
        length = next((n for n in range(1, len(row)) if ends.is_finished(question, row[:n])), len(row))
        answers[number].token_ids = row[:length]
