"""Which tokens of a row write into the delta: those whose inputs its gradient is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from .scripts import find_words

GradientTokens: TypeAlias = Literal["all", "prompt", "subject", "from_subject"]


def subject_spans(subject: str | None, text: str, begin: int, end: int) -> list[tuple[int, int]]:
    """Return where a subject stands in a part of a text, in characters: as a whole word, else anywhere.

    Args:
        subject: the subject; `None`: unknown.
        text: the text of a row.
        begin: where the part begins.
        end: where it ends.
    """
    name = (subject or "").strip()
    if not name:
        return []
    part = text[begin:end]
    places = list(find_words(part, name))
    if not places and len(part.lower()) == len(part):  # a few letters change their length
        places = list(find_words(part.lower(), name.lower()))
    if not places and name in part:
        places = [part.index(name)]
    return [(begin + place, begin + place + len(name)) for place in places]


def writing_tokens(
    mode: GradientTokens,
    offsets: Sequence[tuple[int, int]],
    num_prompt_tokens: int,
    prompt_begin: int,
    subjects: Sequence[tuple[int, int]],
) -> list[bool]:
    """Return whether each token of a row writes into the delta.

    Args:
        mode: `"all"`; `"prompt"`: the tokens from the prompt's first word to the last token before the target;
            `"subject"`: the last token of every mention of the subject; `"from_subject"`: from the last token of its
            first mention to the last token before the target. A row without a subject is written by its prompt.
        offsets: begin and end of each token of the row in its text.
        num_prompt_tokens: number of tokens before the target.
        prompt_begin: where the prompt begins in the text; a chat template writes something before it.
        subjects: where the subject stands in the prompt, from `subject_spans`.
    """
    if mode == "all":
        return [True] * len(offsets)
    ends = list(_last_tokens(offsets[:num_prompt_tokens], subjects))
    if mode == "subject" and ends:
        return [number in ends for number in range(len(offsets))]
    if mode == "from_subject" and ends:
        first = ends[0]
    else:
        first = next((n for n, (_, end) in enumerate(offsets[:num_prompt_tokens]) if end > prompt_begin), 0)
    return [first <= number < num_prompt_tokens for number in range(len(offsets))]


def _last_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Yield the index of the token that holds the last character of each span."""
    for _, span_end in spans:
        holding = [number for number, (begin, end) in enumerate(offsets) if begin < span_end <= end]
        if holding:
            yield holding[-1]
