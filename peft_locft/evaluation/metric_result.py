"""A metric: its values by unit, and the estimates of their means."""

from __future__ import annotations

from dataclasses import dataclass

from .intervals import Array, Estimate


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One metric.

    Attributes:
        meaning: what it measures, in words.
        after: of the edited model.
        before: of the base; `None` without a base, or if the metric compares with the base.
        change: `after - before`, with an interval from the same resamples of both.
        count: number of units that it is the mean of.
        unit: such as edits, or windows of text.
        protocol: how prompts are asked, and how answers are scored, such as "belief; probability".
        in_papers: what papers call it, such as "rewrite_acc"; `""` if they have no word for it.
        chance: what choosing at random gives, of a metric that counts choices.
    """

    meaning: str
    after: Estimate
    before: Estimate | None
    change: Estimate | None
    count: int
    unit: str = "edits"
    protocol: str = ""
    in_papers: str = ""
    chance: float | None = None


@dataclass(frozen=True)
class Column:
    """A metric's values, one for each unit, (units,); NaN for a unit without one.

    Args:
        meaning: what the metric measures.
        after: of the edited model.
        before: of its base; `None` without a base, or if the metric compares with the base.
        unit: what a value belongs to: `"edits"`, `"prompts"`.
        protocol: how its prompts are asked, and how answers are scored.
        in_papers: what papers call it.
        chance: what choosing at random gives; NaN for a unit without a value; `None` if there are no choices.
    """

    meaning: str
    after: Array
    before: Array | None = None
    unit: str = "edits"
    protocol: str = ""
    in_papers: str = ""
    chance: Array | None = None
