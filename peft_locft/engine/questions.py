"""What a model is asked, what it answers, and where an answer ends; token ids alone, no model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

STOPS = (".", "\n")
UNTIL_EOS = sys.maxsize  # more stops than an answer can have


class Continuation(NamedTuple):
    """A text whose probability is wanted: `token_ids[start:]`, given what comes before."""

    token_ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, with the continuations to score, teacher-forced, and how to answer it.

    Args:
        prompt: token ids, at least one.
        scored: continuations, of this prompt or one that begins like it.
        guess: what the answer may begin with. It changes nothing but speed: a right one is checked in the forward that
            reads the prompt, so that nothing is left to decode.
        num_stops: the answer ends with this stop, or with EOS; 0 does not look for stops and goes on past EOS;
            `UNTIL_EOS` goes on past stops alone.
        max_new_tokens: in an answer at most; 0 for no answer.
        sample: tells apart questions that are equal otherwise, so that each has an answer of its own.
    """

    prompt: tuple[int, ...]
    scored: tuple[Continuation, ...] = ()
    guess: tuple[int, ...] = ()
    num_stops: int = 1
    max_new_tokens: int = 32
    sample: int = 0


class Score(NamedTuple):
    """A continuation's tokens, each given those before it: log p in nats, and what greedy decoding would say."""

    log_probs: list[float]
    predicted: list[int]


@dataclass(slots=True)
class Answer:
    """Attributes:
    token_ids: as decoded, the token that ends it included.
    scores: one for each of `Question.scored`.
    """

    token_ids: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


class StopCounter:
    """Says where answers end: counts the stops in a token's text; EOS ends any answer."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = STOPS, whose: str = "the model") -> None:
        self.tokenizer = tokenizer
        self.whose = whose
        self.stops = stops
        self._known: dict[int, float] = {}

    def __call__(self, token_id: int) -> float:
        if token_id not in self._known:
            text = self.tokenizer.decode([token_id])
            is_end = token_id == self.tokenizer.eos_token_id
            self._known[token_id] = math.inf if is_end else sum(text.count(stop) for stop in self.stops)
        return self._known[token_id]

    def not_finite(self, question: Question) -> FloatingPointError:
        """Return the error for logits that are NaN or infinite."""
        prompt = self.tokenizer.decode(list(question.prompt))
        return FloatingPointError(
            f"The logits of {self.whose} are NaN or infinite for the prompt {prompt!r}: nothing it answers means "
            "anything. Load it in float32 or bfloat16, and check that its weights, and the adapter's, are finite."
        )

    def is_whole(self, question: Question, answer: Sequence[int]) -> bool:
        """Whether an answer to a question has come to its end."""
        if len(answer) >= question.max_new_tokens:
            return True
        return question.num_stops > 0 and sum(map(self, answer)) >= question.num_stops


# (B, V) logits, and for each row the number of its question and of the token in its answer, to (B,) token ids
Choice = Callable[[torch.Tensor, Sequence[tuple[int, int]]], torch.Tensor]


def greedy(logits: torch.Tensor, places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Choose the most probable token."""
    return logits.argmax(dim=-1)


@dataclass(frozen=True)
class TopK:
    """Chooses among the `k` most probable tokens by their probability.

    The noise follows from seed, question and token, so that an answer does not depend on what else is in its batch.
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
