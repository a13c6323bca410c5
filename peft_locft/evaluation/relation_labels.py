"""What a report calls the relation of an edit."""

from __future__ import annotations

from ..data.edits import Edit
from ..data.relations import template_of

PLACE = "{}"  # of the subject in a template


def relation_label(edit: Edit) -> str | None:
    """Return the relation of an edit or, if it has none, its prompt with `{}` in the place of the subject.

    Example:
        >>> relation_label(Edit("The capital of France is", "Lyon", subject="France"))
        'The capital of {} is'
    """
    return template_of(edit, PLACE) if edit.relation is None else edit.relation
