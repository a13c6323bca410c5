"""What a report calls the relation of an edit."""

from __future__ import annotations

from ..data.edits import Edit

PLACE = "{}"  # of the subject in a template


def relation_label(edit: Edit) -> str | None:
    """Return the relation of an edit or, if it has none, its prompt with `{}` in the place of the subject.

    Example:
        >>> relation_label(Edit("The capital of France is", "Lyon", subject="France"))
        'The capital of {} is'
    """
    if edit.relation is not None:
        return edit.relation
    if not edit.subject or edit.subject not in edit.prompt:
        return None
    return edit.prompt.replace(edit.subject, PLACE)
