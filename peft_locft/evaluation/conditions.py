"""Conditions on metrics, such as `reliability<0.98`, on which a pipeline fails."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping, Sequence

COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def check_conditions(conditions: Sequence[str], names: Collection[str] | None = None) -> None:
    """Raise a ValueError if a condition is not NAME, a comparison and a number, or NAME is not among `names`."""
    for condition in conditions:
        name, _, _ = _parsed(condition)
        if names is not None and name not in names:
            raise _unknown(condition, names)


def met_conditions(conditions: Sequence[str], metrics: Mapping[str, float]) -> list[str]:
    """Return the conditions that hold, each with the value found.

    Args:
        conditions: such as `"reliability<0.98"` or `"perplexity>=30"`.
        metrics: values by name. `reliability` also finds `reliability_exact_match`.

    Raises:
        ValueError: if a condition has another form, or names no metric.

    Example:
        >>> met_conditions(["reliability<0.98"], {"reliability": 0.96})
        ['reliability<0.98: found 0.96']
    """
    met = []
    for condition in conditions:
        name, comparison, number = _parsed(condition)
        found = metrics.get(name, metrics.get(f"{name}_exact_match"))
        if found is None:
            raise _unknown(condition, metrics)
        if COMPARISONS[comparison](found, number):
            met.append(f"{condition}: found {found:.4g}")
    return met


def _unknown(condition: str, names: Collection[str]) -> ValueError:
    return ValueError(f"--fail_if {condition!r}: no metric of that name. Expected one of {', '.join(names)}.")


def _parsed(condition: str) -> tuple[str, str, float]:
    match = re.fullmatch(r"\s*(\w+)\s*(<=?|>=?)\s*(\S+)\s*", condition)
    try:
        return match[1], match[2], float(match[3])  # type: ignore[index]
    except (TypeError, ValueError):
        raise ValueError(
            f"--fail_if {condition!r}: expected NAME, one of {' '.join(COMPARISONS)}, and a number, such as "
            "'reliability<0.98'."
        ) from None
