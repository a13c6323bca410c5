"""Several reports side by side: their metrics, paired differences, and the questions on which they differ."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .citations import bibtex
from .intervals import Array, Bootstrap, Estimate
from .report import EvaluationReport
from .row_values import Row, bootstrap_settings, mean_by_edit, num_edits_of
from .summary import deciding_score
from .tables import csv_table, estimate_cell, latex_table, markdown_table

# settings that say how a value was measured, not of what
HOW = (
    "protocols",
    "chat_template",
    "chat_template_kwargs",
    "max_new_tokens",
    "text_window",
    "max_text_tokens",
    "judge",
)
QuestionKey = tuple[int, str, str, bool, int]  # edit, kind, prompt, in chat; and which of equal ones


@dataclass(frozen=True)
class DifferingQuestion:
    """A question that some models answer as they should, and others do not.

    Attributes:
        edit: index of the edit.
        kind: what the answer measures.
        prompt: the question.
        expected: the right answer; `None` if none is known.
        answers: the answer after the edit in each report; `None` if nothing was generated.
        passed: whether each answer is as it should be.
    """

    edit: int
    kind: str
    prompt: str
    expected: str | None
    answers: tuple[str | None, ...]
    passed: tuple[bool, ...]


@dataclass(frozen=True)
class ReportComparison:
    """Reports by name, the first of which the others are compared with. Made by [`compare_reports`].

    Attributes:
        reports: by the name to show.

    Example:
        >>> comparison = compare_reports({"published": first, "balanced": second})
        >>> comparison.differences["generalization_exact_match"]["balanced"]
        Estimate(value=0.094, low=0.042, high=0.146)
        >>> print(comparison)
    """

    reports: dict[str, EvaluationReport]

    def __str__(self) -> str:
        return self.to_markdown()

    @property
    def names(self) -> list[str]:
        """The reports' names."""
        return list(self.reports)

    @cached_property
    def metrics(self) -> list[str]:
        """The names of the metrics that at least one report has."""
        return list(dict.fromkeys(name for report in self.reports.values() for name in report.results))

    def after(self, metric: str) -> list[Estimate | None]:
        """Return a metric after the edit in each report; `None` where it was not measured."""
        found = (report.results.get(metric) for report in self.reports.values())
        return [None if result is None else result.after for result in found]

    def before(self, metric: str) -> Estimate | None:
        """Return a metric before the edit, if all reports have the same value: they have the same base."""
        found = {
            None if result is None or result.before is None else result.before
            for report in self.reports.values()
            for result in [report.results.get(metric)]
        }
        return found.pop() if len(found) == 1 else None

    @cached_property
    def why_unpaired(self) -> str | None:
        """Why there are no paired differences; `None` if there are."""
        first, *others = (_identity(report) for report in self.reports.values())
        if not others:
            return "there is only one report"
        if first is None or any(other != first for other in others):
            return "the reports are of different edits"
        return None

    @cached_property
    def differences(self) -> dict[str, dict[str, Estimate]]:
        """By metric and name of a report: its value minus that of the first, paired by edit, with an interval.

        Empty if the reports are of different edits. A metric that is no mean of rows (perplexity, the edit score) has
        none.
        """
        if self.why_unpaired is not None:
            return {}
        found = {metric: dict(self._differences(metric)) for metric in self.metrics}
        return {metric: of_reports for metric, of_reports in found.items() if of_reports}

    def _differences(self, metric: str) -> Iterator[tuple[str, Estimate]]:
        (_, first), *others = self.reports.items()
        reference = _by_edit(first, metric)
        for name, report in others:
            values = _by_edit(report, metric)
            if reference is None or values is None or len(values) != len(reference):
                continue
            both = ~(np.isnan(values) | np.isnan(reference))
            if both.any():
                table = np.stack([values[both], reference[both]], axis=1)
                difference = Bootstrap(table, *bootstrap_settings(first.settings)).difference(0, 1)
                assert difference is not None
                yield name, difference

    @cached_property
    def differing_settings(self) -> dict[str, list[Any]]:
        """Settings that say how the values were measured, and are not the same in all reports: their values."""
        values = {name: [_shown(report.settings.get(name)) for report in self.reports.values()] for name in HOW}
        return {name: each for name, each in values.items() if any(value != each[0] for value in each)}

    @cached_property
    def num_questions(self) -> int:
        """Number of questions that all reports have asked and scored."""
        return len(set.intersection(*(set(rows) for rows in self._scored)))

    @cached_property
    def differing_questions(self) -> list[DifferingQuestion]:
        """The questions that some models answer as they should and others do not; empty for different edits."""
        if self.why_unpaired is not None:
            return []
        first, *others = self._scored
        return [
            question
            for key in first
            if all(key in rows for rows in others)
            and len(set((question := _question([rows[key] for rows in self._scored])).passed)) > 1
        ]

    @cached_property
    def _scored(self) -> list[dict[QuestionKey, Row]]:
        return [dict(_rows_by_question(report.rows)) for report in self.reports.values()]

    @cached_property
    def is_growing(self) -> bool:
        """Whether each report is of the first edits of a longer one: 10, 100, 1,000 edits of the same list."""
        lists = sorted((_edited(report.rows) for report in self.reports.values()), key=len)
        pairs = list(itertools.pairwise(lists))
        return bool(pairs) and all(
            0 < len(shorter) < len(longer) and longer[: len(shorter)] == shorter for shorter, longer in pairs
        )

    @cached_property
    def curve(self) -> list[dict[str, float]]:
        """The metrics by number of edits, if the reports are of growing lists of edits; otherwise empty.

        A point has `num_edits`, and the value of each metric after these edits.
        """
        if not self.is_growing:
            return []
        points = [
            {"num_edits": float(num_edits_of(report.rows, report.settings))}
            | {name: result.after.value for name, result in report.results.items()}
            for report in self.reports.values()
        ]
        return sorted(points, key=lambda point: point["num_edits"])

    # ------------------------------------------------------------------ tables

    def to_markdown(self) -> str:
        """Return the metrics side by side, the paired differences, and how many questions differ."""
        confidence = next(iter(self.reports.values())).confidence
        lines = [markdown_table(*self._table()), "", f"In brackets: the {confidence} confidence interval (bootstrap)."]
        for name, values in self.differing_settings.items():
            each = ", ".join(f"{report}: {value}" for report, value in zip(self.names, values, strict=True))
            lines.append(f"Measured differently: {name} ({each}).")
        if self.why_unpaired is not None:
            return "\n".join([*lines, f"No paired differences: {self.why_unpaired}."])
        first, *others = self.names
        rows = [
            [metric, *(estimate_cell(of_reports.get(name)) for name in others)]
            for metric, of_reports in self.differences.items()
        ]
        lines += ["", f"Difference from {first}, paired by edit:", ""]
        lines += [markdown_table(["metric", *others], rows), ""]
        lines.append(
            f"{len(self.differing_questions)} of {self.num_questions} questions are answered as they should be by one "
            "model and not by another."
        )
        return "\n".join(lines)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        rows = [[name, *map(estimate_cell, (self.before(name), *self.after(name)))] for name in self.metrics]
        return ["metric", "before", *self.names], rows

    def to_latex(self, metrics: Sequence[str] | None = None) -> str:
        """Return the metrics side by side as a LaTeX table, see [`EvaluationReport.to_latex`].

        Args:
            metrics: their names, in order; `None`: all.

        Raises:
            KeyError: if a name is not among `metrics`.
        """
        names = self.metrics if metrics is None else metrics
        unknown = [name for name in names if name not in self.metrics]
        if unknown:
            raise KeyError(f"{unknown[0]}: no report has it; expected one of {', '.join(self.metrics)}")
        rows = [[name.replace("_", " "), self.before(name), *self.after(name)] for name in names]
        models = (f"{name}: {report.description}" for name, report in self.reports.items())
        return latex_table(["metric", "before", *self.names], rows, comment="\n".join(models))

    def to_csv(self) -> str:
        """Return a row for each metric and report: value, interval, count, and the difference from the first."""
        columns = ["metric", "report", "value", "low", "high", "count", "unit", "difference", "difference_low"]
        rows = [
            [metric, name, *result.after, result.count, result.unit, *self._difference_cells(metric, name)]
            for metric in self.metrics
            for name, report in self.reports.items()
            if (result := report.results.get(metric)) is not None
        ]
        return csv_table([*columns, "difference_high"], rows)

    def _difference_cells(self, metric: str, name: str) -> Sequence[float | None]:
        return self.differences.get(metric, {}).get(name, (None, None, None))

    def citations(self) -> str:
        """Return BibTeX of what the reports name, see [`EvaluationReport.citations`]."""
        return bibtex(key for report in self.reports.values() for key in report.papers())


def compare_reports(reports: Mapping[str, EvaluationReport]) -> ReportComparison:
    """Compare reports: metrics side by side, paired differences from the first, questions where they differ.

    Args:
        reports: by the name to show, the one to compare with first.

    Raises:
        ValueError: if there are none.

    Example:
        >>> folders = ("published", "balanced")
        >>> comparison = compare_reports({folder: EvaluationReport.load(folder) for folder in folders})
    """
    if not reports:
        raise ValueError("compare_reports: found no report; expected at least one")
    return ReportComparison(dict(reports))


def _identity(report: EvaluationReport) -> str | None:
    edits = report.settings.get("edits")
    return edits.get("sha256") if isinstance(edits, Mapping) else None


def _by_edit(report: EvaluationReport, metric: str) -> Array | None:
    """Return the values of a metric by edit, (edits,); `None` if the rows do not hold them."""
    kinds = sorted({row["kind"] for row in report.rows if metric.startswith(f"{row['kind']}_")}, key=len)
    if not kinds or metric not in report.results:
        return None
    own = [row for row in report.rows if row["kind"] == kinds[-1]]
    name = f"{metric.removeprefix(kinds[-1])[1:]}_after"
    if all(row.get(name) is None for row in own):
        return None
    return mean_by_edit(own, name, num_edits_of(report.rows, report.settings))


def _shown(value: Any) -> Any:
    """Return a setting as a reader needs it: the name of a judge, and "none" for what was not set."""
    return (value.get("label") if isinstance(value, Mapping) and "label" in value else value) or "none"


def _rows_by_question(rows: Sequence[Row]) -> Iterator[tuple[QuestionKey, Row]]:
    """Yield the rows with a score, each with its question."""
    seen: Counter[tuple[int, str, str, bool]] = Counter()
    for row in rows:
        key = (row["edit"], row["kind"], row["prompt"], bool(row.get("in_chat")))
        if deciding_score(row) is not None:
            yield (*key, seen[key]), row
        seen[key] += 1


def _question(rows: Sequence[Row]) -> DifferingQuestion:
    first = rows[0]
    answers = tuple(row.get("answer_after") for row in rows)
    passed = tuple(deciding is not None and deciding[1] == 1 for deciding in map(deciding_score, rows))
    return DifferingQuestion(first["edit"], first["kind"], first["prompt"], first.get("expected"), answers, passed)


def _edited(rows: Sequence[Row]) -> list[tuple[str, Any]]:
    return [(row["prompt"], row.get("expected")) for row in rows if row["kind"] == "reliability"]
