"""From replies to figures: a value a metric and an edit, the interval of their mean, and a row a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.edits import Edit
from .edit_questions import Item, Kind, Reply
from .intervals import Array, Bootstrap, Estimate
from .metrics import EDIT_SCORE, EDIT_SCORE_PARTS, METRICS, Metric, meaning_of, metric_names, why_missing
from .report import Result
from .scoring import harmonic_mean


@dataclass(frozen=True)
class Column:
    """A metric's value for each unit, (units,), NaN where it has none.

    Args:
        meaning: what the metric tells.
        after: of the edited model.
        before: of its base, if there is one that has such values.
        unit: what is counted.
    """

    meaning: str
    after: Array
    before: Array | None = None
    unit: str = "edits"


@dataclass(frozen=True)
class PairedReplies:
    """What a model and, if there is one, its base reply to the items of some edits."""

    edits: Sequence[Edit]
    items: Sequence[Item]
    after: Sequence[Reply]
    before: Sequence[Reply] | None

    def columns(self, protocols: Sequence[str]) -> tuple[dict[str, Column], dict[str, str]]:
        """Return the metrics that have a value, by name, and why each of the others has none."""
        columns, missing = {}, {}
        for name, (kind, metric) in metric_names(protocols).items():
            after = self._by_edit(kind, metric, self.after)
            before = None if self.before is None or metric.needs_base else self._by_edit(kind, metric, self.before)
            if np.isnan(after).all():
                missing[name] = why_missing(metric, kind, self.items, self.before is not None)
            else:
                columns[name] = Column(meaning_of(name), after, before)
        return columns, missing

    def _by_edit(self, kind: Kind, metric: Metric, replies: Sequence[Reply]) -> Array:
        """Return the mean of an edit's items for each edit."""
        sums, counts = np.zeros(len(self.edits)), np.zeros(len(self.edits))
        for number, (item, reply) in enumerate(zip(self.items, replies, strict=True)):
            value = metric.score(item, reply, self.before[number] if self.before else None)
            if item.kind == kind and value is not None:
                sums[item.edit] += value
                counts[item.edit] += 1
        with np.errstate(invalid="ignore"):
            return sums / counts

    def rows(self, protocols: Sequence[str]) -> list[dict[str, Any]]:
        """Return a dictionary an item: where it is from, what was expected, and what each model said and scored."""
        suffixes = {suffix: metric for suffix, metric in METRICS.items() if metric.protocol in protocols}
        rows = []
        for number, (item, reply) in enumerate(zip(self.items, self.after, strict=True)):
            base = self.before[number] if self.before else None
            row = {
                "edit": item.edit,
                "source": self.edits[item.edit].source,
                "kind": item.kind,
                "prompt": item.prompt,
                "expected": item.expected,
                "answer_before": base.text if base else None,
                "answer_after": reply.text,
            }
            for suffix, metric in suffixes.items():
                applies = item.kind in metric.kinds
                if not metric.needs_base:
                    row[f"{suffix}_before"] = metric.score(item, base, base) if applies and base else None
                row[f"{suffix}_after"] = metric.score(item, reply, base) if applies else None
            rows.append(row)
        return rows


def results(columns: dict[str, Column], num_resamples: int, confidence: float, seed: int) -> dict[str, Result]:
    """Return the mean of every column, and of its change, with the interval of a bootstrap over units.

    Args:
        columns: all of the same units; where the three of CounterFact's edit score are among them, it is added.
        num_resamples: of the bootstrap.
        confidence: such as 0.95.
        seed: the same one gives the same intervals.
    """
    if not columns:
        return {}
    arrays: list[Array] = []
    place: dict[tuple[str, str], int] = {}
    for name, column in columns.items():
        for when, values in (("after", column.after), ("before", column.before)):
            if values is not None:
                place[name, when] = len(arrays)
                arrays.append(values)
    bootstrap = Bootstrap(np.stack(arrays, axis=1), num_resamples, confidence, seed)
    found = {}
    for name, column in columns.items():
        after = bootstrap.mean(place[name, "after"])
        assert after is not None  # a column without values is none
        before = change = None
        if column.before is not None:
            before = bootstrap.mean(place[name, "before"])
            change = bootstrap.difference(place[name, "after"], place[name, "before"])
        count = int((~np.isnan(column.after)).sum())
        found[name] = Result(column.meaning, after, before, change, count, column.unit)
        if name == EDIT_SCORE_PARTS[-1] and all(part in columns for part in EDIT_SCORE_PARTS):
            found[EDIT_SCORE] = _edit_score(bootstrap, place, count)
    return found


def _edit_score(bootstrap: Bootstrap, place: dict[tuple[str, str], int], count: int) -> Result:
    def at(when: str) -> list[int]:
        return [place[part, when] for part in EDIT_SCORE_PARTS]

    after = bootstrap.statistic(lambda means: harmonic_mean(means[..., at("after")]))
    before: Estimate | None = None
    change: Estimate | None = None
    if (EDIT_SCORE_PARTS[0], "before") in place:
        before = bootstrap.statistic(lambda means: harmonic_mean(means[..., at("before")]))
        change = bootstrap.statistic(
            lambda means: harmonic_mean(means[..., at("after")]) - harmonic_mean(means[..., at("before")])
        )
    assert after is not None
    return Result("harmonic mean of ES, PS and NS", after, before, change, count)
