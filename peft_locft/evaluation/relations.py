"""What an edit says of its subject: its prompt with a blank, and which edits say the same of theirs."""

from __future__ import annotations

import re

from ..data.edits import Edit, fold_case
from ..data.scripts import replace_word

BLANK = "____"
ENGLISH = ("en", "eng", "english")
LATIN_SHARE = 0.8  # of the letters of an edit in English, at least


def template_of(edit: Edit, blank: str = BLANK) -> str | None:
    """Return an edit's prompt with a blank for its subject; `None` if the subject is not a whole word in it.

    Example:
        >>> template_of(Edit("The capital of Norway is", "Bergen", subject="Norway"))
        'The capital of ____ is'
    """
    if not edit.subject:
        return None
    template = replace_word(edit.prompt, edit.subject, blank)
    return None if template == edit.prompt else template


def relation_of(edit: Edit) -> str:
    """Return what identifies the relation of an edit: its relation, or else its prompt without the subject."""
    return edit.relation or fold_case(template_of(edit) or edit.prompt)


def known_answers(edit: Edit) -> set[str]:
    """Return an edit's target, its aliases and the answer before it, in the form of `edits.fold_case`."""
    return {fold_case(each) for each in (*edit.right_answers, edit.ground_truth or edit.target)}


def is_english(edit: Edit) -> bool:
    """Return whether English templates fit an edit: its language is English, or not said and its letters are Latin."""
    if edit.language is not None:
        return re.split("[-_]", edit.language.lower())[0] in ENGLISH
    letters = [letter for letter in edit.prompt + edit.target if letter.isalpha()]
    return sum(letter.isascii() for letter in letters) >= LATIN_SHARE * len(letters)
