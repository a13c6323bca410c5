"""Retained facts: prompts whose answers must not change, and the base model's answers to them."""

from __future__ import annotations

import logging
import os
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..engine.decoding import check_fits, generate_and_score
from ..engine.model_state import as_base
from ..engine.questions import UNTIL_EOS, Question
from .column_names import PROMPT_NAMES, VOCABULARIES
from .edit_files import read_rows
from .edits import Edit, Prompt, fold_case, prompts_of, read_edits
from .encoding import EncodedEdits, encode_prompts, flatten_rows
from .field_values import text
from .prompt_similarity import nearest_prompts
from .text_files import read_lines

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
    """Choose prompts whose answers the edits must not change; [`base_answers`] answers them.

    Args:
        source: a `.txt` file with one prompt per line; records with a column `prompt` (a `.json`, `.jsonl`, `.csv` or
            `.parquet` file, a dataset, its "owner/name" on the Hub, or an iterable); or an iterable of texts. Records
            with the columns of edits give their locality probes, or their prompts if there are none; records that are
            among `edits` give nothing. `None`: the locality probes of `edits`, which an evaluation then refuses or
            drops (`EvaluationConfig.on_leak`).
        edits: the edits to train.
        num: number of prompts at most; `None`: all. Logs a warning if there are fewer.
        how: `"random"`, or `"nearest"`: the prompts most similar to the prompt of any edit, by
            `prompt_similarity.nearest_prompts`.
        seed: seed of the random choice.
        model: for `"nearest"`: its base embeds the prompts.
        tokenizer: for `"nearest"`.
        split: split of a dataset.

    Returns:
        Distinct prompts. None is a prompt, paraphrase, rephrasing or portability probe of `edits`, nor (with a
        `source`) a locality probe, so that locality can be measured; compared by `edits.fold_case`.

    Raises:
        FileNotFoundError: if there is no such file or dataset.
        ValueError: if an argument is out of range, `source` cannot be read, or no prompt is left.

    Example:
        >>> choose_retained_facts("counterfact.json", edits, 400)[0]
        'The mother tongue of Danielle Darrieux is'
    """
    if how not in get_args(How):
        raise ValueError(f"how={how!r}: expected one of {', '.join(get_args(How))}.")
    if num is not None and num < 1:
        raise ValueError(f"num={num}: expected 1 or more retained facts; leave it out to use all.")
    if how == "nearest" and (model is None or tokenizer is None):
        raise ValueError("how='nearest' embeds the prompts: give model and tokenizer.")
    prompts = _candidates(source, edits, split)
    if num is None or len(prompts) <= num:
        if num is not None and len(prompts) < num:
            logger.warning("Found only %d of %d retained facts.", len(prompts), num)
        return prompts
    if how == "random":
        chosen = np.random.default_rng(seed).permutation(len(prompts))[:num].tolist()
    else:
        assert model is not None and tokenizer is not None
        chosen = nearest_prompts(model, tokenizer, [edit.prompt for edit in edits], prompts, num)
    return [prompts[number] for number in chosen]


def _candidates(source: Source | None, edits: Sequence[Edit], split: str) -> list[str]:
    if source is None:
        name, allowed = "the edits", {fold_case(probe.prompt) for edit in edits for probe in edit.locality}
        found: Iterable[str] = [probe.prompt for edit in edits for probe in edit.locality]
    else:
        name, allowed = reprlib.repr(source), set()
        found = _prompts_in(source, {fold_case(edit.prompt) for edit in edits}, split)
    taken = {fold_case(prompt) for edit in edits for prompt in prompts_of(edit)} - allowed
    distinct = {fold_case(prompt): prompt for prompt in found}
    prompts = [prompt for key, prompt in distinct.items() if key not in taken]
    if not prompts:
        raise ValueError(
            f"retained facts: found {len(distinct)} prompts in {name}, all of them prompts or probes of the edits; "
            "expected at least one other. Give a file of other prompts, one per line, or of other edits."
        )
    return prompts


def _prompts_in(source: Source, edited: set[str], split: str) -> list[str]:
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() == ".txt":
        if not Path(source).is_file():
            raise FileNotFoundError(f"{source}: found no such file; expected a text file with one prompt per line")
        return read_lines(source)
    rows = list(read_rows(source, split))
    columns = set(chain.from_iterable(row for _, row in rows if isinstance(row, dict)))
    if any(isinstance(row, Edit) for _, row in rows) or any(columns >= set(names) for names in VOCABULARIES):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* prompts have several targets")
            read = read_edits([row for _, row in rows])
        others = [edit for edit in read if fold_case(edit.prompt) not in edited]
        return [probe.prompt for edit in others for probe in edit.locality] or [edit.prompt for edit in others]
    return [_prompt(place, row) for place, row in rows]


def _prompt(place: str, row: object) -> str:
    if isinstance(row, ValueError):
        raise ValueError(f"{place}: {row}")
    value = next((row[name] for name in PROMPT_NAMES if name in row), None) if isinstance(row, dict) else row
    try:
        return text(value, "prompt")
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


@dataclass(frozen=True, slots=True, eq=False)
class BaseAnswers:
    """A base model's greedy answers to prompts, as training rows that teach nothing new.

    Attributes:
        prompts: the prompts.
        texts: the answers, without special tokens; empty if the base generated EOS at once.
        encoded: prompt and answer as token ids, in the order of `prompts`. These are the generated ids, not tokenized
            text. EOS ends an answer only if the base generated it, so an answer that was cut off teaches no end.
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    encoded: EncodedEdits

    @property
    def edits(self) -> list[Edit]:
        """The answers that are not empty, as text, for `augmentation.concatenated`."""
        pairs = zip(self.prompts, map(str.strip, self.texts), strict=True)
        return [Edit(prompt=prompt, target=answer, source="the base") for prompt, answer in pairs if answer]


def base_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Prompt],
    *,
    max_new_tokens: int = 8,
    chat_template: bool | str = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> BaseAnswers:
    """Return the base model's greedy answers to prompts, in their order.

    Args:
        model: a decoder-only language model; its adapter is disabled meanwhile.
        tokenizer: its tokenizer, a fast one.
        prompts: at least one; as in `encode_prompts`.
        max_new_tokens: maximum number of tokens in an answer; EOS ends it, a full stop does not.
        chat_template: as in `encode_edits`.
        chat_template_kwargs: as in `encode_edits`.

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
    encoded = encode_prompts(
        prompts, tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs
    )
    questions = [Question(tuple(ids), num_stops=UNTIL_EOS, max_new_tokens=max_new_tokens) for ids in encoded]
    check_fits(model, questions, tokenizer)
    with as_base(model):
        answers = generate_and_score(model, tokenizer, questions, label="the base")
    texts = tuple(tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers)
    rows = [ids + answer.token_ids for ids, answer in zip(encoded, answers, strict=True)]
    return BaseAnswers(_texts(prompts), texts, flatten_rows(rows, [len(ids) for ids in encoded]))


def unanswered(
    prompts: Sequence[str | Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> BaseAnswers:
    """Return prompts without answers, for a loss on the next token's distribution alone; nothing is generated.

    Each prompt is followed by its own last token, as a position to score; which token it is does not matter.
    """
    rows = encode_prompts(prompts, tokenizer, chat_template_kwargs=chat_template_kwargs)
    encoded = flatten_rows([[*ids, ids[-1]] for ids in rows], [len(ids) for ids in rows])
    return BaseAnswers(_texts(prompts), ("",) * len(prompts), encoded)


def _texts(prompts: Sequence[str | Prompt]) -> tuple[str, ...]:
    return tuple(prompt.text if isinstance(prompt, Prompt) else prompt for prompt in prompts)
