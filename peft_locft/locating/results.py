"""What a search for a location has found: its trials, their ranking, a table, a preset."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..evaluation.report import MetricResult
from ..evaluation.tables import estimate_cell, markdown_table
from ..io.files import write_atomically
from .plan import Candidate
from .preset import LocationPreset

IN_TABLE = (
    "reliability_exact_match",
    "reliability_token_accuracy",
    "generalization_exact_match",
    "generalization_token_accuracy",
    "locality_unchanged",
    "locality_tokens_unchanged",
    "perplexity",
    "kl_from_base",
)
FILES = ("locations.json", "locations.md", "best.json")


@dataclass(frozen=True)
class LocationTrial:
    """One location, trained and evaluated on some of the edits.

    Args:
        module: the kind of module.
        layer: counted from 0.
        rung: counted from 0; what reaches a later one is tried again, on more edits.
        num_edits: that were trained and asked.
        learning_rate: constant.
        score: from 0 to 1; 0 if it failed.
        figures: value, low and high by the metric's name, after the edit.
        before: the same of the base.
        failed: why there are no figures: the training diverged.
        epochs: that were trained.
        target_modules: full names.
        target_parameters: full names.
        training_seconds: how long it trained.
        evaluation_seconds: how long it was asked.
    """

    module: str
    layer: int
    rung: int
    num_edits: int
    learning_rate: float
    score: float
    figures: dict[str, dict[str, float]]
    before: dict[str, dict[str, float]]
    failed: str | None
    epochs: int
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    training_seconds: float
    evaluation_seconds: float

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.module, self.layer)


@dataclass(frozen=True)
class LocationSearchResult:
    """What [`search_locations`] returns.

    Attributes:
        trials: all of them, rung by rung; a location that went on is there once a rung.
        setting: what was searched, and how: edits, model, recipe, score, rungs.
        model: what a model must have for the preset to fit, see `LocationPreset`.

    Example:
        >>> found = search_locations(model, tokenizer, edits, args)
        >>> print(found.best.candidate)
        mlp, layer 5
    """

    trials: list[LocationTrial]
    setting: dict[str, Any]
    model: dict[str, Any]

    @property
    def ranking(self) -> list[LocationTrial]:
        """The last trial of each location, the best first: those that came further go before those cut off."""
        last: dict[Candidate, LocationTrial] = {}
        for trial in self.trials:
            last[trial.candidate] = trial
        return sorted(last.values(), key=lambda trial: (-trial.rung, -trial.score))

    @property
    def best(self) -> LocationTrial:
        return self.ranking[0]

    @property
    def preset(self) -> LocationPreset:
        """The best location as training reads it."""
        best = self.best
        found = {name: self.setting[name] for name in ("model", "edits", "score")}
        figures = {name: estimate["value"] for name, estimate in best.figures.items()}
        return LocationPreset(
            best.module,
            best.layer,
            best.target_modules,
            best.target_parameters,
            best.learning_rate,
            self.model,
            found | {"num_edits": best.num_edits, "score_value": best.score, "figures": figures},
        )

    @property
    def seconds(self) -> float:
        """What the trials took together."""
        return sum(trial.training_seconds + trial.evaluation_seconds for trial in self.trials)

    def __str__(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Return the ranking as a table, the base first, and what it is ranked by."""
        ranking = self.ranking
        names = [name for name in IN_TABLE if any(name in trial.figures for trial in ranking)]
        rows = [["base", self.best.num_edits, "", *(estimate_cell(self.best.before.get(name)) for name in names)]]
        for trial in ranking:
            score = "diverged" if trial.failed else f"{trial.score:.3f}"
            cells = (estimate_cell(trial.figures.get(name)) for name in names)
            rows.append([trial.candidate, trial.num_edits, score, *cells])
        table = markdown_table(["location", "edits", "score", *names], rows)
        weights = self.setting["score"].items()
        named = ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in weights)
        trials = f"{len(self.trials)} trials, {self.seconds:.0f} s"
        return f"{table}\n\nScore: weighted harmonic mean of {named}. {trials}."

    def first_rung(self) -> list[LocationTrial]:
        """The trials of the first rung, in which every location was tried in the same way: what can be compared."""
        return [trial for trial in self.trials if trial.rung == 0]

    def save(self, folder: Path) -> None:
        """Write `locations.json`, `locations.md` and `best.json`, each whole or not at all."""
        content = {"setting": self.setting, "trials": [asdict(trial) for trial in self.trials]}
        texts = (json.dumps(content, indent=1), self.to_markdown())
        for name, text in zip(FILES, texts, strict=False):
            write_atomically(folder / name, text + "\n")
        self.preset.save(folder / FILES[-1])


def plain_figures(results: dict[str, MetricResult], when: str) -> dict[str, dict[str, float]]:
    """Return estimates of results as plain data, those that are finite. `when`: `"after"` or `"before"`."""
    found = {name: getattr(result, when) for name, result in results.items()}
    finite = {name: each for name, each in found.items() if each is not None and all(map(math.isfinite, each))}
    return {name: estimate._asdict() for name, estimate in finite.items()}


def read_trial(row: dict[str, Any]) -> LocationTrial:
    """Return a trial from JSON."""
    names = ("target_modules", "target_parameters")
    return LocationTrial(**(row | {name: tuple(row[name]) for name in names}))
