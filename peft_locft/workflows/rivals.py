"""Methods that do not train: retrieval of edits, and closed forms, each measured by the evaluator of a comparison."""

from __future__ import annotations

import copy
import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.edit_retrieval import EditRetrieval
from ..data.edits import Edit, edits_sha256
from ..engine.memory import Usage, measured_usage
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import EditEvaluator
from ..evaluation.report import EvaluationReport
from ..io.files import write_atomically
from ..locating.score import LocationScore
from ..training.closed_form import ClosedForm, SharedWork, check_location, edit_in_closed_form
from ..training.config import BreadthFirstConfig
from ..training.input_statistics import layer_numbers
from ..tuner import LocFTConfig
from .rival_settings import PUBLISHED, RivalSettings, choose_settings, described, from_description
from .trials import known_result

logger = logging.getLogger(__name__)

CLOSED_FORMS: tuple[ClosedForm, ...] = get_args(ClosedForm)
RETRIEVAL = {"retrieval": False, "retrieval-gated": True}  # whether a gate is used
RIVALS = (*RETRIEVAL, *CLOSED_FORMS)
SMALLEST_TUNING = 5  # edits


@dataclass(frozen=True)
class RivalTrial:
    """The result of one method.

    Args:
        report: the evaluation.
        usage: of the edit, without the choice of settings.
        chosen: the settings, by name.
        notes: what a reader should know.
    """

    report: EvaluationReport
    usage: Usage
    chosen: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Rivals:
    """Measures methods that do not train, on the same base and edits.

    Args:
        model: the base; unchanged after each trial.
        tokenizer: its tokenizer.
        edits: the edits that are reported.
        tuning_edits: other edits, on which settings are chosen; `()`: the published ones are used.
        location: the location of the comparison.
        args: form of the texts, preserved text and seed.
        folder: where the choice of settings is stored.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    edits: Sequence[Edit]
    tuning_edits: Sequence[Edit]
    location: LocFTConfig
    args: BreadthFirstConfig
    folder: Path

    def __post_init__(self) -> None:
        self._shared = SharedWork()
        self._tuner: EditEvaluator | None = None

    def why_not(self, method: str) -> str | None:
        """Return why a method cannot be compared here; `None` if it can."""
        if method in RETRIEVAL:
            if RETRIEVAL[method] and not any(edit.subject for edit in self.edits):
                return f"{method}: no edit has a subject. Add the column `subject` to the edits."
            return None
        location = copy.deepcopy(self.location)
        location.task_type = "CAUSAL_LM"
        model = get_peft_model(self.model, location)
        try:
            check_location(model, cast(ClosedForm, method))
        except ValueError as error:
            return str(error)
        finally:
            model.unload()
        return None

    def measure(self, method: str, evaluator: EditEvaluator, args: BreadthFirstConfig) -> RivalTrial:
        """Edit by a method of `RIVALS` and evaluate it.

        Args:
            method: the method.
            evaluator: of the edits.
            args: as in the constructor, with the seed of this trial.
        """
        if method in RETRIEVAL:
            with measured_usage(next(self.model.parameters()).device) as usage:
                remember = EditRetrieval(
                    self.edits, subject_gate=RETRIEVAL[method], target_separator=args.target_separator
                )
            return RivalTrial(evaluator.evaluate(self.model, rewrite=remember), usage)
        closed_form = cast(ClosedForm, method)
        settings, notes = self._settings(closed_form)
        report, usage, layers, own = self._edited(closed_form, settings, self.edits, evaluator, args)
        return RivalTrial(report, usage, described(closed_form, settings) | {"layers": layers}, [*notes, *own])

    def _edited(
        self,
        method: ClosedForm,
        settings: RivalSettings,
        edits: Sequence[Edit],
        evaluator: EditEvaluator,
        args: BreadthFirstConfig,
    ) -> tuple[EvaluationReport, Usage, list[int | None], list[str]]:
        location = settings.location(self.model, self.location)
        location.task_type = "CAUSAL_LM"
        edited = get_peft_model(self.model, location)
        try:
            with measured_usage(next(self.model.parameters()).device) as usage:
                record = edit_in_closed_form(
                    edited, self.tokenizer, edits, method, settings.method, args, shared=self._shared
                )
            if record.reused is not None:  # every method pays for its target values
                usage.seconds += record.reused.seconds
                usage.processor_seconds += record.reused.processor_seconds
                usage.peak_bytes = max(usage.peak_bytes, record.reused.peak_bytes)
            names = [each.name for each in check_location(edited, method)]
            layers = [*dict.fromkeys(layer_numbers(edited, names)[1].values())]
            return evaluator.evaluate(edited), usage, layers, record.notes
        finally:
            edited.unload()
            gc.collect()

    def _settings(self, method: ClosedForm) -> tuple[RivalSettings, list[str]]:
        """Return the settings that the rule chooses on the tuning edits, and a note on how."""
        if len(self.tuning_edits) < SMALLEST_TUNING:
            why = f"{method}: published settings, as there are no other edits to choose them on."
            return RivalSettings("given", PUBLISHED[method]), [why]
        modules = self.location.target_modules
        cell = {
            "tuning_edits": edits_sha256(self.tuning_edits),
            "method": method,
            "model": getattr(self.model.config, "name_or_path", ""),
            "modules": sorted(modules) if isinstance(modules, set) else modules,
            "layers": self.location.layers_to_transform,
            "seed": self.args.seed,
        }
        path = self.folder / f"tuning_{method}.json"
        row = known_result(path, cell)
        if row is None:
            if self._tuner is None:
                self._tuner = self._tuning_evaluator()
            rule = LocationScore.default(["reliability", "generalization", "locality"], has_text=False)
            tuner = self._tuner

            def score(settings: RivalSettings) -> float:
                try:
                    found = rule.of(self._edited(method, settings, self.tuning_edits, tuner, self.args)[0])
                except FloatingPointError:  # the edited model is broken: its logits are NaN
                    found = 0.0
                logger.info("%s, %s: score %.3f", method, described(method, settings), found)
                return found

            chosen, trials = choose_settings(method, score)
            row = cell | {"chosen": described(method, chosen), "trials": trials}
            write_atomically(path, json.dumps(row, indent=1) + "\n")
        note = f"{method}: settings chosen on {len(self.tuning_edits)} other edits ({len(row['trials'])} trials)."
        return from_description(method, row["chosen"]), [note]

    def _tuning_evaluator(self) -> EditEvaluator:
        config = EvaluationConfig(
            protocols=["token_accuracy"],
            chat_template=self.args.chat_template,
            chat_template_kwargs=self.args.chat_template_kwargs,
            target_separator=self.args.target_separator,
        )
        return EditEvaluator(self.model, self.tokenizer, self.tuning_edits, config, progress=False)
