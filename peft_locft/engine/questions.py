"""Questions to a model, its answers, and where an answer ends: token ids only, no model."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import regex
import torch

# what ends an answer: a line break, and the full stops of all scripts; in English "." alone, as published. Question
# and exclamation marks end none there, so they end none in another script. The first in the list is Burmese, a comma.
STOPS = regex.compile(
    r"(?V1)[\n[\p{Sentence_Terminal}--[\u104A!?\u061F\u07F9\u1367\u1944\u1945\u203C\u203D\u2047-\u2049\u2CFA\u2CFB\u2E2E"
    r"\u2E53\u2E54\uA60F\uA6F7\uFE15\uFE16\uFE56\uFE57\uFF01\uFF1F\U00011143]]]"
)
UNTIL_EOS = sys.maxsize  # more stops than any answer has
LONGEST_CHARACTER = 4  # tokens of one byte
UNDECODABLE = "\ufffd"  # what a tokenizer decodes a part of a character to
# thoughts at the beginning of an answer, up to their end if they have one
THOUGHTS = re.compile(
    r"\s*[<\[](\w*think\w*|thoughts?|reasoning)[>\]](.*?[<\[]/\1[>\]]\s*)?", re.DOTALL | re.IGNORECASE
)


class Continuation(NamedTuple):
    """A text to score: `token_ids[start:]`, given the tokens before."""

    token_ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, the continuations to score (teacher-forced), and how long the answer may be.

    Args:
        prompt: token ids, at least one.
        scored: continuations of this prompt, or of a prompt that begins like it.
        guess: the probable beginning of the answer. It changes only the speed: a right guess is checked in the forward
            that reads the prompt, so nothing is left to decode.
        num_stops: the answer ends with this many stops, or with EOS. 0: ignore stops and EOS. `UNTIL_EOS`: ignore
            stops.
        max_new_tokens: the largest number of tokens in the answer; 0: no answer.
        sample: a number that makes otherwise equal questions differ, so that each gets its own answer.
    """

    prompt: tuple[int, ...]
    scored: tuple[Continuation, ...] = ()
    guess: tuple[int, ...] = ()
    num_stops: int = 1
    max_new_tokens: int = 32
    sample: int = 0


class Score(NamedTuple):
    """For each token of a continuation, given the tokens before: log p in nats, and the token of greedy decoding."""

    log_probs: list[float]
    predicted: list[int]


@dataclass(slots=True)
class Answer:
    """The answer to a question.

    Attributes:
        token_ids: the generated tokens, with the token that ends the answer.
        scores: one for each continuation in `Question.scored`.
    """

    token_ids: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


def end_token_ids(tokenizer: Any, model: Any = None) -> frozenset[int]:
    """Return the ids that end any answer: the tokenizer's EOS, and its special tokens that end the model's generation.

    Chat models often have several. A configuration's other ids are left out: a default may name any token.
    """
    generation = getattr(model, "generation_config", None)
    own, found = (_ids(getattr(each, "eos_token_id", None)) for each in (tokenizer, generation))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(own) | {each for each in found if each in added and added[each].special}


def _ids(value: Any) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def without_thoughts(text: str) -> str:
    """Return a generated answer without the thoughts before it; empty if they have no end.

    Example:
        >>> without_thoughts("<think>They ask about France.</think>\\n\\nLyon")
        'Lyon'
    """
    found = THOUGHTS.match(text)
    if found is None:
        return text
    return text[found.end() :] if found[2] else ""


class StopCounter:
    """Counts the stops in the text of tokens, to find where answers end. EOS ends any answer.

    Stops in thoughts before an answer do not count. A stop of several bytes, such as "。", may be several tokens.

    Args:
        tokenizer: the tokenizer.
        stops: a pattern of single characters.
        label: the model's name in messages.
        model: the model, which may have more tokens that end an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: str | regex.Pattern[str] = STOPS,
        label: str = "the model",
        model: Any = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_token_ids(tokenizer, model)
        self.label = label
        self.stops = regex.compile(stops)
        self._known: dict[int, float | None] = {}
        self._opens: dict[int, bool] = {}

    def __call__(self, token_ids: Sequence[int]) -> float:
        """Return the number of stops in the text of tokens; infinite if one of them ends any answer."""
        total, parts = 0.0, list[int]()
        for token_id in token_ids:
            count = self._of_token(token_id)
            if count is None:
                parts.append(token_id)
                continue
            total += count + self._of_parts(parts)
            parts.clear()
        return total + self._of_parts(parts)

    def _of_token(self, token_id: int) -> float | None:
        """Return the number of stops in one token; `None` if it has a part of a character only."""
        if token_id not in self._known:
            text = self.tokenizer.decode([token_id])
            is_end, is_part = token_id in self.end_ids, UNDECODABLE in text
            self._known[token_id] = math.inf if is_end else None if is_part else self._count(text)
        return self._known[token_id]

    def _of_parts(self, token_ids: list[int]) -> int:
        """Return the number of stops in tokens that are parts of characters; the last one may not be whole yet."""
        text = ""
        for end in range(len(token_ids), max(0, len(token_ids) - LONGEST_CHARACTER), -1):
            text = self.tokenizer.decode(token_ids[:end])
            if UNDECODABLE not in text:
                break
        return self._count(text)

    def _count(self, text: str) -> int:
        return len(self.stops.findall(text))

    def not_finite(self, question: Question) -> FloatingPointError:
        """Return the error for logits that are NaN or infinite."""
        prompt = self.tokenizer.decode(list(question.prompt))
        return FloatingPointError(
            f"The logits of {self.label} are NaN or infinite for the prompt {prompt!r}. Load the model in float32 "
            "or bfloat16, and check that its weights and the adapter's are finite."
        )

    def is_finished(self, question: Question, answer: Sequence[int]) -> bool:
        """Whether an answer to a question is complete."""
        if len(answer) >= question.max_new_tokens:
            return True
        return question.num_stops > 0 and self(self._spoken(answer)) >= question.num_stops

    def _spoken(self, answer: Sequence[int]) -> Sequence[int]:
        """Return the tokens behind the thoughts at the beginning of an answer, with EOS; all if there are none."""
        if not answer:
            return answer
        if answer[0] not in self._opens:
            self._opens[answer[0]] = self.tokenizer.decode([answer[0]]).lstrip()[:1] in ("", "<", "[")
        if not self._opens[answer[0]] or THOUGHTS.match(text := self.tokenizer.decode(list(answer))) is None:
            return answer
        num_spoken = len(without_thoughts(text))
        begin = next(
            n for n in range(len(answer), -1, -1) if len(self.tokenizer.decode(list(answer[n:]))) >= num_spoken
        )
        return [each for n, each in enumerate(answer) if n >= begin or each in self.end_ids]


# (B, V) logits, and for each row the index of its question and of the token in its answer, to (B,) token ids
Choice = Callable[[torch.Tensor, Sequence[tuple[int, int]]], torch.Tensor]


def greedy(logits: torch.Tensor, places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Choose the most probable token."""
    return logits.argmax(dim=-1)


@dataclass(frozen=True)
class TopK:
    """Samples from the `k` most probable tokens.

    The noise depends only on the seed, the question and the position, so an answer does not depend on its batch.
    """

    k: int
    seed: int = 0

    def __call__(self, logits: torch.Tensor, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        values, tokens = logits.float().topk(min(self.k, logits.shape[-1]), dim=-1)
        noise = torch.stack([self._noise(*place, values.shape[-1]) for place in places]).to(values.device)
        # the largest of log p + Gumbel noise is a sample of p
        return tokens.gather(-1, (values + noise).argmax(dim=-1, keepdim=True)).squeeze(-1)

    def _noise(self, question: int, step: int, size: int) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng((self.seed, question, step)).gumbel(size=size))
