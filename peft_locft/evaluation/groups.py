"""A report by groups of edits: which relations, or languages, are learned well and which badly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .metric_result import Column, MetricResult
from .row_values import Row, bootstrap_settings, mean_by_edit, num_edits_of
from .summary import deciding_score
from .tabulation import metric_results

MIN_EDITS = 5  # of a group that is shown: the interval of fewer says nothing


@dataclass(frozen=True)
class EditGroup:
    """The edits of one relation, or of one language.

    Attributes:
        name: the relation, the template or the language; `None`: the edits of all groups that are too small.
        num_edits: their number.
        num_groups: number of groups; above 1 only for the small ones together.
        results: the metric that decides whether a row failed, for each kind, with its interval.
    """

    name: str | None
    num_edits: int
    num_groups: int
    results: dict[str, MetricResult]


def edit_groups(
    rows: Sequence[Row], settings: Mapping[str, Any], by: str = "relation", min_edits: int = MIN_EDITS
) -> list[EditGroup]:
    """Return the results of a report by groups of edits, the largest group first.

    Args:
        rows: of the report.
        settings: of the report.
        by: the column of the rows that names the group: `"relation"` or `"language"`.
        min_edits: smaller groups are put together, at the end.

    Returns:
        Empty if no edit has a group, or all have the same.
    """
    members: dict[str, set[int]] = {}
    for row in rows:
        if row.get(by) is not None:
            members.setdefault(str(row[by]), set()).add(row["edit"])
    large = {name: edits for name, edits in members.items() if len(edits) >= min_edits}
    small = [edits for name, edits in members.items() if name not in large]
    if not large or len(members) < 2:
        return []
    ordered = sorted(large.items(), key=lambda item: -len(item[1]))
    groups = [EditGroup(name, len(edits), 1, _results(rows, settings, edits)) for name, edits in ordered]
    if small:
        together = set().union(*small)
        groups.append(EditGroup(None, len(together), len(small), _results(rows, settings, together)))
    return groups


def _results(rows: Sequence[Row], settings: Mapping[str, Any], edits: set[int]) -> dict[str, MetricResult]:
    columns = {}
    numbers = np.array(sorted(edits))
    num_edits = num_edits_of(rows, settings)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind and row["edit"] in edits]
        deciding = next((found[0] for row in own if (found := deciding_score(row)) is not None), None)
        if deciding is None:
            continue
        after, before = (mean_by_edit(own, f"{deciding}_{when}", num_edits)[numbers] for when in ("after", "before"))
        columns[f"{kind}_{deciding}"] = Column("", after, None if np.isnan(before).all() else before)
    return metric_results(columns, *bootstrap_settings(settings))
