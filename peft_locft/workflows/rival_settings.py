"""Settings of closed-form methods, chosen by one rule on other edits than those that are reported.

The rule: start from the published settings; take the options in the order of `OPTIONS` and try each value that is
listed there; keep a value if the score on the tuning edits is higher. The score is that of a location search, the
harmonic mean of reliability, generalization (both by token accuracy) and locality (tokens unchanged).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..training.closed_form import ClosedForm, ClosedFormSettings
from ..tuner import LocFTConfig
from ..tuner.presets import down_projections, find_decoder_layers

# published: MEMIT for GPT-J, AlphaEdit and UltraEdit for Llama 3 8B, whose layers have 14,336 inputs
PUBLISHED: dict[ClosedForm, ClosedFormSettings] = {
    "MEMIT": ClosedFormSettings(damping=15_000.0),
    "AlphaEdit": ClosedFormSettings(damping=10.0, energy_share=0.9),
    "UltraEdit": ClosedFormSettings(damping=1.0, rate=1e-6),
}
# in this order; an option may come again, since others have changed
OPTIONS: dict[ClosedForm, tuple[tuple[str, tuple[Any, ...]], ...]] = {
    "MEMIT": (
        ("damping", (1500.0, 150.0, 15.0)),
        ("layers", ("early",)),
        ("clamp", (4.0,)),
        ("damping", (1500.0, 150.0, 15.0)),
    ),
    "AlphaEdit": (
        ("damping", (1.0, 0.1)),
        ("layers", ("early",)),
        ("clamp", (4.0,)),
        ("energy_share", (0.5, 0.99)),
        ("damping", (10.0, 1.0, 0.1)),
    ),
    "UltraEdit": (
        ("rate", (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
        ("layers", ("early",)),
        ("damping", (10.0, 100.0)),
        ("rate", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    ),
}
NUM_EARLY = 5  # layers, as the authors edit in Llama 3 8B (4 to 8 of 32)


@dataclass(frozen=True)
class RivalSettings:
    """Where and how a closed-form method edits.

    Args:
        layers: `"given"`: the location of the comparison; `"early"`: the down-projections of five layers that end at a
            quarter of the depth, as the authors of MEMIT and AlphaEdit edit.
        method: what the method leaves open.
    """

    layers: str
    method: ClosedFormSettings

    def with_option(self, name: str, value: Any) -> RivalSettings:
        """Return settings with another value of one option."""
        if name == "layers":
            return replace(self, layers=value)
        if name == "clamp":
            return replace(self, method=replace(self.method, search=replace(self.method.search, clamp=value)))
        return replace(self, method=replace(self.method, **{name: value}))

    def value_of(self, name: str) -> Any:
        if name == "layers":
            return self.layers
        return self.method.search.clamp if name == "clamp" else getattr(self.method, name)

    def location(self, model: nn.Module, given: LocFTConfig) -> LocFTConfig:
        """Return a new configuration of the adapter."""
        if self.layers == "given":
            return copy.deepcopy(given)
        return LocFTConfig(target_modules=list(down_projections(model, early_layers(model)).target_modules))


def early_layers(model: nn.Module) -> list[int]:
    """Return the numbers of five layers that end at a quarter of the depth; fewer in a shallow model."""
    last = len(find_decoder_layers(model)[1]) // 4
    return list(range(max(0, last - NUM_EARLY + 1), last + 1))


def choose_settings(
    method: ClosedForm, score: Callable[[RivalSettings], float], options: Mapping[str, Any] | None = None
) -> tuple[RivalSettings, list[dict[str, Any]]]:
    """Return the settings that the rule of this module chooses, and every trial with its score.

    Args:
        method: the method.
        score: returns the score of settings on the tuning edits; higher is better.
        options: other options to try than those of `OPTIONS`.

    Example:
        >>> settings, trials = choose_settings("MEMIT", score)
    """
    best = RivalSettings("given", PUBLISHED[method])
    highest = score(best)
    tried = {best: highest}
    trials = [_trial(method, best, highest)]
    for name, values in OPTIONS[method] if options is None else options.items():
        for value in values:
            other = best.with_option(name, value)
            if other in tried:
                continue
            tried[other] = score(other)
            trials.append(_trial(method, other, tried[other]))
            if tried[other] > highest:
                best, highest = other, tried[other]
    return best, trials


def _trial(method: ClosedForm, settings: RivalSettings, score: float) -> dict[str, Any]:
    return described(method, settings) | {"score": score}


def described(method: ClosedForm, settings: RivalSettings) -> dict[str, Any]:
    """Return the options of a method with their values."""
    return {name: settings.value_of(name) for name in dict.fromkeys(name for name, _ in OPTIONS[method])}


def from_description(method: ClosedForm, values: Mapping[str, Any]) -> RivalSettings:
    """Return the settings of `described`."""
    settings = RivalSettings("given", PUBLISHED[method])
    for name in described(method, settings):
        settings = settings.with_option(name, values[name])
    return settings
