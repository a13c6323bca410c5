"""The trials of a location search: the first free process runs each trial once and writes the result atomically."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.edits import Edit
from ..data.texts import TextSource
from ..engine.activation_storage import SharedActivations
from ..engine.memory import free_memory
from ..engine.model_state import TrainingDivergedError
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import EditEvaluator
from ..io.arithmetic import tensor_sha256
from ..io.files import write_atomically
from ..io.folders import locked
from ..locating.module_kinds import band_of, config_of
from ..locating.plan import Candidate, Rung, edits_of, neighbours, num_trained, survivors
from ..locating.results import LocationTrial, finite_estimates, read_trial
from ..locating.score import LocationScore
from ..training.config import BreadthFirstConfig
from ..tuner.presets import find_decoder_layers
from ..tuner.writing_tokens import TokenChoiceError
from .trials import known_result, try_adapter

logger = logging.getLogger(__name__)

SETTING, TRIALS = "search.json", "trials"
# settings of a search.json that was written before they could be chosen
EARLIER_SETTING = {"widths": [1], "gradient_tokens": None}
POLL_SECONDS = 1.0  # interval of checks for the results of other processes


@dataclass
class LocationTrials:
    """Trains and evaluates locations. `search_locations` has checked the arguments.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        edits: the sample; see `edits_of`.
        args: the recipe.
        ladder: the rungs.
        score: ranks the trials.
        evaluation: evaluation settings of the last rung.
        text: text for perplexity and KL.
        learning_rates: learning rates by module, instead of the recipe's.
        shared_activations: activations of the base for all trials; `None`: every trial runs the frozen layers.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    edits: Sequence[Edit]
    args: BreadthFirstConfig
    ladder: Sequence[Rung]
    score: LocationScore
    evaluation: EvaluationConfig
    text: TextSource | None
    learning_rates: Mapping[str, float]
    shared_activations: SharedActivations | None = None
    _folder: Path = Path()
    _evaluators: dict[int, EditEvaluator] = field(default_factory=dict)

    @property
    def text_sha256(self) -> str | None:
        """The hash of the tokens of the text that the last rung uses."""
        windows = self._evaluator(len(self.ladder) - 1).windows
        return None if windows is None else tensor_sha256(windows)

    def begin(self, folder: Path, setting: dict[str, Any]) -> None:
        """Start a search in a folder, or continue the one in it.

        Raises:
            ValueError: if the folder holds a search with other settings.
        """
        self._folder = folder / TRIALS
        self._folder.mkdir(parents=True, exist_ok=True)
        path = folder / SETTING
        if path.is_file():
            before = EARLIER_SETTING | json.loads(path.read_text(encoding="utf-8"))
            now = json.loads(json.dumps(setting))
            differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            if differing:
                first = differing[0]
                raise ValueError(
                    f"{folder}: holds a search with other settings ({', '.join(differing)}): found {first}="
                    f"{before.get(first)!r}, expected {now.get(first)!r}. Use another output_dir, or the arguments "
                    "of that search."
                )
        write_atomically(path, json.dumps(setting, indent=1) + "\n")

    def search(
        self,
        first: Sequence[Candidate],
        layers: Sequence[int],
        stride: int,
        keep: int,
        progress: bool,
    ) -> list[LocationTrial]:
        """Try locations rung by rung; return all trials.

        Args:
            first: the candidates to begin with, see `first_candidates`.
            layers: the layers of all candidates; of a band, the first layer.
            stride: distance in `layers` between the first candidates.
            keep: one in `keep` candidates goes on to the next rung.
            progress: show a progress bar.

        Raises:
            ValueError: if training fails at every location.
        """
        num_layers = len(find_decoder_layers(self.model)[1])
        with tqdm(
            total=num_trained(self.ladder, len(first), keep), desc="locating", unit="edit", disable=not progress
        ) as bar:
            rung_trials = self._rung(0, first, bar)
            while stride > 1:
                stride = (stride + 1) // 2 if stride > 2 else 1
                best = survivors(mean_scores(rung_trials.values(), rung_trials), keep)
                closer = neighbours(best, layers, stride, num_layers)
                new = [candidate for candidate in closer if candidate not in rung_trials]
                bar.total += len(new) * self.ladder[0].num_edits
                rung_trials |= self._rung(0, new, bar)
            _check_any_succeeded(rung_trials.values())
            trials = list(rung_trials.values())
            for rung in range(1, len(self.ladder)):
                rung_trials = self._rung(rung, survivors(mean_scores(trials, rung_trials), keep), bar)
                trials += rung_trials.values()
        return trials

    def _rung(self, rung: int, candidates: Sequence[Candidate], bar: tqdm[Any]) -> dict[Candidate, LocationTrial]:
        """Return the trials of a rung; run the missing ones, unless other processes run them."""
        # the last layer first: its trunk computes and stores the inputs of all other layers
        waiting = sorted(candidates, key=lambda candidate: -candidate.layer)
        trials: dict[Candidate, LocationTrial] = {}
        while waiting:
            before = len(waiting)
            for candidate in list(waiting):
                trial = self._trial(rung, candidate, bar)
                if trial is not None:
                    trials[candidate] = trial
                    waiting.remove(candidate)
                    best = max(trials.values(), key=lambda trial: trial.score)
                    bar.set_postfix_str(f"rung {rung + 1} of {len(self.ladder)}, best: {best.candidate}")
            if len(waiting) == before:
                time.sleep(POLL_SECONDS)
        return {candidate: trials[candidate] for candidate in candidates}

    def _trial(self, rung: int, candidate: Candidate, bar: tqdm[Any]) -> LocationTrial | None:
        """Return a trial; `None` while another process runs it."""
        path = self._folder / f"{rung}-{candidate.file_name}.json"
        # width and tokens are in the file's name; trials of earlier searches do not hold them
        cell = {"module": candidate.module, "layer": candidate.layer, "rung": rung}
        cell["num_edits"] = self.ladder[rung].num_edits
        row = known_result(path, cell)
        if row is None:
            place = path.with_suffix("")
            place.mkdir(exist_ok=True)
            with locked(place) as is_ours:
                if not is_ours:
                    return None
                row = known_result(path, cell)  # another process may have finished it before this one got the lock
                if row is None:
                    trial = self._measure(rung, candidate, place)
                    write_atomically(path, json.dumps(asdict(trial), indent=1) + "\n")
                    bar.update(self.ladder[rung].num_edits)
                    shutil.rmtree(place, ignore_errors=True)
                    return trial
        # it took no time here, so do not count it in the remaining time
        bar.total -= self.ladder[rung].num_edits
        return read_trial(row)

    def _measure(self, rung: int, candidate: Candidate, place: Path) -> LocationTrial:
        location = band_of(self.model, candidate.module, candidate.layer, candidate.num_layers)
        step = self.ladder[rung]
        edits = self._edits(rung)
        rate = self.learning_rates.get(candidate.module) or self.args.learning_rate
        overrides: dict[str, Any] = {"output_dir": str(place), "per_device_train_batch_size": step.batch_size}
        overrides |= {"learning_rate": rate, "report_to": "none", "disable_tqdm": True}
        overrides |= dict.fromkeys(("save_strategy", "logging_strategy"), "no")
        if candidate.gradient_tokens is not None:
            overrides["gradient_tokens"] = candidate.gradient_tokens
        args = replace(self.args, **overrides)
        known = {
            **asdict(candidate),
            "rung": rung,
            "num_edits": len(edits),
            "learning_rate": rate,
            "target_modules": location.target_modules,
            "target_parameters": location.target_parameters,
        }
        begun = time.perf_counter()
        try:
            config, evaluator = config_of(location), self._evaluator(rung)
            trial = try_adapter(self.model, self.tokenizer, edits, config, args, evaluator, self.shared_activations)
        except (TrainingDivergedError, FloatingPointError, TokenChoiceError) as error:
            logger.warning("%s: %s", candidate, error)
            nothing: dict[str, Any] = {"score": 0.0, "metrics": {}, "before": {}, "epochs": 0, "evaluation_seconds": 0}
            return LocationTrial(**known, **nothing, failed=str(error), training_seconds=time.perf_counter() - begun)
        return LocationTrial(
            **known,
            score=self.score.of(trial.report),
            metrics=finite_estimates(trial.report.results, "after"),
            before=finite_estimates(trial.report.results, "before"),
            failed=None,
            epochs=len(trial.epoch_losses),
            training_seconds=trial.training_seconds,
            evaluation_seconds=trial.evaluation_seconds,
        )

    def _edits(self, rung: int) -> Sequence[Edit]:
        return self.edits[edits_of(self.ladder, rung, len(self.edits))]

    def _evaluator(self, rung: int) -> EditEvaluator:
        """Return the evaluator of a rung, shared by its trials: the base answers only once."""
        if rung not in self._evaluators:
            config, needed = self.evaluation, self.score.protocols
            if rung < len(self.ladder) - 1:
                share = self.ladder[rung].num_edits / self.ladder[-1].num_edits
                tokens = max(config.text_window, round(share * config.max_text_tokens))
                config = replace(config, protocols=needed, max_text_tokens=tokens)
            else:
                config = replace(config, protocols=list(dict.fromkeys([*needed, *config.protocols])))
            evaluator = EditEvaluator(
                self.model, self.tokenizer, self._edits(rung), config, text=self.text, progress=False
            )
            if evaluator.windows is not None and self._fits(evaluator.windows.numel()):
                evaluator.base_logits = []
            self._evaluators[rung] = evaluator
        return self._evaluators[rung]

    def _fits(self, num_tokens: int) -> bool:
        """Return whether the logits of that many tokens take less than a quarter of the free memory."""
        head = self.model.get_output_embeddings().weight
        return num_tokens * head.shape[0] * head.itemsize < free_memory(head.device) / 4


def _check_any_succeeded(trials: Collection[LocationTrial]) -> None:
    if not all(trial.failed for trial in trials):
        return
    reasons = "; ".join(sorted({str(trial.failed) for trial in trials})[:2])
    if all(trial.diverged for trial in trials):
        raise ValueError(f"Training diverged at every location ({reasons}). Lower the learning rate.")
    raise ValueError(
        f"Training failed at every location ({reasons}). Also try gradient_tokens 'all', and a lower learning rate "
        "where training diverged."
    )


def mean_scores(trials: Collection[LocationTrial], candidates: Iterable[Candidate]) -> dict[Candidate, float]:
    """Return the mean score of each candidate over its trials, weighted by their edits; 0 if a trial failed."""
    scores = {}
    for candidate in candidates:
        own = [trial for trial in trials if trial.candidate == candidate]
        mean = sum(trial.score * trial.num_edits for trial in own) / sum(trial.num_edits for trial in own)
        scores[candidate] = 0.0 if any(trial.failed for trial in own) else mean
    return scores
