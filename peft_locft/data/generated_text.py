"""Text sampled from the base model: prefixes for edits, text to preserve, and subjects like those of the edits."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..engine.decoding import generate_and_score
from ..engine.model_state import as_base, max_length
from ..engine.preparations import Preparations
from ..engine.questions import UNDECODABLE, UNTIL_EOS, Question, TopK, end_token_ids
from .edits import fold_case
from .encoding import encode_prompts
from .scripts import JOINERS

GIVEN_NAMES, NEW_NAMES = 12, 4  # in a list: names that it begins with, and names to generate
NAME_TOKENS = 12  # tokens per generated name, at most on average
FEWEST_LISTS = 16  # continued together, which takes little longer than a few do
SHORT_PREFIX, LONG_PREFIX = 5, 10  # tokens, by the source
TEXT_LENGTH, SHORT_TEXT_LENGTH = 128, 32  # tokens
MAX_ROUNDS = 20
SEMICOLON = re.compile("[;；]")  # a list of Chinese names goes on with its own


def generate_prefixes(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    num_short: int = 5,
    num_long: int = 10,
    *,
    seed: int = 42,
    k: int = 5,
    preparations: Preparations | None = None,
) -> tuple[str, ...]:
    """Sample prefixes from the base model, for `augmentation.with_prefix`.

    Source: Gangadhar and Stratos, "Model Editing by Pure Fine-Tuning" (arXiv 2402.11078): from BOS (EOS if the
    tokenizer has no BOS), top-k sampling with k = 5; 5 prefixes of at most 5 tokens and 10 of at most 10. They use the
    same 15 for every edit of a batch, and 10 for a single edit.

    Args:
        model: a decoder-only language model; its adapter is disabled meanwhile.
        tokenizer: its tokenizer.
        num_short: number of prefixes of at most 5 tokens.
        num_long: number of prefixes of at most 10 tokens.
        seed: the same seed gives the same prefixes.
        k: number of tokens to sample from.
        preparations: stores what is sampled for later calls.

    Returns:
        The short ones, then the long ones: distinct, not empty, without line breaks or whitespace around them.

    Raises:
        ValueError: if a number is negative or `k` below 1; if the tokenizer has neither BOS nor EOS; if the model
            generates too few different prefixes.

    Example:
        >>> generate_prefixes(model, tokenizer, 1, 1)
        ('The first step in', 'In a world where technology is rapidly changing, it')
    """
    if num_short < 0 or num_long < 0:
        raise ValueError(f"num_short={num_short}, num_long={num_long}: expected 0 or more prefixes.")
    lengths = [SHORT_PREFIX] * num_short + [LONG_PREFIX] * num_long
    prefixes: list[str | None] = [None] * len(lengths)
    for attempt in range(MAX_ROUNDS):
        places = [place for place, prefix in enumerate(prefixes) if prefix is None]
        if not places:
            break
        starts = _from_nothing(tokenizer, len(places))
        wanted = [lengths[place] for place in places]
        answers = _sample(model, tokenizer, starts, wanted, k, (seed, attempt), preparations)
        for place, token_ids in zip(places, answers, strict=True):
            text = _one_line(tokenizer.decode(token_ids))
            if text and text not in prefixes:
                prefixes[place] = text
    found = tuple(prefix for prefix in prefixes if prefix is not None)
    if len(found) < len(lengths):
        raise ValueError(
            f"The model generated {len(found)} different prefixes in {MAX_ROUNDS} rounds; expected {len(lengths)}. "
            f"Increase k (it is {k}), or use fewer prefixes."
        )
    return found


def base_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    *,
    seed: int = 42,
    k: int = 50,
    preparations: Preparations | None = None,
) -> list[str]:
    """Sample texts from the base model, to preserve its behaviour without a text of your own.

    Each text begins at BOS (EOS if the tokenizer has no BOS) and ends at EOS, after 128 tokens, or at the model's last
    position. Where texts ended early, more are sampled, of at most 32 tokens.

    Args:
        model: a decoder-only language model; its adapter is disabled meanwhile.
        tokenizer: its tokenizer.
        num_tokens: number of tokens to generate at least, over all texts.
        seed: the same seed gives the same texts.
        k: number of tokens to sample from.
        preparations: stores what is sampled for later calls.

    Returns:
        The texts, none empty. Tokenized again, they may have slightly more or fewer tokens.

    Raises:
        ValueError: if `num_tokens` or `k` is below 1; if the tokenizer has neither BOS nor EOS; if the model generates
            only EOS.

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
        # what early ends have left open is filled by short texts: many at once take less time than a few long ones
        each = int(length) if attempt == 0 else min(int(length), SHORT_TEXT_LENGTH)
        lengths = [each] * math.ceil((num_tokens - generated) / each)
        starts = _from_nothing(tokenizer, len(lengths))
        answers = _sample(model, tokenizer, starts, lengths, k, (seed, attempt), preparations)
        generated_texts = [(text, len(ids)) for ids in answers if (text := tokenizer.decode(ids).strip())]
        texts += [text for text, _ in generated_texts]
        generated += sum(count for _, count in generated_texts)
        attempt, fruitless = attempt + 1, 0 if generated_texts else fruitless + 1
        if fruitless == MAX_ROUNDS:
            raise ValueError(
                f"The model generated only EOS, {MAX_ROUNDS} times in a row; found {generated} of {num_tokens} "
                f"tokens. Use your own text, or increase k (it is {k})."
            )
    return texts


def generate_subjects(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    subjects: Sequence[str],
    num: int,
    *,
    seed: int = 42,
    k: int = 50,
    preparations: Preparations | None = None,
) -> tuple[str, ...]:
    """Sample names of the same kinds as some subjects: the base model continues lists of these.

    Args:
        model: a decoder-only language model; its adapter is disabled meanwhile.
        tokenizer: its tokenizer.
        subjects: subjects of edits; each list begins with 12 of them.
        num: number of names at most. A model may generate fewer, or none if it does not continue the list.
        seed: the same seed gives the same names.
        k: number of tokens to sample from.
        preparations: stores what is sampled for later calls.

    Returns:
        Distinct names, compared by `edits.fold_case`. None is one of `subjects`, contains a line break, or is longer
        than the longest of them.

    Raises:
        ValueError: if `num` is negative or `k` below 1.

    Example:
        >>> generate_subjects(model, tokenizer, ["Danielle Darrieux", "Edwin of Northumbria"], 2)
        ('William Shakespeare', 'Charles the Great')
    """
    if num < 0:
        raise ValueError(f"num={num}: expected 0 or more names.")
    given = list(dict.fromkeys(subjects))
    known = {fold_case(subject) for subject in given}
    longest = max(map(len, given), default=0)
    room = max_length(model) or sys.maxsize
    random = np.random.default_rng(seed)
    names: dict[str, str] = {}
    fruitful = bool(given)
    for attempt in count():
        if len(names) >= num or not fruitful:
            break
        before = len(names)
        starts = [
            _list_of([given[number] for number in random.permutation(len(given))[:GIVEN_NAMES]], tokenizer, room)
            for _ in range(max(FEWEST_LISTS, math.ceil((num - len(names)) / NEW_NAMES)))
        ]
        starts = [start for start in starts if len(start) < room]
        lengths = [min(NEW_NAMES * NAME_TOKENS, room - len(start)) for start in starts]
        # a list ends with its line
        answers = _sample(model, tokenizer, starts, lengths, k, (seed, attempt), preparations, until="\n")
        for token_ids in answers:
            # the last name may be cut off
            line = tokenizer.decode(token_ids).partition("\n")[0]
            for name in map(_one_line, SEMICOLON.split(line)[:-1]):
                if name and len(name) <= longest and fold_case(name) not in known:
                    names.setdefault(fold_case(name), name)
        fruitful = len(names) > before
    return tuple(names.values())[:num]


def _list_of(names: Sequence[str], tokenizer: PreTrainedTokenizerBase, room: int) -> list[int]:
    """Return the tokens of an open list of names; with fewer names if it would take more than half of `room`."""
    while True:
        (token_ids,) = encode_prompts(["; ".join(names) + ";"], tokenizer)
        if len(token_ids) <= room / 2 or len(names) == 1:
            return token_ids
        names = names[: len(names) // 2]


def _from_nothing(tokenizer: Any, number: int) -> list[list[int]]:
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("tokenizer: found neither BOS nor EOS to start the text with; set one of them.")
    return [[start]] * number


def _sample(
    model: nn.Module,
    tokenizer: Any,
    starts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    k: int,
    seed: tuple[int, int],
    preparations: Preparations | None,
    until: str = "",
) -> list[list[int]]:
    """Return sampled token ids after each start: at most its length in tokens, without EOS; `until` ends it, too."""
    if k < 1:
        raise ValueError(f"k={k}: expected 1 or more tokens to sample from.")
    preparations = preparations or Preparations(model)
    questions = [
        Question(tuple(start), num_stops=1 if until else UNTIL_EOS, max_new_tokens=length, sample=number)
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    noise = int(np.random.default_rng(seed).integers(2**32))
    end_ids = end_token_ids(tokenizer, model)

    def sample() -> list[list[int]]:
        choose = preparations.counted(TopK(k, noise))
        with as_base(model):
            answers = generate_and_score(
                model, tokenizer, questions, choose=choose, label="the base", progress=False, stops=until
            )
        return [answer.token_ids for answer in answers]

    inputs = [[list(start) for start in starts], list(lengths), k, noise, sorted(end_ids), until]
    preparations.add(sum(lengths))
    ids = preparations.stored(inputs, sample)
    return [row[:-1] if row[-1] in end_ids else row for row in ids]


def _one_line(text: str) -> str:
    """Return a text without line breaks, control characters and undecodable bytes."""
    letters = " ".join(text.split())
    printable = "".join(each for each in letters if (each.isprintable() or each in JOINERS) and each != UNDECODABLE)
    return printable.strip()
