"""Fine-tuning baselines and their results, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.intervals import Estimate
from ..evaluation.tables import estimate_cell, markdown_table

TABLE_METRICS = (
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
    """One way to fine-tune edits.

    Args:
        method: a key of `METHODS`; all but LoRA train the same full-rank delta.
        edit_order: as in [`BreadthFirstConfig`].
        batch_size: edits per step.
        loss_averaging: as in [`BreadthFirstConfig`]; without effect for one edit per step.
    """

    method: str
    edit_order: str
    batch_size: int
    loss_averaging: str = "edit"

    def __str__(self) -> str:
        averaging = "" if self.batch_size == 1 else f", by {self.loss_averaging}"
        return f"{self.method}, {self.edit_order.replace('_', '-')}, batches of {self.batch_size}{averaging}"


@dataclass(frozen=True)
class BaselineResult:
    """The result of one baseline.

    Attributes:
        baseline: what was trained.
        metrics: estimates after training, by name.
        before: estimates of the base, by name.
        final_loss: mean loss of the last epoch; `None` if no step was taken.
        training_seconds: duration of training.
        setting: edits, model, recipe and evaluation, the same for all baselines of one comparison.
    """

    baseline: Baseline
    metrics: dict[str, Estimate]
    before: dict[str, Estimate]
    final_loss: float | None
    training_seconds: float
    setting: dict[str, Any]

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> BaselineResult:
        """Return the result that a file of `compare_baselines` holds."""
        own = ("baseline", "metrics", "before", "final_loss", "training_seconds")
        metrics, before = (
            {name: Estimate(**each) for name, each in row[when].items()} for when in ("metrics", "before")
        )
        setting = {name: value for name, value in row.items() if name not in own}
        return cls(Baseline(**row["baseline"]), metrics, before, row["final_loss"], row["training_seconds"], setting)


def baselines_to_markdown(results: Sequence[BaselineResult]) -> str:
    """Return the results of `compare_baselines` as one Markdown table, the base first."""
    names = [name for name in TABLE_METRICS if any(name in result.metrics for result in results)]
    rows = [["base", "", "", "", *(estimate_cell(results[0].before.get(name)) for name in names), ""]]
    for result in results:
        baseline = result.baseline
        averaging = "" if baseline.batch_size == 1 else baseline.loss_averaging
        setting = [baseline.method, baseline.edit_order.replace("_", "-"), str(baseline.batch_size), averaging]
        metrics = [estimate_cell(result.metrics.get(name)) for name in names]
        rows.append([*setting, *metrics, f"{result.training_seconds:.0f}"])
    return markdown_table(["method", "order", "batch", "averaging", *names, "training, s"], rows)
