"""The results of lm-evaluation-harness for a model and its base, side by side."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from ..io.files import write_atomically
from .intervals import Estimate
from .metric_result import MetricResult
from .tables import DASH, error_cell, markdown_table

Number = float | None


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task.

    Attributes:
        task: the harness' name of the task or group of tasks.
        metric: the harness' name of the metric.
        filter: what the harness applies to an answer before scoring; `"none"` for nothing.
        before: the base's value; `None` without a base.
        before_stderr: its standard error, from the harness; `None` for some metrics.
        after: the edited model's value.
        after_stderr: its standard error.
        change: `after - before`.
        change_stderr: its standard error, from the differences document by document; `None` if the value is not a mean
            over documents. Usually smaller than the other two, since most answers do not change.
        count: number of documents.
        num_fewshot: examples in the prompt.
        higher_is_better: according to the harness; `None` if it does not say.
    """

    task: str
    metric: str
    filter: str
    before: Number
    before_stderr: Number
    after: Number
    after_stderr: Number
    change: Number
    change_stderr: Number
    count: int | None
    num_fewshot: int | None
    higher_is_better: bool | None

    def cells(self) -> list[str]:
        """Return the row of a table: task, metric, before, after, change, documents."""
        notes = [self.filter] if self.filter != "none" else []
        notes += ["lower is better"] if self.higher_is_better is False else []
        metric = f"{self.metric} ({', '.join(notes)})" if notes else self.metric
        return [
            self.task,
            metric,
            error_cell(self.before, self.before_stderr),
            error_cell(self.after, self.after_stderr),
            error_cell(self.change, self.change_stderr),
            DASH if self.count is None else str(self.count),
        ]


@dataclass(frozen=True)
class TaskResults:
    """What [`evaluate_on_tasks`] returns.

    Attributes:
        rows: one for each task, metric and filter.
        settings: what was measured, and how.
    """

    rows: list[TaskRow]
    settings: dict[str, Any]

    def __str__(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Return the rows as one Markdown table."""
        names = ["task", "metric", "before", "after", "change", "documents"]
        table = markdown_table(names, [row.cells() for row in self.rows])
        return (
            f"{table}\n\nAfter ±: the standard error, as the harness computes it; for a change, from the differences "
            "document by document."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        return {"format": 1, "settings": self.settings, "rows": [asdict(row) for row in self.rows]}

    def metric_results(self, confidence: float) -> dict[str, MetricResult]:
        """Return the rows as metrics of an evaluation report, with normal intervals from the standard errors.

        Args:
            confidence: of the intervals, between 0 and 1.
        """
        width = NormalDist().inv_cdf((1 + confidence) / 2)

        def estimate(value: Number, error: Number) -> Estimate | None:
            if value is None:
                return None
            return Estimate(value, value - width * (error or 0.0), value + width * (error or 0.0))

        metrics = {}
        for row in self.rows:
            after = estimate(row.after, row.after_stderr)
            if after is not None:
                before, change = estimate(row.before, row.before_stderr), estimate(row.change, row.change_stderr)
                name = f"{row.task} {row.metric}" + ("" if row.filter == "none" else f" ({row.filter})")
                meaning = f"{row.metric} of task {row.task} in lm-evaluation-harness"
                metrics[name] = MetricResult(meaning, after, before, change, row.count or 0, "documents")
        return metrics

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tasks.md` and `tasks.json`, each atomically.

        Args:
            folder: created if it does not exist.

        Raises:
            FileExistsError: if it is a file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "tasks.md", self.to_markdown() + "\n")
        write_atomically(
            folder / "tasks.json", json.dumps(self.to_dict(), indent=1, allow_nan=False, default=str) + "\n"
        )


def task_rows(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[TaskRow]:
    """Yield the rows of two results of `lm_eval.simple_evaluate`, of the base and of the edited model."""
    for task, metrics in after["results"].items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            error = f"{metric}_stderr,{filter_name}"
            if not filter_name or metric.endswith("_stderr"):
                continue
            old = {} if before is None else before["results"][task]
            was, now = _number(old.get(key)), _number(value)
            yield TaskRow(
                task=task,
                metric=metric,
                filter=filter_name,
                before=was,
                before_stderr=_number(old.get(error)),
                after=now,
                after_stderr=_number(metrics.get(error)),
                change=None if was is None or now is None else now - was,
                change_stderr=None if before is None else _paired_stderr(before, after, task, metric, filter_name),
                count=metrics.get("sample_len"),
                num_fewshot=after["n-shot"].get(task),
                higher_is_better=after["higher_is_better"].get(task, {}).get(metric),
            )


def _number(value: Any) -> Number:
    """Return a finite number as a float, and `None` for anything else, such as the harness' "N/A"."""
    return float(value) if isinstance(value, (int, float, np.number)) and math.isfinite(value) else None


def _paired_stderr(before: Any, after: Any, task: str, metric: str, filter_name: str) -> Number:
    old, new = (_by_document(run, task, metric, filter_name) for run in (before, after))
    if old is None or new is None or old.keys() != new.keys() or len(new) < 2:
        return None
    differences = [new[document] - old[document] for document in new]
    return float(np.std(differences, ddof=1) / math.sqrt(len(differences)))


def _by_document(run: Any, task: str, metric: str, filter_name: str) -> dict[int, float] | None:
    """Return a metric's value for each document; `None` if the metric is not their mean."""
    documents = [each for each in run["samples"].get(task, []) if each["filter"] == filter_name]
    values = {each["doc_id"]: _number(each.get(metric)) for each in documents}
    numbers = {document: value for document, value in values.items() if value is not None}
    value = _number(run["results"][task][f"{metric},{filter_name}"])
    # the harness does not say which of its metrics are means of documents
    is_mean = numbers and value is not None and math.isclose(float(np.mean(list(numbers.values()))), value)
    return numbers if is_mean and len(numbers) == len(values) else None
