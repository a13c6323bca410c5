"""Metrics by language: in which languages the edits are learned, and asked in which they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..data.edits import Edit
from .metric_result import Column, MetricResult
from .tables import estimate_cell

if TYPE_CHECKING:
    from .items import EvalItem  # which needs transformers, and inspecting an adapter does not

ByLanguage = Mapping[str, Mapping[str, MetricResult]]
NOT_SAID = "not said"
# of each group, the first that was measured is shown in tables; a report's JSON has all
SHOWN = {
    "reliability": ("exact_match", "token_accuracy", "more_probable"),
    "generalization": ("exact_match", "token_accuracy", "more_probable"),
    "locality": ("unchanged", "tokens_unchanged", "exact_match", "token_accuracy", "more_probable"),
    "portability": ("exact_match", "token_accuracy"),
    "cross_lingual": ("exact_match", "token_accuracy"),
}
MAX_LANGUAGES = 20  # in a table
HEADER = ["language", "metric", "before", "after", "change", "measured on"]


def language_of(item: EvalItem, edit: Edit) -> str:
    """Return the language that an item is asked in: its own, or else its edit's."""
    own = edit.language if item.language is None and item.kind != "cross_lingual" else item.language
    return own or NOT_SAID


def only_own_units(columns: Mapping[str, Column]) -> dict[str, Column]:
    """Return columns without the edits that have a value in none of them."""
    has_value = np.zeros(len(next(iter(columns.values())).after), dtype=bool)
    for column in columns.values():
        has_value |= ~np.isnan(column.after)
    return {
        name: replace(
            column,
            after=column.after[has_value],
            before=None if column.before is None else column.before[has_value],
            chance=None if column.chance is None else column.chance[has_value],
        )
        for name, column in columns.items()
    }


def shown_metrics(results: Mapping[str, MetricResult]) -> dict[str, MetricResult]:
    """Return the metric of each group that stands for it in a table."""
    candidates = ([f"{key}_{short}" for short in shown] for key, shown in SHOWN.items())
    names = (next((name for name in each if name in results), None) for each in candidates)
    return {name: results[name] for name in names if name is not None}


def language_rows(by_language: ByLanguage) -> list[list[str]]:
    """Return the cells of a table with the columns of `HEADER`, a row for each language and metric."""
    languages = list(by_language.items())[:MAX_LANGUAGES]
    return [
        [language, name, *map(estimate_cell, (each.before, each.after, each.change)), f"{each.count} {each.unit}"]
        for language, results in languages
        for name, each in shown_metrics(results).items()
    ]


def what_is_left_out(by_language: ByLanguage) -> Sequence[str]:
    """Return a sentence if a table does not show all languages."""
    more = len(by_language) - MAX_LANGUAGES
    return [f"{more} more languages are in evaluation.json."] if more > 0 else []
