"""The results of a location search: trials, their ranking, a table, a preset."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..evaluation.metric_result import MetricResult
from ..evaluation.tables import estimate_cell, markdown_table
from ..io.files import write_atomically
from ..tuner.writing_tokens import CANNOT_CHOOSE
from .plan import Candidate
from .preset import LocationPreset

TABLE_METRICS = (
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
        layer: index of the decoder layer, from 0; of a band, the first one.
        rung: index of the rung, from 0; a location that goes on is tried again on more edits.
        num_edits: edits that were trained and evaluated.
        learning_rate: of the trial; `"auto"`: relative to the weights.
        score: from 0 to 1; 0 if the trial failed.
        metrics: value, low and high after the edit, by the metric's name.
        before: the same for the base.
        failed: why the trial failed: training diverged, or its tokens cannot be chosen in this module; `None` if it
            did not.
        epochs: epochs that were trained.
        target_modules: full names of modules.
        target_parameters: full names of parameters that are not a module's weight.
        training_seconds: duration of training.
        evaluation_seconds: duration of evaluation.
        num_layers: number of neighbouring layers that were trained together.
        gradient_tokens: the tokens that wrote into the delta; `None`: as the recipe says.
    """

    module: str
    layer: int
    rung: int
    num_edits: int
    learning_rate: float | str
    score: float
    metrics: dict[str, dict[str, float]]
    before: dict[str, dict[str, float]]
    failed: str | None
    epochs: int
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    training_seconds: float
    evaluation_seconds: float
    num_layers: int = 1
    gradient_tokens: str | None = None

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.module, self.layer, self.num_layers, self.gradient_tokens)

    @property
    def diverged(self) -> bool:
        """Whether the trial failed because training diverged."""
        return self.failed is not None and not self.failed.startswith(CANNOT_CHOOSE)


@dataclass(frozen=True)
class LocationSearchResult:
    """What [`search_locations`] returns.

    Attributes:
        trials: all trials, rung by rung.
        setting: what was searched, and how: edits, model, recipe, score, rungs.
        model: what a model's configuration must have for the preset, see `LocationPreset`.

    Example:
        >>> search = search_locations(model, tokenizer, edits, args)
        >>> print(search.best.candidate)
        mlp, layer 5
    """

    trials: list[LocationTrial]
    setting: dict[str, Any]
    model: dict[str, Any]

    @property
    def ranking(self) -> list[LocationTrial]:
        """The last trial of each location, the best first; a later rung ranks above an earlier one."""
        last: dict[Candidate, LocationTrial] = {}
        for trial in self.trials:
            last[trial.candidate] = trial
        return sorted(last.values(), key=lambda trial: (-trial.rung, -trial.score))

    @property
    def best(self) -> LocationTrial:
        return self.ranking[0]

    @property
    def preset(self) -> LocationPreset:
        """The best location, in the form that training reads."""
        best = self.best
        found = {name: self.setting[name] for name in ("model", "edits", "score")}
        metrics = {name: estimate["value"] for name, estimate in best.metrics.items()}
        return LocationPreset(
            best.module,
            best.layer,
            best.target_modules,
            best.target_parameters,
            best.learning_rate,
            self.model,
            found | {"num_edits": best.num_edits, "score_value": best.score, "metrics": metrics},
            best.num_layers,
            best.gradient_tokens,
        )

    @property
    def seconds(self) -> float:
        """Duration of all trials together."""
        return sum(trial.training_seconds + trial.evaluation_seconds for trial in self.trials)

    def __str__(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Return the ranking as a Markdown table, the base first, and the score."""
        ranking = self.ranking
        names = [name for name in TABLE_METRICS if any(name in trial.metrics for trial in ranking)]
        rows = [["base", self.best.num_edits, "", *(estimate_cell(self.best.before.get(name)) for name in names)]]
        for trial in ranking:
            score = f"{trial.score:.3f}" if trial.failed is None else "diverged" if trial.diverged else "failed"
            cells = (estimate_cell(trial.metrics.get(name)) for name in names)
            rows.append([trial.candidate, trial.num_edits, score, *cells])
        table = markdown_table(["location", "edits", "score", *names], rows)
        weights = self.setting["score"].items()
        named = ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in weights)
        trials = f"{len(self.trials)} trials, {self.seconds:.0f} s"
        return f"{table}\n\nScore: weighted harmonic mean of {named}. {trials}."

    def first_rung(self) -> list[LocationTrial]:
        """Return the trials of the first rung, which can be compared: every location was tried in the same way."""
        return [trial for trial in self.trials if trial.rung == 0]

    def save(self, folder: Path) -> None:
        """Write `locations.json`, `locations.md` and `best.json`, each atomically."""
        content = {"setting": self.setting, "trials": [asdict(trial) for trial in self.trials]}
        texts = (json.dumps(content, indent=1), self.to_markdown())
        for name, text in zip(FILES, texts, strict=False):
            write_atomically(folder / name, text + "\n")
        self.preset.save(folder / FILES[-1])


def finite_estimates(results: dict[str, MetricResult], when: str) -> dict[str, dict[str, float]]:
    """Return the finite estimates as plain data, by name. `when`: `"after"` or `"before"`."""
    estimates = {name: getattr(result, when) for name, result in results.items()}
    return {
        name: estimate._asdict()
        for name, estimate in estimates.items()
        if estimate is not None and all(map(math.isfinite, estimate))
    }


def read_trial(row: dict[str, Any]) -> LocationTrial:
    """Return the trial that was read from JSON."""
    names = ("target_modules", "target_parameters")
    return LocationTrial(**(row | {name: tuple(row[name]) for name in names}))
