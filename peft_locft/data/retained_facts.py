"""Facts that shall stay as they are: which prompts, and what the base itself answers to them."""

from __future__ import annotations

import logging
import os
import reprlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..engine.decoding import check_fits, generate_and_score
from ..engine.model_state import as_base
from ..engine.questions import UNTIL_EOS, Question
from .augmentation import prompts_of
from .edit_files import read_rows, read_text
from .edit_records import VOCABULARIES, text
from .edits import Edit, read_edits
from .encoding import EncodedEdits, encode_prompts
from .leaks import normalised
from .prompt_similarity import nearest_prompts

logger = logging.getLogger(__name__)

How = Literal["random", "nearest"]
Source: TypeAlias = str | os.PathLike[str] | Iterable[Any]


def choose_retained_facts(
    source: Source | None,
    edits: Sequence[Edit],
    num: int | None = None,
    *,
    how: How = "random",
    seed: int = 42,
    model: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: str = "train",
) -> list[str]:
    """Choose prompts whose answers an edit must not change; [`base_answers`] answers them.

    Args:
        source: where from. A `.txt` file with one prompt a line; a `.json`, `.jsonl`, `.csv` or `.parquet` file, a
            dataset, its "owner/name" on the Hub, or an iterable, of records with a `prompt`; texts in an iterable. Of
            records with the columns of edits, the locality probes are taken where they have any, else the prompts;
            those of records that are among `edits` are not. `None`: the locality probes of `edits` themselves;
            evaluating these afterwards is refused, or they are left out (`EvaluationConfig.on_leak`).
        edits: those that are trained.
        num: how many at most; `None`: all there are. A warning says so if there are fewer.
        how: `"random"`, or `"nearest"`: those most similar to the prompt of any edit, by
            `prompt_similarity.nearest_prompts`.
        seed: of the random choice.
        model: for `"nearest"`: its base embeds the prompts.
        tokenizer: for `"nearest"`.
        split: of a dataset.

    Returns:
        Distinct prompts. None of them is a prompt, paraphrase, rephrasing or portability probe of `edits`, nor, from a
        `source`, a locality probe of theirs, so that locality can be measured on those; compared by
        `leaks.normalised`.

    Raises:
        FileNotFoundError: if there is neither such a file nor such a dataset.
        ValueError: if an argument is out of range, `source` cannot be read, or nothing is left of it.

    Example:
        >>> choose_retained_facts("counterfact.json", edits, 400)[0]
        'The mother tongue of Danielle Darrieux is'
    """
    if how not in get_args(How):
        raise ValueError(f"how={how!r}: expected one of {', '.join(get_args(How))}.")
    if num is not None and num < 1:
        raise ValueError(f"num={num}: expected 1 or more facts to keep; leave it out for all.")
    if how == "nearest" and (model is None or tokenizer is None):
        raise ValueError("how='nearest' needs the model and its tokenizer, which embed the prompts; found none.")
    prompts = _candidates(source, edits, split)
    if num is None or len(prompts) <= num:
        if num is not None and len(prompts) < num:
            logger.warning("There are %d facts to keep; %d were asked for.", len(prompts), num)
        return prompts
    if how == "random":
        chosen = np.random.default_rng(seed).permutation(len(prompts))[:num].tolist()
    else:
        assert model is not None and tokenizer is not None
        chosen = nearest_prompts(model, tokenizer, [edit.prompt for edit in edits], prompts, num)
    return [prompts[number] for number in chosen]


def _candidates(source: Source | None, edits: Sequence[Edit], split: str) -> list[str]:
    if source is None:
        name, asked = "the edits", {normalised(probe.prompt) for edit in edits for probe in edit.locality}
        found: Iterable[str] = [probe.prompt for edit in edits for probe in edit.locality]
    else:
        name, asked = reprlib.repr(source), set()
        found = _prompts_in(source, {normalised(edit.prompt) for edit in edits}, split)
    taken = {normalised(prompt) for edit in edits for prompt in prompts_of(edit)} - asked
    distinct = {normalised(prompt): prompt for prompt in found}
    prompts = [prompt for key, prompt in distinct.items() if key not in taken]
    if not prompts:
        raise ValueError(
            f"facts to keep: found {len(distinct)} prompts in {name}, none of which is not asked or trained because "
            "of an edit; expected at least one. Give a file of other prompts, one a line, or of other edits."
        )
    return prompts


def _prompts_in(source: Source, edited: set[str], split: str) -> list[str]:
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() == ".txt":
        if not Path(source).is_file():
            raise FileNotFoundError(f"{source}: found no such file; expected a text file with one prompt a line")
        return [line.strip() for line in read_text(Path(source)).splitlines() if line.strip()]
    rows = list(read_rows(source, split))
    columns = set(chain.from_iterable(row for _, row in rows if isinstance(row, dict)))
    if any(isinstance(row, Edit) for _, row in rows) or any(columns >= set(names) for names in VOCABULARIES):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* prompts have several targets")
            read = read_edits([row for _, row in rows])
        others = [edit for edit in read if normalised(edit.prompt) not in edited]
        return [probe.prompt for edit in others for probe in edit.locality] or [edit.prompt for edit in others]
    return [_prompt(place, row) for place, row in rows]


def _prompt(place: str, row: object) -> str:
    if isinstance(row, ValueError):
        raise ValueError(f"{place}: {row}")
    value = row.get("prompt") if isinstance(row, dict) else row
    try:
        return text(value, "prompt")
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


@dataclass(frozen=True, slots=True, eq=False)
class BaseAnswers:
    """What a base model answers, greedily: training on it teaches nothing new.

    Attributes:
        prompts: what it was asked.
        texts: what it answered, without special tokens; empty where it ended at once.
        encoded: prompt and answer as token ids, in the order of `prompts`. They are those that were asked and
            generated, not text that was tokenised again, so that each is what the base says itself. EOS stands behind
            an answer where the base put it, and nowhere else: an answer that was cut off teaches no end. Where the
            base ended at once, EOS is the answer.
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    encoded: EncodedEdits

    @property
    def edits(self) -> list[Edit]:
        """The answers that are not empty, as facts for `augmentation.concatenated`; text alone, not these tokens."""
        pairs = zip(self.prompts, map(str.strip, self.texts), strict=True)
        return [Edit(prompt=prompt, target=answer, source="the base") for prompt, answer in pairs if answer]


def base_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 8,
    chat_template: bool = False,
) -> BaseAnswers:
    """Ask the base model, greedily.

    Args:
        model: a decoder-only language model; an adapter on it is disabled meanwhile.
        tokenizer: its tokenizer, a fast one.
        prompts: what it is asked, at least one.
        max_new_tokens: in an answer at most; EOS ends it, and full stops do not.
        chat_template: as in `encode_edits`.

    Returns:
        Its answers, in the order of the prompts.

    Raises:
        ValueError: if there are no prompts, `max_new_tokens` is below 1, or a prompt is too long for the model or
            cannot be encoded.
        FloatingPointError: if the model's logits are not finite.

    Example:
        >>> answers = base_answers(model, tokenizer, choose_retained_facts("facts.txt", edits))
        >>> rows = join_encoded([encode_edits(edits, tokenizer), answers.encoded])
    """
    if not prompts or max_new_tokens < 1:
        found = f"{len(prompts)} prompts and max_new_tokens={max_new_tokens}"
        raise ValueError(f"base_answers: found {found}; expected 1 or more of both.")
    encoded = encode_prompts(prompts, tokenizer, chat_template=chat_template)
    questions = [Question(tuple(ids), num_stops=UNTIL_EOS, max_new_tokens=max_new_tokens) for ids in encoded]
    check_fits(model, questions, tokenizer)
    with as_base(model):
        answers = generate_and_score(model, tokenizer, questions, label="the base")
    texts = tuple(tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers)
    rows = [ids + answer.token_ids for ids, answer in zip(encoded, answers, strict=True)]
    return BaseAnswers(tuple(prompts), texts, flat(rows, [len(ids) for ids in encoded]))


def unanswered(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = False
) -> BaseAnswers:
    """Encode prompts for which only what the base says next is kept, so that it need not be asked.

    The token behind each is its own last one: it has a place to be scored at, and says nothing.
    """
    rows = encode_prompts(prompts, tokenizer, chat_template=chat_template)
    encoded = flat([[*ids, ids[-1]] for ids in rows], [len(ids) for ids in rows])
    return BaseAnswers(tuple(prompts), ("",) * len(prompts), encoded)


def flat(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> EncodedEdits:
    """Put rows of token ids, and where the scored tokens of each begin, into flat tensors."""
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return EncodedEdits(tokens, offsets, torch.tensor(starts))


def join_encoded(parts: Sequence[EncodedEdits]) -> EncodedEdits:
    """Put encoded edits one after the other.

    Args:
        parts: at least one.
    """
    lengths = torch.cat([part.lengths for part in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens, starts = (torch.cat([getattr(part, name) for part in parts]) for name in ("token_ids", "target_starts"))
    return EncodedEdits(tokens, offsets, starts)


def slice_encoded(encoded: EncodedEdits, begin: int, end: int | None) -> EncodedEdits:
    """Take the rows from `begin` to before `end`."""
    end = len(encoded) if end is None else end
    offsets = encoded.offsets[begin : end + 1]
    tokens = encoded.token_ids[int(offsets[0]) : int(offsets[-1])]
    return EncodedEdits(tokens, offsets - offsets[0], encoded.target_starts[begin:end])
