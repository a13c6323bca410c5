"""Chooses the scale of a trained delta for a stated trade-off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm

SCALES = tuple(round(0.1 * tenth, 1) for tenth in range(11))


@dataclass(frozen=True)
class TradeOff:
    """What makes a scale the best: the largest weighted sum of metrics within some limits.

    Args:
        weights: a factor for each metric in the sum, negative where lower is better.
        at_least: lower limits of metrics.
        at_most: upper limits of metrics.

    Raises:
        ValueError: if all factors are 0, or a number is not finite.

    Example:
        >>> TradeOff(weights={"perplexity": -1.0}, at_least={"reliability_exact_match": 0.99})
    """

    weights: Mapping[str, float]
    at_least: Mapping[str, float] | None = None
    at_most: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        numbers = [*self.weights.values(), *(self.at_least or {}).values(), *(self.at_most or {}).values()]
        if not any(self.weights.values()):
            raise ValueError(
                f"TradeOff.weights={dict(self.weights)}: expected a factor other than 0 for at least one metric."
            )
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("TradeOff: expected finite numbers.")

    @property
    def metrics(self) -> list[str]:
        return sorted({*self.weights, *(self.at_least or {}), *(self.at_most or {})})

    def score(self, metrics: Mapping[str, float]) -> float:
        return sum(factor * metrics[name] for name, factor in self.weights.items())

    def shortfall(self, metrics: Mapping[str, float]) -> float:
        """Return the sum of violations of the limits, each as a share of its limit; 0 if there is none."""
        missed = [(limit - metrics[name], limit) for name, limit in (self.at_least or {}).items()]
        missed += [(metrics[name] - limit, limit) for name, limit in (self.at_most or {}).items()]
        return sum(max(0.0, by) / (abs(limit) or 1.0) for by, limit in missed)


@dataclass(frozen=True)
class ScaleTrial:
    """One scale, and the metrics measured at it."""

    scale: float
    metrics: dict[str, float]
    score: float
    shortfall: float


@dataclass(frozen=True)
class ScaleChoice:
    """What [`choose_scale`] returns.

    Attributes:
        scale: the chosen scale, which was set.
        trials: all scales, in rising order.
    """

    scale: float
    trials: list[ScaleTrial]

    def __str__(self) -> str:
        """Return a table in Markdown, the chosen scale in bold."""
        names = list(self.trials[0].metrics)
        lines = [["scale", *names, "score", "within limits"], ["---"] * (len(names) + 3)]
        for each in self.trials:
            scale = f"**{each.scale:g}**" if each.scale == self.scale else f"{each.scale:g}"
            values = [f"{each.metrics[name]:.4g}" for name in names]
            lines.append([scale, *values, f"{each.score:.4g}", "no" if each.shortfall else "yes"])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a provenance record."""
        return {"scale": self.scale, "trials": [vars(each) for each in self.trials]}


def choose_scale(
    model: PeftModel,
    evaluate: Callable[[PeftModel], Mapping[str, float]],
    trade_off: TradeOff,
    scales: Sequence[float] = SCALES,
    *,
    adapter_name: str | None = None,
    progress: bool = True,
) -> ScaleChoice:
    """Set the scale of a trained delta, `W0 + scale * delta`, to the best of several for a trade-off.

    Interpolates between base and edited model, after Brown et al., "Edit at your own risk" (arXiv 2303.00046). The
    scale is set at all locations and in the adapter's configuration: it is saved, loaded and merged with the adapter.

    Args:
        model: with a LocFT adapter, not merged.
        evaluate: measures the model on a validation sample; report results on other edits.
        trade_off: what makes a scale the best.
        scales: the scales to try; 1 is the delta as trained, 0 the base.
        adapter_name: which adapter; `None`: the active one.
        progress: show a progress bar.

    Returns:
        All trials and the chosen scale. Of equally good scales it is the one nearest to 0. If no scale is within the
        limits, a warning says so, and the scale with the smallest violation is chosen.

    Raises:
        ValueError: if the model has no such LocFT adapter or it is merged, `scales` is empty, or a metric of the
            trade-off is missing or NaN. The scale is then not changed.

    Example:
        >>> evaluator = EditEvaluator(model, tokenizer, validation_edits, text="validation.txt")
        >>> def evaluate(model):
        ...     return {name: result.after.value for name, result in evaluator.evaluate(model).results.items()}
        >>> trade_off = TradeOff({"perplexity": -1.0}, at_least={"reliability_exact_match": 0.95})
        >>> print(choose_scale(model, evaluate, trade_off))
    """
    name = _adapter(model, adapter_name)
    if not scales:
        raise ValueError("scales: found none to try; expected numbers such as 0.5 and 1.0.")
    before = model.peft_config[name].scale
    trials = []
    try:
        for scale in tqdm(sorted(set(scales)), desc="trying scales", leave=False, disable=not progress):
            model.base_model.set_scale(name, float(scale))
            trials.append(_trial(float(scale), evaluate(model), trade_off))
    except BaseException:
        model.base_model.set_scale(name, before)
        raise
    best = min(trials, key=lambda each: (each.shortfall, -each.score, abs(each.scale)))
    if best.shortfall:
        warnings.warn(
            f"No scale is within the limits {dict(trade_off.at_least or {})} {dict(trade_off.at_most or {})}; using "
            f"{best.scale:g}, which violates them least.",
            stacklevel=2,
        )
    model.base_model.set_scale(name, best.scale)
    return ScaleChoice(best.scale, trials)


def _adapter(model: PeftModel, adapter_name: str | None) -> str:
    configs = getattr(model, "peft_config", {})
    name = adapter_name or getattr(model, "active_adapter", None)
    if not isinstance(name, str) or name not in configs or configs[name].peft_type != "LOCFT":
        raise ValueError(
            f"choose_scale needs a PeftModel with a LocFT adapter; found {type(model).__name__} and the adapter "
            f"{name!r}. Expected one of {sorted(n for n, config in configs.items() if config.peft_type == 'LOCFT')}."
        )
    return name


def _trial(scale: float, measured: Mapping[str, float], trade_off: TradeOff) -> ScaleTrial:
    missing = [name for name in trade_off.metrics if math.isnan(measured.get(name, math.nan))]
    if missing:
        raise ValueError(
            f"evaluate returned no {', '.join(missing)}, which the trade-off needs; found {', '.join(measured)}."
        )
    metrics = {name: float(value) for name, value in measured.items()}
    return ScaleTrial(scale, metrics, trade_off.score(metrics), trade_off.shortfall(metrics))
