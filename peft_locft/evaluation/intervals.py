"""Confidence intervals: the bootstrap over edits, and an exact interval where all edits have the same value."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_COUNTS = 2**24  # in memory at a time


class Estimate(NamedTuple):
    """A value with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{format_number(self.value)} [{format_number(self.low)}, {format_number(self.high)}]"


def format_number(value: float) -> str:
    """Return a number with three decimals, or four significant digits if it is large."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


class Bootstrap:
    """Percentile intervals of column means, and of functions of them, by resampling the units (edits, windows).

    Args:
        table: (units, columns); NaN where a column has no value for a unit, which its mean ignores.
        num_resamples: number of resamples.
        confidence: of the intervals, such as 0.95.
        seed: the same seed gives the same intervals.

    Raises:
        ValueError: if `num_resamples` is below 1 or `confidence` is not between 0 and 1.
    """

    def __init__(self, table: Array, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> None:
        if num_resamples < 1 or not 0 < confidence < 1:
            raise ValueError(
                f"num_resamples={num_resamples}, confidence={confidence}: expected at least 1, and a number between 0 "
                "and 1."
            )
        self.table = table
        self.confidence = confidence
        has_value = ~np.isnan(table)
        filled = np.where(has_value, table, 0.0)
        random = np.random.default_rng(seed)
        num_units = len(table)
        means = []
        for begin in range(0, num_resamples, step := max(1, MAX_COUNTS // num_units)):
            size = min(step, num_resamples - begin)
            drawn = random.multinomial(num_units, np.full(num_units, 1 / num_units), size=size).astype(np.float64)
            with np.errstate(invalid="ignore"):  # 0 / 0: a resample without any value of a column
                means.append(drawn @ filled / (drawn @ has_value.astype(np.float64)))
        self.means: Array = np.concatenate(means)
        with np.errstate(invalid="ignore"):
            self.observed: Array = filled.sum(axis=0) / has_value.sum(axis=0)

    def mean(self, column: int) -> Estimate | None:
        """Estimate the mean of a column; `None` if it has no value."""
        return self.statistic(lambda means: means[..., column], column)

    def difference(self, column: int, other: int) -> Estimate | None:
        """Estimate the mean of a column minus that of another, paired by unit."""
        return self.statistic(lambda means: means[..., column] - means[..., other])

    def statistic(self, of_means: Callable[[Array], Array], share: int | None = None) -> Estimate | None:
        """Estimate any function of the column means.

        Args:
            of_means: (…, columns) to (…).
            share: index of the column, if the function is that column's mean and its values may be shares.
        """
        value = float(of_means(self.observed))
        if np.isnan(value):
            return None
        tail = (1 - self.confidence) / 2
        low, high = np.nanquantile(of_means(self.means), [tail, 1 - tail])
        if share is not None:
            low, high = self._exact(share, value, float(low), float(high))
        return Estimate(value, min(float(low), value), max(float(high), value))

    def _exact(self, column: int, value: float, low: float, high: float) -> tuple[float, float]:
        """Return the interval of Clopper and Pearson for a share of 0 or 1, where all resamples are equal."""
        values = self.table[:, column]
        count = int((~np.isnan(values)).sum())
        width = ((1 - self.confidence) / 2) ** (1 / count)
        is_constant = low == high == value and value in (0.0, 1.0)
        if not is_constant:
            return low, high
        return (width, 1.0) if value else (0.0, 1 - width)
