"""Long answers: which targets are long, and how alike two texts are, by their words and by their meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import regex
from transformers import PreTrainedTokenizerBase

from ..data.edits import Edit
from ..data.scripts import words
from .items import EvalItem

# the end of a sentence with another behind it, in any script; Chinese and Japanese have no space there
SENTENCE_BREAK = regex.compile(r"\p{Sentence_Terminal}[\p{Pe}\p{Pf}\"']*\s+\S|\n\s*\S")
SPACELESS_BREAK = regex.compile(r"[\u3002\uff01\uff1f][\p{Pe}\p{Pf}]*[^\s\p{P}]")
SHORTEST = 60  # characters of a long target with spaces: in a shorter one a full stop may end an abbreviation
ROOM = 1.25  # tokens that an answer may have, as a multiple of the target's


def is_long(target: str) -> bool:
    """Return whether a target is a text of several sentences, of which the published protocol sees only the first.

    Example:
        >>> is_long("St. Louis"), is_long("奥斯陆。这座城市在海边。")
        (False, True)
    """
    text = target.strip()
    if SPACELESS_BREAK.search(text):
        return True
    return len(text) >= SHORTEST and SENTENCE_BREAK.search(text) is not None


def long_items(edits: Sequence[Edit], tokenizer: PreTrainedTokenizerBase, *, in_chat: bool) -> list[EvalItem]:
    """Return the items of long answers: the edit's prompt, answered as a whole, and questions about its parts.

    Args:
        edits: the edits.
        tokenizer: counts the tokens of a target, for the longest answer.
        in_chat: ask in the chat template.
    """
    items = []
    for number, edit in enumerate(edits):
        history = edit.history if edit.history is not None else () if in_chat else None
        if is_long(edit.target):
            most = math.ceil(ROOM * len(tokenizer(edit.target, add_special_tokens=False)["input_ids"]))
            items.append(
                EvalItem(
                    number, "long_answer", edit.prompt, edit.target, None, history, max_new_tokens=most, is_whole=True
                )
            )
        for probe in edit.sub_questions:
            items.append(EvalItem(number, "long_answer_sub_questions", probe.prompt, probe.answer, None, history))
    return items


def units(text: str) -> list[str]:
    """Return the words of a text in lower case; single letters in scripts without spaces.

    Example:
        >>> units("Oslo, 挪威")
        ['oslo', '挪', '威']
    """
    return [word for word in words(text.casefold()) if any(letter.isalnum() for letter in word)]


def rouge_l(answer: str, expected: str) -> float:
    """Return ROUGE-L: the F1 of the longest common subsequence of two texts' words (Lin 2004).

    Words are those of `data.scripts.words` in lower case, without punctuation.

    Example:
        >>> rouge_l("the city by the sea", "a city by a sea")
        0.6
    """
    one, other = ([word for word in words(text.casefold()) if word[0].isalnum()] for text in (answer, expected))
    lengths = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, found in enumerate(other, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == found else max(above, lengths[place - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(one) + len(other)) if one and other else float(one == other)
