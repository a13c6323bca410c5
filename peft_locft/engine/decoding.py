"""Generate answers to many questions, and score given continuations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import regex
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from ..tuner.presets import find_decoder_layers
from .checks import ModelChecks, checks_of, why_not_laid_out
from .forward_plan import ForwardPlan
from .memory import MOST_TOKENS, run_halving
from .model_state import check_vocabulary, evaluating, max_length
from .packed_decoding import PackedDecoder, num_tokens
from .padding import batches_by_length, pad_right
from .questions import STOPS, Answer, Choice, Continuation, Question, Score, StopCounter, greedy
from .tail import Tail, logits_at
from .trial import thinned

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
    stops: str | regex.Pattern[str] = STOPS,
) -> list[Answer]:
    """Return an answer to each question: generated tokens, and scores of continuations.

    Prompts are packed, not padded; shared prefixes are computed once; a finished answer makes room for the next
    question. For a model whose numbers this changes, prompts are padded on the left and answered by `model.generate`,
    or run without padding, or without a KV cache. All give the same answers, up to floating-point rounding.

    Args:
        model: a decoder-only language model. It is in evaluation mode during the call.
        tokenizer: the model's tokenizer.
        questions: equal questions are computed once.
        choose: chooses the next token from logits; [`TopK`] samples.
        max_tokens: the largest number of tokens in one forward; `None`: chosen by the device. It is halved, with a
            warning, when memory runs out.
        label: the model's name in messages, such as "the base".
        progress: show a progress bar, if there are at least 100 questions.
        stops: a pattern of the single characters that `Question.num_stops` counts.

    Returns:
        The answers, in the order of the questions; equal questions share one object.

    Raises:
        FloatingPointError: if the model's logits are NaN or infinite.
        ValueError: if the model is not causal.
    """
    distinct = [question for question in dict.fromkeys(questions) if question.scored or question.max_new_tokens]
    if not distinct:
        return [Answer() for _ in questions]
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    most = MOST_TOKENS_ON_CPU if embedding.device.type == "cpu" else MOST_TOKENS
    max_tokens = max_tokens or max(1, min(most, MOST_LOGITS // embedding.shape[0]))
    ends = StopCounter(tokenizer, stops, label=label, model=model)

    longest = max(map(_length, distinct))
    checks = checks_of(model, embedding.device, longest)
    way = find_way(model, checks, ends, longest)
    pads = way not in ("packed", "whole") and _can_pad(model, checks)

    def answer_all(max_tokens: int) -> list[Answer]:
        hidden = not progress or len(distinct) < FEWEST_WITH_PROGRESS
        answering = Answering(model, embedding.device, max_tokens, ends, choose, pads)
        with tqdm(total=len(distinct), desc=f"running {label}", leave=False, disable=hidden) as bar, evaluating(model):
            return WAYS[way](answering, distinct, bar)

    answers, _ = run_halving(answer_all, max_tokens, smallest=1, option="max_tokens_per_forward")
    by_question = dict(zip(distinct, answers, strict=True))
    return [by_question.get(question) or Answer() for question in questions]


def _length(question: Question) -> int:
    """Return the number of tokens of the longest sequence that a question needs."""
    scored = (len(each.token_ids) for each in question.scored)
    return max(len(question.prompt) + question.max_new_tokens, *scored, 0)


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


# ---------------------------------------------------------------------- ways to answer, the fastest first


@dataclass
class Answering:
    """Answers questions in one of several ways, which differ in what they leave out.

    Args:
        model: the model, in evaluation mode.
        device: where forwards run.
        max_tokens: the largest number of tokens in one forward.
        ends: finds where answers end.
        choose: chooses the next token from logits.
        pads: score continuations of one prompt together, padded on the right.
    """

    model: Any
    device: torch.device
    max_tokens: int
    ends: StopCounter
    choose: Choice
    pads: bool = True

    def packed(self, questions: Sequence[Question], progress: tqdm[Any]) -> list[Answer]:
        """Pack prompts, and continue them with a KV cache without padding."""
        _, layers = find_decoder_layers(self.model)
        decoder = PackedDecoder(self.model, layers, self.device, self.max_tokens, self.ends, self.choose)
        return decoder.answer(questions, progress)

    def left_padded(self, questions: Sequence[Question], progress: tqdm[Any]) -> list[Answer]:
        """Pad prompts on the left, and continue them with `model.generate`."""
        batches = batches_by_length(list(map(_padded_length, questions)), self.max_tokens)
        return self._by_batches(questions, batches, progress, self._generate)

    def unpadded(self, questions: Sequence[Question], progress: tqdm[Any]) -> list[Answer]:
        """Continue prompts of the same length together, with `model.generate`."""
        by_length: dict[int, list[int]] = {}
        for number, question in enumerate(questions):
            by_length.setdefault(len(question.prompt), []).append(number)
        batches = [
            [numbers[index] for index in batch]
            for numbers in by_length.values()
            for batch in batches_by_length([_padded_length(questions[number]) for number in numbers], self.max_tokens)
        ]
        return self._by_batches(questions, batches, progress, self._generate)

    def alone(self, questions: Sequence[Question], progress: tqdm[Any]) -> list[Answer]:
        """Continue one prompt at a time, with `model.generate`."""
        return self._by_batches(questions, [[number] for number in range(len(questions))], progress, self._generate)

    def whole(self, questions: Sequence[Question], progress: tqdm[Any]) -> list[Answer]:
        """Run the whole model on every sequence alone, for every token: slow, but the model's own numbers."""
        return self._by_batches(questions, [[number] for number in range(len(questions))], progress, self._run_whole)

    def _by_batches(
        self,
        questions: Sequence[Question],
        batches: Sequence[Sequence[int]],
        progress: tqdm[Any],
        generate: Callable[[Sequence[Question], Sequence[Answer], Sequence[int]], None],
    ) -> list[Answer]:
        answers = [Answer() for _ in questions]
        for batch in batches:
            for number in batch:
                answers[number].scores = self._scores(questions[number])
            to_generate = [number for number in batch if questions[number].max_new_tokens]
            if to_generate:
                generate(questions, answers, to_generate)
            progress.update(len(batch))
        return answers

    def _scores(self, question: Question) -> list[Score]:
        """Score the continuations of one question, in one forward if they may be padded."""
        scored = question.scored
        parts = [scored] if self.pads else [(each,) for each in scored]
        return [score for part in parts if part for score in self._score(question, part)]

    def _score(self, question: Question, scored: Sequence[Continuation]) -> list[Score]:
        rows = [torch.tensor(each.token_ids) for each in scored]
        input_ids, mask = pad_right(rows, self.device)
        where = [(r, t) for r, each in enumerate(scored) for t in range(each.start, len(each.token_ids))]
        row, column = torch.tensor(where, device=self.device).unbind(dim=1)
        inputs = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
        logits = logits_at(self.model, row, column - 1, inputs).logits.float()
        self._check_finite(logits, [question] * len(logits))
        log_probs = iter((logits.gather(1, input_ids[row, column, None])[:, 0] - logits.logsumexp(dim=-1)).tolist())
        predicted = iter(logits.argmax(dim=-1).tolist())
        lengths = [len(each.token_ids) - each.start for each in scored]
        return [Score([next(log_probs) for _ in range(n)], [next(predicted) for _ in range(n)]) for n in lengths]

    def _check_finite(self, logits: torch.Tensor, questions: Sequence[Question]) -> None:
        bad = (~logits.amax(dim=-1).isfinite()).nonzero().flatten().tolist()
        if bad:
            raise self.ends.not_finite(questions[bad[0]])

    def _run_whole(self, questions: Sequence[Question], answers: Sequence[Answer], batch: Sequence[int]) -> None:
        for number in batch:
            question, tokens = questions[number], answers[number].token_ids
            while not self.ends.is_finished(question, tokens):
                input_ids = torch.tensor([[*question.prompt, *tokens]], device=self.device)
                inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
                last = torch.tensor([input_ids.shape[1] - 1], device=self.device)
                logits = logits_at(self.model, torch.zeros_like(last), last, inputs).logits.float()
                self._check_finite(logits, [question])
                tokens.append(int(self.choose(logits, [(number, len(tokens))])))

    def _generate(self, questions: Sequence[Question], answers: Sequence[Answer], batch: Sequence[int]) -> None:
        """Answer a batch with `model.generate`, padded on the left, until every answer ends."""
        batch_questions = [questions[number] for number in batch]
        prompts = [list(question.prompt) for question in batch_questions]
        width = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        check_finite, choose, ends = self._check_finite, self.choose, self.ends

        class ChoiceProcessor(LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                check_finite(scores, batch_questions)
                tokens = choose(scores, [(number, input_ids.shape[1] - width) for number in batch])
                return torch.full_like(scores, -math.inf).scatter(1, tokens[:, None], 0.0)

        class EndOfAnswers(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                rows = zip(batch_questions, input_ids[:, width:].tolist(), strict=True)
                return torch.tensor(
                    [ends.is_finished(question, row) for question, row in rows], device=input_ids.device
                )

        # the model's own configuration may sample, or penalize repetition; `evaluating` restores it
        own = vars(self.model.generation_config)
        own.clear()
        own.update(vars(GenerationConfig(pad_token_id=0)))
        generated = self.model.generate(
            input_ids=input_ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=max(question.max_new_tokens for question in batch_questions),
            do_sample=False,
            logits_processor=[ChoiceProcessor()],
            stopping_criteria=[EndOfAnswers()],
        )
        for number, question, row in zip(batch, batch_questions, generated[:, width:].tolist(), strict=True):
            length = next((n for n in range(1, len(row)) if ends.is_finished(question, row[:n])), len(row))
            answers[number].token_ids = row[:length]


def _padded_length(question: Question) -> int:
    """Return the tokens of a question without its guess, which is not read: the base and the edited model, which have
    other guesses, answer the same batches and round in the same way."""
    return num_tokens(question) - len(question.guess)


Way = Callable[[Answering, Sequence[Question], "tqdm[Any]"], "list[Answer]"]
WAYS: dict[str, Way] = {
    "packed": Answering.packed,
    "left-padded": Answering.left_padded,
    "unpadded": Answering.unpadded,
    "alone": Answering.alone,
    "whole": Answering.whole,
}
STEPS = (4, 4, 3, 3)  # tokens that continue each sequence of a trial


def find_way(model: nn.Module, checks: ModelChecks, ends: StopCounter, longest: int) -> str:
    """Return the name of the fastest way to answer that gives the model's own logits.

    Args:
        model: the model, in evaluation mode.
        checks: of the model.
        ends: finds where answers end.
        longest: the largest number of tokens in a prompt and its answer.
    """
    *shorter, whole = WAYS
    if checks.why_alone(longest) is None:
        for name in shorter:
            if checks.once(("answers", name), partial(_why_not, name, model, checks, ends)) is None:
                return name
    return whole


def _why_not(name: str, model: nn.Module, checks: ModelChecks, ends: StopCounter) -> str | None:
    """Return why a way to answer does not give the model's own logits on several prompts, over several tokens."""
    if name == "packed" and not _can_pack(model, checks):
        return "prompts cannot be packed"
    trial, device = checks.trial, checks.device
    # two prompts have the same length, and share a beginning
    ends_at = [len(trial.rows[1]), *map(len, trial.rows[1:])]
    steps = [min(number, max(1, end - 1)) for number, end in zip(STEPS, ends_at, strict=True)]
    starts = [max(1, end - number) for number, end in zip(steps, ends_at, strict=True)]
    questions = [
        Question(row[:start], num_stops=0, max_new_tokens=num, sample=number)
        for number, (row, start, num) in enumerate(zip(trial.rows, starts, steps, strict=True))
    ]
    found: dict[tuple[int, int], torch.Tensor] = {}

    def follow(logits: torch.Tensor, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Choose the sequences' own tokens, and note the logits."""
        found.update(zip(places, thinned(logits), strict=True))
        rows = [(trial.rows[number], starts[number] + step) for number, step in places]
        return torch.tensor([row[min(place, len(row) - 1)] for row, place in rows], device=logits.device)

    def find() -> str | None:
        # two prompts in a batch; packed, they are continued while the others are read
        answering = Answering(model, device, 2 * len(trial.rows[1]), ends, follow)
        with tqdm(disable=True) as hidden:
            WAYS[name](answering, questions, hidden)
        expected = zip(checks.trial.expected, starts, steps, strict=True)
        own = [logits[start - 1 :][:num] for logits, start, num in expected]
        new = [torch.stack([found[number, step] for step in range(num)]) for number, num in enumerate(steps)]
        return checks.trial.why_other(new, own)

    return checks.why_not(f"{name} answers", model, find)


def _can_pack(model: nn.Module, checks: ModelChecks) -> bool:
    try:
        _, layers = find_decoder_layers(model)
    except ValueError:
        return False
    return why_not_laid_out(model, ForwardPlan(Tail(layers, 0), checks.trial.tree, checks.device), checks) is None


def _can_pad(model: nn.Module, checks: ModelChecks) -> bool:
    plan = ForwardPlan(Tail(nn.ModuleList(), 0), checks.trial.tree, checks.device, layout="masked")
    return why_not_laid_out(model, plan, checks) is None
