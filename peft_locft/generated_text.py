"""What a base model says of itself, from nothing but its BOS token: prefixes for edits, and text to preserve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from .decoding import ask
from .evaluation import disabling
from .model_state import max_length
from .questions import UNTIL_EOS, Question, TopK

SHORT_PREFIX, LONG_PREFIX = 5, 10  # tokens, by the source
TEXT_LENGTH = 128
MAX_ROUNDS = 20


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Let a model answer as its base for a while, if it has an adapter to disable."""
    with (disabling(model) or nullcontext)():
        yield


def generate_prefixes(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    num_short: int = 5,
    num_long: int = 10,
    *,
    seed: int = 42,
    k: int = 5,
) -> tuple[str, ...]:
    """Let the base model generate random text to put before prompts, for `augmentation.with_prefix`.

    Source: Gangadhar and Stratos, "Model Editing by Pure Fine-Tuning" (arXiv 2402.11078): from BOS (EOS where the
    tokenizer has no BOS), sampled among the 5 most probable tokens; 5 of at most 5 tokens and 10 of at most 10. They
    take the same 15 for every edit of a batch, and 10 for a single edit.

    Args:
        model: a decoder-only language model; an adapter on it is disabled meanwhile.
        tokenizer: its tokenizer.
        num_short: prefixes of at most 5 tokens.
        num_long: prefixes of at most 10 tokens.
        seed: the same seed gives the same prefixes.
        k: tokens that are sampled among.

    Returns:
        The short ones, then the long ones: distinct, none empty, no whitespace around them or line break in them.

    Raises:
        ValueError: if a number is negative or `k` below 1; if the tokenizer has neither BOS nor EOS; if the model does
            not generate so many different ones.

    Example:
        >>> generate_prefixes(model, tokenizer, 1, 1)
        ('The first step in', 'In a world where technology is rapidly changing, it')
    """
    if num_short < 0 or num_long < 0:
        raise ValueError(f"Found num_short={num_short} and num_long={num_long}; expected 0 or more prefixes.")
    lengths = [SHORT_PREFIX] * num_short + [LONG_PREFIX] * num_long
    prefixes: list[str | None] = [None] * len(lengths)
    for attempt in range(MAX_ROUNDS):
        places = [place for place, prefix in enumerate(prefixes) if prefix is None]
        if not places:
            break
        answers = _sample(model, tokenizer, [lengths[place] for place in places], k, (seed, attempt))
        for place, token_ids in zip(places, answers, strict=True):
            text = _one_line(tokenizer.decode(token_ids))
            if text and text not in prefixes:
                prefixes[place] = text
    found = tuple(prefix for prefix in prefixes if prefix is not None)
    if len(found) < len(lengths):
        raise ValueError(
            f"The model gave {len(found)} different prefixes in {MAX_ROUNDS} attempts; expected {len(lengths)}. Raise "
            f"k (it is {k}), or ask for fewer."
        )
    return found


def base_texts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, num_tokens: int, *, seed: int = 42, k: int = 50
) -> list[str]:
    """Let the base model generate text, for those who have none of what it shall preserve.

    Each text begins at BOS (EOS where the tokenizer has no BOS) and ends at EOS, or after 128 tokens or what positions
    the model has.

    Args:
        model: a decoder-only language model; an adapter on it is disabled meanwhile.
        tokenizer: its tokenizer.
        num_tokens: to generate at least, over all texts.
        seed: the same seed gives the same texts.
        k: tokens that are sampled among.

    Returns:
        The texts, none empty. A tokenizer may read them as slightly more or fewer tokens than were generated.

    Raises:
        ValueError: if `num_tokens` or `k` is below 1; if the tokenizer has neither BOS nor EOS; if the model says
            nothing before its EOS.

    Example:
        >>> len(base_texts(model, tokenizer, 32_768))
        306
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens}: expected 1 or more.")
    length = min(TEXT_LENGTH, (max_length(model) or math.inf) - 1)
    texts: list[str] = []
    generated, attempt, fruitless = 0, 0, 0
    while generated < num_tokens:
        lengths = [int(length)] * math.ceil((num_tokens - generated) / length)
        answers = _sample(model, tokenizer, lengths, k, (seed, attempt))
        spoken = [(text, len(ids)) for ids in answers if (text := tokenizer.decode(ids).strip())]
        texts += [text for text, _ in spoken]
        generated += sum(count for _, count in spoken)
        attempt, fruitless = attempt + 1, 0 if spoken else fruitless + 1
        if fruitless == MAX_ROUNDS:
            raise ValueError(
                f"The model ends its text before it begins, {MAX_ROUNDS} times in a row; found {generated} of "
                f"{num_tokens} tokens. Give text of your own, or raise k (it is {k})."
            )
    return texts


def _sample(
    model: nn.Module, tokenizer: Any, lengths: Sequence[int], k: int, seed: tuple[int, int]
) -> list[list[int]]:
    """Sample a text from nothing for each of `lengths`, the most tokens it may have; EOS ends it and is left out."""
    if k < 1:
        raise ValueError(f"k={k}: expected 1 or more tokens to sample among.")
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("tokenizer: found neither BOS nor EOS, which the base begins to speak from; set one of them.")
    questions = [
        Question((start,), num_stops=UNTIL_EOS, max_new_tokens=length, sample=number)
        for number, length in enumerate(lengths)
    ]
    choose = TopK(k, int(np.random.default_rng(seed).integers(2**32)))
    with as_base(model):
        answers = ask(model, tokenizer, questions, choose=choose, whose="the base")
    ids = [answer.token_ids for answer in answers]
    return [row[:-1] if row[-1] == tokenizer.eos_token_id else row for row in ids]


def _one_line(text: str) -> str:
    """Leave out what no prefix should have: line breaks, control characters, halves of characters."""
    printable = "".join(letter for letter in " ".join(text.split()) if letter.isprintable() and letter != "\ufffd")
    return printable.strip()
