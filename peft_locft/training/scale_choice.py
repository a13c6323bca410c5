"""How strong a trained delta should be: tries some scales, and sets the best for a stated trade-off."""

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
    """What the best scale is: the largest weighted sum of metrics, among those that keep some of them.

    Args:
        weights: a factor for each metric that counts, negative where less is better.
        at_least: a metric's smallest value that will do.
        at_most: a metric's largest value that will do.

    Raises:
        ValueError: if no metric counts, or a number is not finite.

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
                f"TradeOff.weights={dict(self.weights)}: expected a factor other than 0 for one metric at least."
            )
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("TradeOff: expected finite numbers.")

    @property
    def metrics(self) -> list[str]:
        return sorted({*self.weights, *(self.at_least or {}), *(self.at_most or {})})

    def score(self, metrics: Mapping[str, float]) -> float:
        return sum(factor * metrics[name] for name, factor in self.weights.items())

    def shortfall(self, metrics: Mapping[str, float]) -> float:
        """Return by how much the limits are missed, each as a share of itself; 0 where all are kept."""
        missed = [(limit - metrics[name], limit) for name, limit in (self.at_least or {}).items()]
        missed += [(metrics[name] - limit, limit) for name, limit in (self.at_most or {}).items()]
        return sum(max(0.0, by) / (abs(limit) or 1.0) for by, limit in missed)


@dataclass(frozen=True)
class ScaleTrial:
    """One scale, and what was measured at it."""

    scale: float
    metrics: dict[str, float]
    score: float
    shortfall: float


@dataclass(frozen=True)
class ScaleChoice:
    """What [`choose_scale`] returns.

    Attributes:
        scale: the one that was set.
        tried: all of them, in the order of their scale.
    """

    scale: float
    tried: list[ScaleTrial]

    def __str__(self) -> str:
        """Return a table in Markdown, the chosen scale in bold."""
        names = list(self.tried[0].metrics)
        lines = [["scale", *names, "score", "kept"], ["---"] * (len(names) + 3)]
        for each in self.tried:
            scale = f"**{each.scale:g}**" if each.scale == self.scale else f"{each.scale:g}"
            values = [f"{each.metrics[name]:.4g}" for name in names]
            lines.append([scale, *values, f"{each.score:.4g}", "no" if each.shortfall else "yes"])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, for a provenance record."""
        return {"scale": self.scale, "tried": [vars(each) for each in self.tried]}


def choose_scale(
    model: PeftModel,
    evaluate: Callable[[PeftModel], Mapping[str, float]],
    trade_off: TradeOff,
    scales: Sequence[float] = SCALES,
    *,
    adapter_name: str | None = None,
    progress: bool = True,
) -> ScaleChoice:
    """Set the strength of a trained delta, `W0 + scale * delta`, to the best of some for a trade-off.

    Interpolation between base and edited model in one layer, after Brown et al., "Edit at your own risk" (arXiv
    2303.00046). The scale is set at all locations and in the adapter's configuration, so that it is saved with it, and
    every reader of the adapter, a merge on the disk too, applies it.

    Args:
        model: with a LocFT adapter, not merged.
        evaluate: measures the model on a validation sample, which is not what is reported in the end.
        trade_off: what is best.
        scales: to try; 1 is the delta as trained, 0 the base.
        adapter_name: which adapter; `None`: the active one.
        progress: show a progress bar.

    Returns:
        What was tried and chosen. Of equal scales the one nearest to 0 is taken, which changes the model least. If
        none keeps all limits, a warning says so, and the one that misses them least is taken.

    Raises:
        ValueError: if the model has no such LocFT adapter, or it is merged; if there is no scale to try; if `evaluate`
            does not give a metric of the trade-off, or one that is NaN. The scale is then what it was.

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
    tried = []
    try:
        for scale in tqdm(sorted(set(scales)), desc="trying scales", leave=False, disable=not progress):
            model.base_model.set_scale(name, float(scale))
            tried.append(_tried(float(scale), evaluate(model), trade_off))
    except BaseException:
        model.base_model.set_scale(name, before)
        raise
    best = min(tried, key=lambda each: (each.shortfall, -each.score, abs(each.scale)))
    if best.shortfall:
        warnings.warn(
            f"No scale keeps the limits {dict(trade_off.at_least or {})} {dict(trade_off.at_most or {})}: "
            f"{best.scale:g}, which misses them least, is taken.",
            stacklevel=2,
        )
    model.base_model.set_scale(name, best.scale)
    return ScaleChoice(best.scale, tried)


def _adapter(model: PeftModel, adapter_name: str | None) -> str:
    configs = getattr(model, "peft_config", {})
    name = adapter_name or getattr(model, "active_adapter", None)
    if not isinstance(name, str) or name not in configs or configs[name].peft_type != "LOCFT":
        raise ValueError(
            f"choose_scale needs a PeftModel with a LocFT adapter; found {type(model).__name__} and the adapter "
            f"{name!r}. Expected one of {sorted(n for n, config in configs.items() if config.peft_type == 'LOCFT')}."
        )
    return name


def _tried(scale: float, measured: Mapping[str, float], trade_off: TradeOff) -> ScaleTrial:
    missing = [name for name in trade_off.metrics if math.isnan(measured.get(name, math.nan))]
    if missing:
        raise ValueError(
            f"evaluate gives no {', '.join(missing)}, which the trade-off is about; found {', '.join(measured)}."
        )
    metrics = {name: float(value) for name, value in measured.items()}
    return ScaleTrial(scale, metrics, trade_off.score(metrics), trade_off.shortfall(metrics))
