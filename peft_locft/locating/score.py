"""The score that ranks locations: one number from the metrics of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from ..evaluation.metrics import EDIT_SCORE, METRICS, Protocol, metric_names
from ..evaluation.report import EvaluationReport

PERPLEXITY, KL = "perplexity", "kl_from_base"
MIN_SHARE = 0.01
DEFAULT = ("reliability_token_accuracy", "generalization_token_accuracy", "locality_tokens_unchanged")


@dataclass(frozen=True)
class LocationScore:
    """The weighted harmonic mean of some metrics: high only if none of them is low.

    Shares count as they are, perplexity as min(1, before / after), KL as exp(-KL). Each counts as at least 0.01, so
    that one 0 does not hide the other metrics.

    Args:
        weights: weight of each metric, by name.

    Raises:
        ValueError: if there is no weight, a weight is not a positive number, or a metric is unknown.

    Example:
        >>> LocationScore({"reliability_token_accuracy": 1, "locality_tokens_unchanged": 2})
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        known = [*metric_names(get_args(Protocol)), EDIT_SCORE, PERPLEXITY, KL]
        unknown = sorted(set(self.weights) - set(known))
        if unknown or not self.weights:
            raise ValueError(
                f"score: found {', '.join(unknown) or 'no metric'}; expected one or more of {', '.join(known)}."
            )
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"score: found {name}={weight}; expected a weight above 0.")

    @classmethod
    def default(cls, kinds: Sequence[str], has_text: bool) -> LocationScore:
        """Return the default score: reliability, generalization, locality by tokens and, with a text, KL.

        By tokens, since even few edits have many of them. Under the published recipe, whole answers to locality probes
        change so often that a small sample has a share of 0 nearly everywhere.

        Args:
            kinds: the kinds that the edits can measure: "reliability", "generalization", "locality".
            has_text: there is a text for KL.
        """
        names = [name for name in DEFAULT if name.partition("_")[0] in kinds]
        return cls(dict.fromkeys([*names, *([KL] if has_text else [])], 1.0))

    @property
    def protocols(self) -> list[str]:
        """The protocols that its metrics need; `"token_accuracy"`, the cheapest, if they need none."""
        names = metric_names(get_args(Protocol))
        needed = {names[name][2].protocol for name in self.weights if name in names}
        if EDIT_SCORE in self.weights:
            needed.add(METRICS["more_probable"].protocol)
        return [name for name in get_args(Protocol) if name in needed] or ["token_accuracy"]

    @property
    def needs_text(self) -> bool:
        return bool({PERPLEXITY, KL} & set(self.weights))

    def of(self, report: EvaluationReport) -> float:
        """Return the score, from 0 to 1, over those of its metrics that the report has.

        Raises:
            ValueError: if the report has none of them.
        """
        shares = {name: _share(name, report) for name in self.weights if name in report.results}
        if not shares:
            raise ValueError(f"score: none of {', '.join(self.weights)} could be measured: {report.missing}")
        weight = sum(self.weights[name] for name in shares)
        return weight / sum(self.weights[name] / max(share, MIN_SHARE) for name, share in shares.items())

    def __str__(self) -> str:
        parts = [name if weight == 1 else f"{weight:g} x {name}" for name, weight in self.weights.items()]
        return f"harmonic mean of {', '.join(parts)}"


def _share(name: str, report: EvaluationReport) -> float:
    result = report[name]
    if name == KL:
        return math.exp(-max(0.0, result.after.value))
    if name == PERPLEXITY:
        assert result.before is not None  # a search always has a base
        return min(1.0, result.before.value / result.after.value)
    return result.after.value
