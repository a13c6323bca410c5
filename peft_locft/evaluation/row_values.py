"""From the rows of a report back to a value for each edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .intervals import Array

Row = Mapping[str, Any]


def mean_by_edit(rows: Iterable[Row], name: str, num_edits: int) -> Array:
    """Return the mean of a score over the rows of each edit, (edits,); NaN for an edit without one.

    Args:
        rows: of a report, of one kind.
        name: of the score, such as `"exact_match_after"`.
        num_edits: number of edits of the report.
    """
    return mean_by_unit(
        [(row["edit"], float(score)) for row in rows if (score := row.get(name)) is not None], num_edits
    )


def mean_by_unit(pairs: Sequence[tuple[int, float]], num_units: int) -> Array:
    """Return the mean of the values of each unit, (units,), from pairs of unit and value; NaN without one."""
    units = np.array([unit for unit, _ in pairs], dtype=np.int64)
    sums = np.bincount(units, [value for _, value in pairs], num_units)
    with np.errstate(invalid="ignore"):
        means: Array = sums / np.bincount(units, minlength=num_units)
    return means


def num_edits_of(rows: Iterable[Row], settings: Mapping[str, Any]) -> int:
    """Return the number of edits of a report: the recorded one, or the largest in its rows."""
    recorded = (settings.get("edits") or {}).get("count", 0)
    return max([recorded, *(row["edit"] + 1 for row in rows)])


def bootstrap_settings(settings: Mapping[str, Any]) -> tuple[int, float, int]:
    """Return resamples, confidence and seed of a report's intervals."""
    return settings.get("num_resamples") or 1000, settings["confidence"], settings.get("seed") or 0
