"""From replies to metrics: a value for each metric and edit, the interval of their mean, and a row for each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.edits import Edit
from .by_language import language_of, only_own_units
from .intervals import Array, Bootstrap, Estimate
from .items import EvalItem, Reply
from .kinds import AS_IT_IS, PUBLISHED, Kind
from .metric_result import Column, MetricResult
from .metrics import EDIT_SCORE, EDIT_SCORE_PARTS, METRICS, Metric, metric_names, why_missing
from .relation_labels import relation_label
from .row_values import mean_by_unit
from .scoring import harmonic_mean

Scores = list[float | None]


@dataclass(frozen=True)
class PairedReplies:
    """The replies of an edited model and, if there is one, of its base to the items of some edits.

    Args:
        edits: the edits.
        items: what was asked of them.
        after: the edited model's replies.
        before: the base's.
        kinds: the kinds of items that were wanted, by name; there may be no item of a kind.
    """

    edits: Sequence[Edit]
    items: Sequence[EvalItem]
    after: Sequence[Reply]
    before: Sequence[Reply] | None
    kinds: Mapping[str, Kind] = field(default_factory=lambda: PUBLISHED)

    def scored(self, protocols: Sequence[str]) -> ScoredReplies:
        """Score every item once by each metric of the protocols that applies to its kind."""
        wanted = {name for kind in self.kinds.values() for name in kind.metrics}
        metrics = {name: each for name, each in METRICS.items() if each.protocol in protocols and name in wanted}
        before: Sequence[Reply | None] = self.before or [None] * len(self.items)
        after_scores: dict[str, Scores] = {name: [] for name in metrics}
        before_scores: dict[str, Scores] = {name: [] for name, metric in metrics.items() if not metric.needs_base}
        for item, reply, base in zip(self.items, self.after, before, strict=True):
            for name, metric in metrics.items():
                applies = name in self.kinds[item.kind].metrics
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

    def languages(self) -> list[str]:
        """Return the languages of the items, those of the edits first; empty unless there are several."""
        numbers = sorted(
            range(len(self.replies.items)), key=lambda number: self.replies.items[number].kind == "cross_lingual"
        )
        found = dict.fromkeys(map(self._language, numbers))
        return list(found) if len(found) > 1 else []

    def _language(self, number: int) -> str:
        item = self.replies.items[number]
        return language_of(item, self.replies.edits[item.edit])

    def columns(self, language: str | None = None) -> tuple[dict[str, Column], dict[str, str]]:
        """Return the metrics that have a value, by name, and why each of the others has none.

        Args:
            language: count only the items in this language; `None`: all.
        """
        has_base = self.replies.before is not None
        columns, missing = {}, {}
        protocols = {metric.protocol for metric in self.metrics.values()}
        for name, (kind, short, metric) in metric_names(list(protocols), self.replies.kinds).items():
            numbers = [
                number
                for number, item in enumerate(self.replies.items)
                if item.kind == kind.name and language in (None, self._language(number))
            ]
            after = self._by_edit(numbers, self.after[short])
            if np.isnan(after).all():
                missing[name] = why_missing(metric, kind, self.replies.items, has_base)
                continue
            columns[name] = Column(
                metric.meaning,
                after,
                self._by_edit(numbers, self.before[short]) if has_base and short in self.before else None,
                protocol=f"{kind.protocol}; {metric.protocol}",
                in_papers=kind.paper_names(short),
                chance=self._chance(numbers, short) if metric.by_choice else None,
            )
        return columns, missing

    def _chance(self, numbers: Sequence[int], short: str) -> Array:
        """Return what each edit would have by choosing at random, (edits,), over the items that have a score."""
        chances: Scores = [None] * len(self.replies.items)
        for number in numbers:
            if self.after[short][number] is not None:
                chances[number] = 1 / len(self.replies.items[number].choices)
        return self._by_edit(numbers, chances)

    def _by_edit(self, numbers: Sequence[int], scores: Scores) -> Array:
        """Return the mean score of each edit's items, (edits,); NaN for an edit without one."""
        pairs = [
            (self.replies.items[number].edit, score) for number in numbers if (score := scores[number]) is not None
        ]
        return mean_by_unit(pairs, len(self.replies.edits))

    def rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each item: its source, the expected answer, and each model's answer and scores."""
        rows = []
        has_languages = bool(self.languages())
        for number, (item, reply) in enumerate(zip(self.replies.items, self.replies.after, strict=True)):
            row: dict[str, Any] = {
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
            if has_languages:
                row["language"] = self._language(number)
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


def results_by_language(
    scored: ScoredReplies, num_resamples: int, confidence: float, seed: int
) -> dict[str, dict[str, MetricResult]]:
    """Return the metrics of each language; empty if there is one. Arguments as in [`metric_results`]."""
    found = {}
    for language in scored.languages():
        columns, _ = scored.columns(language)
        if columns:
            found[language] = metric_results(only_own_units(columns), num_resamples, confidence, seed)
    return found


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
        chance = None if column.chance is None else float(np.nanmean(column.chance))
        described = (column.protocol, column.in_papers, chance)
        metrics[name] = MetricResult(column.meaning, after, before, change, count, column.unit, *described)
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
    protocol = f"{AS_IT_IS}; probability"
    return MetricResult("harmonic mean of ES, PS and NS", after, before, change, count, "edits", protocol, "S, Score")
