"""Where an edit's fact is read in its prompt: the rows that closed-form editors run, each with that position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data.augmentation import with_prefix
from ..data.chat import in_forms
from ..data.edits import Edit, prompt_of
from ..data.encoding import encode_edits, encode_prompts


@dataclass(frozen=True)
class PlacedRow:
    """One text of an edit as token ids.

    Args:
        edit: index of the edit.
        input_ids: (length,) int64.
        position: where the fact is read: the last token of the subject, or of the prompt.
        target_start: index of the first token of the target; `len(input_ids)` if there is none.
    """

    edit: int
    input_ids: torch.Tensor
    position: int
    target_start: int

    @property
    def is_control(self) -> bool:
        """Whether it has no target."""
        return self.target_start == len(self.input_ids)


@dataclass(frozen=True)
class PlacedRows:
    """The texts of some edits.

    Args:
        rows: edit by edit; the first row of each is its own prompt.
        num_without_subject: edits whose position is the prompt's last token, since their subject is unknown or does
            not occur in the prompt.
    """

    rows: list[PlacedRow]
    num_without_subject: int

    @property
    def firsts(self) -> list[int]:
        """Index of the first row of each edit."""
        return [n for n, row in enumerate(self.rows) if n == 0 or row.edit != self.rows[n - 1].edit]


def placed_rows(
    edits: Sequence[Edit],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefixes: Sequence[str] = (),
    append_eos: bool = True,
    chat_template: str = "off",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    target_separator: str = "auto",
) -> PlacedRows:
    """Encode every edit, as it is and behind each prefix, and find its position.

    Args:
        edits: at least one.
        tokenizer: a fast tokenizer.
        prefixes: texts to stand before the prompt, see `with_prefix`.
        append_eos: as in `encode_edits`.
        chat_template: `"on"`, `"off"` or `"both"`.
        chat_template_kwargs: as in `encode_edits`.
        target_separator: as in `encode_edits`.
    """
    texts = [
        (number, each)
        for number, edit in enumerate(edits)
        for form in in_forms([edit], chat_template)
        for each in (form, *(with_prefix(form, prefix) for prefix in prefixes))
    ]
    forms = [form for _, form in texts]
    encoded = encode_edits(
        forms,
        tokenizer,
        append_eos=append_eos,
        chat_template_kwargs=chat_template_kwargs,
        target_separator=target_separator,
    )
    lengths = _lengths_to_subject(forms, tokenizer, chat_template_kwargs)
    rows = []
    for (number, _), row, length in zip(texts, (encoded[n] for n in range(len(encoded))), lengths, strict=True):
        last = row.target_start - 1  # of the prompt
        rows.append(PlacedRow(number, row.input_ids, min(length - 1, last) if length else last, row.target_start))
    without = {number for (number, _), length in zip(texts, lengths, strict=True) if not length}
    return PlacedRows(rows, len(without))


def _lengths_to_subject(
    edits: Sequence[Edit], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None
) -> list[int]:
    """Return the number of tokens of each prompt up to the end of its subject; 0: it has none there.

    The prompt is encoded whole and cut after its subject. What both have in common in front ends with the subject, in
    a chat template too.
    """
    ends = [_end_of_subject(edit) for edit in edits]
    found = [number for number, end in enumerate(ends) if end]
    lengths = [0] * len(edits)
    if not found:
        return lengths
    prompts = [prompt_of(edits[number]) for number in found]
    cut = [prompt._replace(text=prompt.text[: ends[number]]) for number, prompt in zip(found, prompts, strict=True)]
    encoded = encode_prompts([*prompts, *cut], tokenizer, chat_template_kwargs=chat_template_kwargs)
    for number, whole, part in zip(found, encoded[: len(found)], encoded[len(found) :], strict=True):
        pairs = enumerate(zip(whole, part, strict=False))
        common = next((n for n, (one, other) in pairs if one != other), min(len(whole), len(part)))
        # a token may join the end of the subject to what follows, as in "Spain?"
        ends_there = _bare(tokenizer.decode(whole[:common])).endswith(_bare(edits[number].subject or ""))
        lengths[number] = common if ends_there else common + 1
    return lengths


def _bare(text: str) -> str:
    return "".join(text.casefold().split())


def _end_of_subject(edit: Edit) -> int:
    """Return where the last mention of the subject ends in the prompt, in characters; 0 if there is none."""
    place = edit.prompt.casefold().rfind(edit.subject.casefold()) if edit.subject else -1
    return 0 if place < 0 else place + len(edit.subject or "")


def control_rows(
    edits: Sequence[Edit], tokenizer: PreTrainedTokenizerBase, text: str = "{} is a"
) -> dict[int, PlacedRow]:
    """Return, by index of the edit, a text about its subject; edits without a subject have none.

    The position is the subject's last token. "SUBJECT is a" is ROME's and MEMIT's text.
    """
    about = {
        number: Edit(prompt=text.format(edit.subject), target="-", subject=edit.subject)
        for number, edit in enumerate(edits)
        if edit.subject
    }
    if not about:
        return {}
    rows = encode_prompts([edit.prompt for edit in about.values()], tokenizer)
    lengths = _lengths_to_subject(list(about.values()), tokenizer, None)
    return {
        number: PlacedRow(number, torch.tensor(ids), (length or len(ids)) - 1, len(ids))
        for number, ids, length in zip(about, rows, lengths, strict=True)
    }
