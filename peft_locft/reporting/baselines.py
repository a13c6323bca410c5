"""Baselines and rivals and their results, side by side: as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from ..evaluation.intervals import Estimate, format_number
from ..evaluation.tables import DASH, estimate_cell, latex_table, markdown_table

TABLE_METRICS = (
    "reliability_exact_match",
    "reliability_contains",
    "reliability_token_accuracy",
    "generalization_exact_match",
    "generalization_token_accuracy",
    "locality_unchanged",
    "locality_tokens_unchanged",
    "locality_same_subject_first_word_unchanged",
    "locality_same_relation_first_word_unchanged",
    "locality_unrelated_first_word_unchanged",
    "belief_yes_no_new_most_probable",
    "belief_yes_no_old_most_probable",
    "belief_multiple_choice_most_probable",
    "perplexity",
)
COSTS = ("processor s", "peak MB")


@dataclass(frozen=True)
class Baseline:
    """One way to edit a model.

    Args:
        method: a name in `workflows.baselines.ALL_METHODS`.
        edit_order: as in [`BreadthFirstConfig`]; `None`: it is not trained step by step.
        batch_size: edits per step.
        loss_averaging: as in [`BreadthFirstConfig`]; without effect for one edit per step.
    """

    method: str
    edit_order: str | None = None
    batch_size: int = 0
    loss_averaging: str = "edit"

    @property
    def recipe(self) -> str:
        """How it is trained, in words; empty if it is not."""
        if self.edit_order is None:
            return ""
        averaging = "" if self.batch_size == 1 else f", by {self.loss_averaging}"
        return f"{self.edit_order.replace('_', '-')}, batches of {self.batch_size}{averaging}"

    def __str__(self) -> str:
        return ", ".join(filter(None, [self.method, self.recipe]))


@dataclass(frozen=True)
class BaselineResult:
    """The result of one baseline with one seed.

    Attributes:
        baseline: what was compared.
        metrics: estimates after the edit, by name: all metrics of the report.
        before: estimates of the base, by name.
        final_loss: mean loss of the last epoch; `None` if no step was taken.
        training_seconds: duration of the edit.
        processor_seconds: processor time of the edit.
        peak_bytes: largest memory during the edit, see `Usage`.
        chosen: settings that were chosen on other edits; empty for a method that has none.
        notes: what a reader should know.
        setting: edits, model, recipe, seed and evaluation.
    """

    baseline: Baseline
    metrics: dict[str, Estimate]
    before: dict[str, Estimate]
    final_loss: float | None
    training_seconds: float
    processor_seconds: float = 0.0
    peak_bytes: int = 0
    chosen: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    setting: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> BaselineResult:
        """Return the result that a file of `compare_baselines` holds."""
        own = (
            "final_loss",
            "training_seconds",
            "processor_seconds",
            "peak_bytes",
            "chosen",
            "notes",
        )
        metrics, before = (
            {name: Estimate(**each) for name, each in row[when].items()} for when in ("metrics", "before")
        )
        setting = {name: value for name, value in row.items() if name not in (*own, "baseline", "metrics", "before")}
        values = {name: row[name] for name in own if name in row}
        return cls(Baseline(**row["baseline"]), metrics, before, **values, setting=setting)

    @property
    def label(self) -> str:
        """Method and recipe, or the settings that were chosen."""
        return ", ".join(filter(None, [str(self.baseline), words_of_settings(self.chosen)]))


def words_of_settings(chosen: Mapping[str, Any]) -> str:
    """Return chosen settings in words, such as "layers 3-7, damping 150"."""
    return ", ".join(f"{name.replace('_', ' ')} {_setting(value)}" for name, value in chosen.items())


def _setting(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = list(value)
        in_order = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
        return f"{numbers[0]}-{numbers[-1]}" if in_order else " ".join(map(str, numbers))
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def columns_of(results: Sequence[BaselineResult], columns: Sequence[str] | None = None) -> list[str]:
    """Return the names of the metrics to show.

    Args:
        results: at least one.
        columns: names of metrics; `None`: those of `TABLE_METRICS` that were measured.

    Raises:
        ValueError: if a metric was not measured.
    """
    measured = dict.fromkeys(name for result in results for name in result.metrics)
    if columns is None:
        return [name for name in TABLE_METRICS if name in measured]
    unknown = [name for name in columns if name not in measured]
    if unknown:
        raise ValueError(f"columns: found {', '.join(unknown)}; these were measured: {', '.join(measured)}.")
    return list(columns)


def baselines_table(
    results: Sequence[BaselineResult], columns: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return the names and the rows of the table of `compare_baselines`, the base first.

    With one seed, a cell has the interval over edits; with several, mean and standard deviation over seeds.
    """
    names = columns_of(results, columns)
    groups = by_baseline(results)
    rows = [["base", "", *(estimate_cell(results[0].before.get(name)) for name in names), *[""] * len(COSTS)]]
    for group in groups:
        first = group[0]
        settings = dict.fromkeys(filter(None, (words_of_settings(each.chosen) for each in group)))
        setting = "; ".join(filter(None, [first.baseline.recipe, *settings]))
        cells = [_cell([each.metrics.get(name) for each in group]) for name in names]
        costs = [
            f"{fmean(each.processor_seconds for each in group):.0f}",
            f"{max(each.peak_bytes for each in group) / 1e6:.0f}",
        ]
        rows.append([first.baseline.method, setting, *cells, *costs])
    return ["method", "setting", *names, *COSTS], rows


def by_baseline(results: Sequence[BaselineResult]) -> list[list[BaselineResult]]:
    """Return the results of each baseline, one for each seed."""
    groups: dict[Baseline, list[BaselineResult]] = {}
    for result in results:
        groups.setdefault(result.baseline, []).append(result)
    return list(groups.values())


def over_seeds(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Return mean, and mean minus and plus the standard deviation over seeds; of one seed, its interval over edits."""
    found = [each for each in estimates if each is not None]
    if len(found) < 2:
        return found[0] if found else None
    mean, spread = fmean(each.value for each in found), stdev(each.value for each in found)
    return Estimate(mean, mean - spread, mean + spread)


def _cell(estimates: Sequence[Estimate | None]) -> str:
    estimate = over_seeds(estimates)
    if estimate is None or len(estimates) < 2:
        return estimate_cell(estimate)
    return f"{format_number(estimate.value)} ± {format_number(estimate.high - estimate.value)}"


def baselines_to_markdown(results: Sequence[BaselineResult], columns: Sequence[str] | None = None) -> str:
    """Return the results of `compare_baselines` as one Markdown table, the base first, with notes below."""
    table = markdown_table(*baselines_table(results, columns))
    notes = dict.fromkeys(note for result in results for note in result.notes)
    return "\n".join([table, *(f"\n{note}" for note in notes)])


def baselines_to_csv(results: Sequence[BaselineResult]) -> str:
    """Return the results as CSV: a row for each baseline, seed and metric, with the interval over edits."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["method", "setting", "seed", "metric", "value", "low", "high"])
    for name, each in results[0].before.items():
        writer.writerow(["base", "", "", name, *each])
    for result in results:
        setting = ", ".join(filter(None, [result.baseline.recipe, words_of_settings(result.chosen)]))
        head = [result.baseline.method, setting, result.setting.get("seed", "")]
        costs = {"processor_seconds": result.processor_seconds, "peak_bytes": result.peak_bytes}
        writer.writerows([*head, name, *each] for name, each in result.metrics.items())
        writer.writerows([*head, name, value, "", ""] for name, value in costs.items())
    return lines.getvalue()


def baselines_to_latex(results: Sequence[BaselineResult], columns: Sequence[str] | None = None) -> str:
    """Return the table of `baselines_to_markdown` for LaTeX with the package booktabs; wide: use `table*`."""
    names, rows = baselines_table(results, columns)
    cells = [[None if cell == DASH else cell for cell in row] for row in rows]
    head = [name.replace("_", " ") for name in names]
    return latex_table(head, cells, comment=r"\usepackage{booktabs}", num_left=2)
