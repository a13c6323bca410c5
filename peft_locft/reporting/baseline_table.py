"""The results of baselines, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.tables import estimate_cell, markdown_table

FIGURES = (
    "reliability_exact_match",
    "reliability_contains",
    "reliability_token_accuracy",
    "generalization_exact_match",
    "generalization_token_accuracy",
    "locality_unchanged",
    "perplexity",
)


@dataclass(frozen=True)
class Baseline:
    """One way to fine-tune edits in.

    Args:
        method: one of `METHODS`; those but LoRA train the same full-rank delta.
        edit_order: as in [`BreadthFirstConfig`].
        batch_size: edits a step.
        loss_averaging: as in [`BreadthFirstConfig`]; of one edit both are the same.
    """

    method: str
    edit_order: str
    batch_size: int
    loss_averaging: str = "edit"

    def __str__(self) -> str:
        averaging = "" if self.batch_size == 1 else f", by {self.loss_averaging}"
        return f"{self.method}, {self.edit_order.replace('_', '-')}, batches of {self.batch_size}{averaging}"


def baselines_to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results of `compare_baselines` as one Markdown table, the base first."""
    names = [name for name in FIGURES if any(name in row["figures"] for row in rows)]
    cells: list[list[str]] = [
        ["base", "", "", "", *(estimate_cell(rows[0]["before"].get(name)) for name in names), ""]
    ]
    for row in rows:
        baseline = Baseline(**row["baseline"])
        order, averaging = baseline.edit_order.replace("_", "-"), baseline.loss_averaging
        setting = [baseline.method, order, str(baseline.batch_size), "" if baseline.batch_size == 1 else averaging]
        metrics = [estimate_cell(row["figures"].get(name)) for name in names]
        cells.append([*setting, *metrics, f"{row['seconds']:.0f}"])
    return markdown_table(["method", "order", "batch", "averaging", *names, "training, s"], cells)
