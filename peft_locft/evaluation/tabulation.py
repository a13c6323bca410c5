"""From replies to metrics: a value for each metric and edit, the interval of their mean, and a row for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.edits import Edit
from .intervals import Array, Bootstrap, Estimate
from .items import EvalItem, Reply
from .metrics import EDIT_SCORE, EDIT_SCORE_PARTS, KINDS, METRICS, Metric, meaning_of, why_missing
from .relation_labels import relation_label
from .report import MetricResult
from .row_values import mean_by_unit
from .scoring import harmonic_mean

Scores = list[float | None]


@dataclass(frozen=True)
class Column:
    """A metric's values, one for each unit, (units,); NaN for a unit without one.

    Args:
        meaning: what the metric measures.
        after: of the edited model.
        before: of its base; `None` without a base, or if the metric compares with the base.
        unit: what a value belongs to: `"edits"`, `"prompts"`.
    """

    meaning: str
    after: Array
    before: Array | None = None
    unit: str = "edits"


@dataclass(frozen=True)
class PairedReplies:
    """The replies of an edited model and, if there is one, of its base to the items of some edits."""

    edits: Sequence[Edit]
    items: Sequence[EvalItem]
    after: Sequence[Reply]
    before: Sequence[Reply] | None

    def scored(self, protocols: Sequence[str]) -> ScoredReplies:
        """Score every item once by each metric of the protocols that applies to its kind."""
        metrics = {name: metric for name, metric in METRICS.items() if metric.protocol in protocols}
        before: Sequence[Reply | None] = self.before or [None] * len(self.items)
        after_scores: dict[str, Scores] = {name: [] for name in metrics}
        before_scores: dict[str, Scores] = {name: [] for name, metric in metrics.items() if not metric.needs_base}
        for item, reply, base in zip(self.items, self.after, before, strict=True):
            for name, metric in metrics.items():
                applies = item.kind in metric.kinds
                after_scores[name].append(metric.score(item, reply, base) if applies else None)
                if name in before_scores:
                    before_scores[name].append(metric.score(item, base, base) if applies and base else None)
        return ScoredReplies(self, metrics, after_scores, before_scores)


@dataclass(frozen=True)
class ScoredReplies:
    """Replies with a score for each item and metric.

    Args:
        replies: what was scored.
        metrics: by name, without the kind: `"exact_match"`.
        after: the edited model's scores by metric, one for each item, from 0 to 1; `None` where there is none.
        before: the base's, without the metrics that compare with the base.
    """

    replies: PairedReplies
    metrics: dict[str, Metric]
    after: dict[str, Scores]
    before: dict[str, Scores]

    def columns(self) -> tuple[dict[str, Column], dict[str, str]]:
        """Return the metrics that have a value, by name, and why each of the others has none."""
        has_base = self.replies.before is not None
        columns, missing = {}, {}
        for kind in KINDS:
            numbers = [number for number, item in enumerate(self.replies.items) if item.kind == kind]
            for short, metric in self.metrics.items():
                if kind not in metric.kinds:
                    continue
                name = f"{kind}_{short}"
                after = self._by_edit(numbers, self.after[short])
                before = self._by_edit(numbers, self.before[short]) if has_base and short in self.before else None
                if np.isnan(after).all():
                    missing[name] = why_missing(metric, kind, self.replies.items, has_base)
                else:
                    columns[name] = Column(meaning_of(name), after, before)
        return columns, missing

    def _by_edit(self, numbers: Sequence[int], scores: Scores) -> Array:
        """Return the mean score of each edit's items, (edits,); NaN for an edit without one."""
        pairs = [
            (self.replies.items[number].edit, score) for number in numbers if (score := scores[number]) is not None
        ]
        return mean_by_unit(pairs, len(self.replies.edits))

    def rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each item: its source, the expected answer, and each model's answer and scores."""
        rows = []
        for number, (item, reply) in enumerate(zip(self.replies.items, self.replies.after, strict=True)):
            row = {
                "edit": item.edit,
                "source": self.replies.edits[item.edit].source,
                "relation": relation_label(self.replies.edits[item.edit]),
                "kind": item.kind,
                "prompt": item.prompt,
                "in_chat": item.history is not None,
                "expected": item.expected,
                "answer_before": self.replies.before[number].text if self.replies.before else None,
                "answer_after": reply.text,
            }
            for name in self.metrics:
                if name in self.before:
                    row[f"{name}_before"] = self.before[name][number]
                row[f"{name}_after"] = self.after[name][number]
            rows.append(row | self._long_answers(number))
        return rows

    def _long_answers(self, number: int) -> dict[str, str | None]:
        """Return the answers that were read on beyond their first stop, because the expected answer has one."""
        both = {"before": self.replies.before, "after": self.replies.after}
        replies = {when: found[number] for when, found in both.items() if found is not None}
        return {
            f"long_answer_{when}": reply.long_text for when, reply in replies.items() if reply.long_text != reply.text
        }


def metric_results(
    columns: dict[str, Column], num_resamples: int, confidence: float, seed: int
) -> dict[str, MetricResult]:
    """Return the mean of every column and of its change, each with the interval of a bootstrap over units.

    Args:
        columns: all with the same units. CounterFact's edit score is added if its three parts are among them.
        num_resamples: resamples of the bootstrap.
        confidence: of the intervals, such as 0.95.
        seed: the same seed gives the same intervals.
    """
    if not columns:
        return {}
    arrays: list[Array] = []
    index: dict[tuple[str, str], int] = {}
    for name, column in columns.items():
        for when, values in (("after", column.after), ("before", column.before)):
            if values is not None:
                index[name, when] = len(arrays)
                arrays.append(values)
    bootstrap = Bootstrap(np.stack(arrays, axis=1), num_resamples, confidence, seed)
    metrics = {}
    for name, column in columns.items():
        after = bootstrap.mean(index[name, "after"])
        assert after is not None  # every column has a value
        before = change = None
        if column.before is not None:
            before = bootstrap.mean(index[name, "before"])
            change = bootstrap.difference(index[name, "after"], index[name, "before"])
        count = int((~np.isnan(column.after)).sum())
        metrics[name] = MetricResult(column.meaning, after, before, change, count, column.unit)
        if name == EDIT_SCORE_PARTS[-1] and all(part in columns for part in EDIT_SCORE_PARTS):
            metrics[EDIT_SCORE] = _edit_score(bootstrap, index, count)
    return metrics


def _edit_score(bootstrap: Bootstrap, index: dict[tuple[str, str], int], count: int) -> MetricResult:
    def at(when: str) -> list[int]:
        return [index[part, when] for part in EDIT_SCORE_PARTS]

    after = bootstrap.statistic(lambda means: harmonic_mean(means[..., at("after")]))
    before: Estimate | None = None
    change: Estimate | None = None
    if (EDIT_SCORE_PARTS[0], "before") in index:
        before = bootstrap.statistic(lambda means: harmonic_mean(means[..., at("before")]))
        change = bootstrap.statistic(
            lambda means: harmonic_mean(means[..., at("after")]) - harmonic_mean(means[..., at("before")])
        )
    assert after is not None
    return MetricResult("harmonic mean of ES, PS and NS", after, before, change, count)
