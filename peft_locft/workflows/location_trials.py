"""The trials of a search for a location: each once, by whichever process comes first, and never half-written."""

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
from ..engine.memory import free_memory
from ..engine.model_state import TrainingDivergedError
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import EditEvaluator
from ..io.files import write_atomically
from ..io.folders import locked
from ..locating.module_kinds import config_of, location_of
from ..locating.plan import Candidate, Rung, edits_of, neighbours, num_trained, survivors
from ..locating.results import LocationTrial, plain_figures, read_trial
from ..locating.score import LocationScore
from ..training.config import BreadthFirstConfig
from ..tuner.arithmetic import tensor_sha256
from .trials import known_result, try_adapter

logger = logging.getLogger(__name__)

SETTING, TRIALS = "search.json", "trials"
PATIENCE = 1.0  # seconds between looks at what other processes have done


@dataclass
class LocationTrials:
    """Trains and evaluates locations; arguments as `search_locations`, checked by it.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        edits: the sample; see `edits_of`.
        args: the recipe.
        ladder: the rungs.
        score: of a trial.
        evaluation: of the last rung.
        text: for perplexity and KL.
        learning_rates: by module, where it is not the recipe's.
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
    _folder: Path = Path()
    _evaluators: dict[int, EditEvaluator] = field(default_factory=dict)

    @property
    def text_sha256(self) -> str | None:
        """The hash of the text's tokens, as far as the last rung reads it."""
        windows = self._evaluator(len(self.ladder) - 1).windows
        return None if windows is None else tensor_sha256(windows)

    def begin(self, folder: Path, setting: dict[str, Any]) -> None:
        """Make the folder a search's, or go on with the one in it.

        Raises:
            ValueError: if that is a search of another setting.
        """
        self._folder = folder / TRIALS
        self._folder.mkdir(parents=True, exist_ok=True)
        path = folder / SETTING
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            now = json.loads(json.dumps(setting))
            differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            if differing:
                first = differing[0]
                raise ValueError(
                    f"{folder}: it holds a search with other {', '.join(differing)}: found {first}="
                    f"{before.get(first)!r}, and this one has {now.get(first)!r}. Give another output_dir, or the "
                    "same arguments as before."
                )
        write_atomically(path, json.dumps(setting, indent=1) + "\n")

    def search(
        self,
        modules: Sequence[str],
        layers: Sequence[int],
        coarse: Sequence[int],
        stride: int,
        keep: int,
        progress: bool,
    ) -> list[LocationTrial]:
        """Try locations rung by rung, and return all trials.

        Raises:
            ValueError: if training diverges at every location.
        """
        begin = [Candidate(module, layer) for module in modules for layer in coarse]
        with tqdm(
            total=num_trained(self.ladder, len(begin), keep), desc="locating", unit="edit", disable=not progress
        ) as bar:
            found = self._try(0, begin, bar)
            while stride > 1:
                stride = (stride + 1) // 2 if stride > 2 else 1
                closer = neighbours(survivors(mean_scores(found.values(), found), keep), layers, stride)
                new = [candidate for candidate in closer if candidate not in found]
                bar.total += len(new) * self.ladder[0].num_edits
                found |= self._try(0, new, bar)
            if all(trial.failed for trial in found.values()):
                reasons = "; ".join(sorted({str(trial.failed) for trial in found.values()})[:2])
                raise ValueError(f"Training diverged at every location ({reasons}). Lower the learning rate.")
            trials = list(found.values())
            for rung in range(1, len(self.ladder)):
                found = self._try(rung, survivors(mean_scores(trials, found), keep), bar)
                trials += found.values()
        return trials

    def _try(self, rung: int, candidates: Sequence[Candidate], bar: tqdm[Any]) -> dict[Candidate, LocationTrial]:
        """Return the trials of a rung: those that are not there are made here, or by other processes meanwhile."""
        # the last layer first, on the way to which the states before all others are kept
        waiting = sorted(candidates, key=lambda candidate: -candidate.layer)
        found: dict[Candidate, LocationTrial] = {}
        while waiting:
            before = len(waiting)
            for candidate in list(waiting):
                trial = self._one(rung, candidate, bar)
                if trial is not None:
                    found[candidate] = trial
                    waiting.remove(candidate)
                    best = max(found.values(), key=lambda trial: trial.score)
                    bar.set_postfix_str(f"rung {rung + 1} of {len(self.ladder)}, best: {best.candidate}")
            if len(waiting) == before:
                time.sleep(PATIENCE)
        return {candidate: found[candidate] for candidate in candidates}

    def _one(self, rung: int, candidate: Candidate, bar: tqdm[Any]) -> LocationTrial | None:
        """Return a trial; `None` while another process makes it."""
        path = self._folder / f"{rung}-{candidate.file_name}.json"
        cell = asdict(candidate) | {"rung": rung, "num_edits": self.ladder[rung].num_edits}
        row = known_result(path, cell)
        if row is None:
            place = path.with_suffix("")
            place.mkdir(exist_ok=True)
            with locked(place) as is_ours:
                if not is_ours:
                    return None
                row = known_result(path, cell)  # by another process, between the look and the lock
                if row is None:
                    trial = self._measure(rung, candidate, place)
                    write_atomically(path, json.dumps(asdict(trial), indent=1) + "\n")
                    bar.update(self.ladder[rung].num_edits)
                    shutil.rmtree(place, ignore_errors=True)
                    return trial
        # no time was spent on it here, and none should be expected for the rest because of it
        bar.total -= self.ladder[rung].num_edits
        return read_trial(row)

    def _measure(self, rung: int, candidate: Candidate, place: Path) -> LocationTrial:
        location = location_of(self.model, candidate.module, candidate.layer)
        step = self.ladder[rung]
        edits = self._edits(rung)
        rate = float(self.learning_rates.get(candidate.module) or self.args.learning_rate or 0)
        own: dict[str, Any] = {"output_dir": str(place), "per_device_train_batch_size": step.batch_size}
        own |= {"learning_rate": rate, "report_to": "none", "disable_tqdm": True}
        own |= dict.fromkeys(("save_strategy", "logging_strategy"), "no")
        args = replace(self.args, **own)
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
            tried = try_adapter(self.model, self.tokenizer, edits, config_of(location), args, self._evaluator(rung))
        except (TrainingDivergedError, FloatingPointError) as error:
            logger.warning("%s: %s", candidate, error)
            nothing: dict[str, Any] = {"score": 0.0, "figures": {}, "before": {}, "epochs": 0, "evaluation_seconds": 0}
            return LocationTrial(**known, **nothing, failed=str(error), training_seconds=time.perf_counter() - begun)
        return LocationTrial(
            **known,
            score=self.score.of(tried.report),
            figures=plain_figures(tried.report.results, "after"),
            before=plain_figures(tried.report.results, "before"),
            failed=None,
            epochs=len(tried.epoch_losses),
            training_seconds=tried.training_seconds,
            evaluation_seconds=tried.evaluation_seconds,
        )

    def _edits(self, rung: int) -> Sequence[Edit]:
        return self.edits[edits_of(self.ladder, rung, len(self.edits))]

    def _evaluator(self, rung: int) -> EditEvaluator:
        """Return the evaluator of a rung, which asks the base once."""
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
                evaluator.kept_logits = []
            self._evaluators[rung] = evaluator
        return self._evaluators[rung]

    def _fits(self, num_tokens: int) -> bool:
        """Whether the logits of so many tokens take less than a quarter of the memory that is free."""
        head = self.model.get_output_embeddings().weight
        return num_tokens * head.shape[0] * head.itemsize < free_memory(head.device) / 4


def mean_scores(trials: Collection[LocationTrial], candidates: Iterable[Candidate]) -> dict[Candidate, float]:
    """Return the mean score of each candidate in all its trials, by the edits of these; 0 if one has diverged."""
    scores = {}
    for candidate in candidates:
        own = [trial for trial in trials if trial.candidate == candidate]
        mean = sum(trial.score * trial.num_edits for trial in own) / sum(trial.num_edits for trial in own)
        scores[candidate] = 0.0 if any(trial.failed for trial in own) else mean
    return scores
