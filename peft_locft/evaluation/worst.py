"""The rows of a report to look at first: the edits that are learned least, and the answers that are damaged most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .row_values import Row
from .summary import deciding_score

LEAST_LEARNED = (
    "Failed prompts of the edits: an edit's own prompt before rephrasings, and of each those first of whose target "
    "the model predicts the smallest share of tokens."
)
MOST_DAMAGED = (
    "Changed answers of locality probes: those first that were right before and are wrong now, then those that share "
    "the fewest tokens with the answer before."
)


def least_learned(rows: Sequence[Row], count: int = 20) -> list[Row]:
    """Return the first rows by the rule `LEAST_LEARNED`.

    Args:
        rows: of a report.
        count: the largest number of rows.
    """
    kinds = ("reliability", "generalization")
    failed = [row for row in rows if row["kind"] in kinds and _has_failed(row)]
    return sorted(failed, key=lambda row: (kinds.index(row["kind"]), _value(row, "token_accuracy_after")))[:count]


def most_damaged(rows: Sequence[Row], count: int = 20) -> list[Row]:
    """Return the first rows by the rule `MOST_DAMAGED`; arguments as in [`least_learned`]."""
    failed = [row for row in rows if row["kind"].startswith("locality") and _has_failed(row)]
    return sorted(failed, key=lambda row: (not _was_right(row), _value(row, "tokens_unchanged_after")))[:count]


def _has_failed(row: Row) -> bool:
    deciding = deciding_score(row)
    return deciding is not None and deciding[1] < 1


def _was_right(row: Row) -> bool:
    """Return whether an answer was right before the edit, and is wrong after it."""
    names: Sequence[Any] = [name for name in ("contains", "exact_match") if row.get(f"{name}_before") is not None]
    return any(row[f"{name}_before"] == 1 and row.get(f"{name}_after") == 0 for name in names[:1])


def _value(row: Row, name: str) -> float:
    value = row.get(name)
    return 1.0 if value is None else float(value)
