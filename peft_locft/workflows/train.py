"""Trains edits into a model and saves the adapter: what `locft train` does."""

from __future__ import annotations

import copy
import logging
import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig

from ..adapters.inspection import AdapterSummary, inspect_adapter
from ..adapters.saving import describe_adapter
from ..data.edit_types import without_questions
from ..data.edits import Edit, EditSource, first_edits
from ..engine.loading import load_model, task_type_of
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import EditEvaluator
from ..io.interruption import explained_interruption
from ..locating.preset import LocationPreset
from ..reporting.drawing import can_draw
from ..reporting.plots import draw_curves
from ..training.config import AUTO, BreadthFirstConfig
from ..training.evaluation_callback import EvaluationCallback
from ..training.learned import LearnedEdits
from ..training.scale_choice import TradeOff, choose_scale
from ..training.trainer import BreadthFirstTrainer
from ..training.training_data import check_sources
from ..tuner import LocFTConfig, balanced_config
from .output_folder import begin_again, check_space, check_training_folder, what_training_leaves

logger = logging.getLogger(__name__)

WEAKER_SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class TrainingSummary(AdapterSummary):
    """What a training saved, as `inspect_adapter` returns it, and what it learned.

    Attributes:
        learned: which edits the model learned; `None` where that cannot be measured, see `BreadthFirstTrainer`.
        advice: what to change, if less than 99 % were learned; otherwise empty.
    """

    learned: LearnedEdits | None = None
    advice: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        """`reliability`, the share of learned edits, and `median_probability` of their targets."""
        return {} if self.learned is None else self.learned.metrics

    def __str__(self) -> str:
        # a dataclass with slots is another class than the one that super() alone would find
        return f"{AdapterSummary.__str__(self).rstrip()}\n\n{outcome_text(self.learned, self.advice)}"


def outcome_text(learned: LearnedEdits | None, advice: str) -> str:
    """Return the last lines of a training: what was learned, and what to change."""
    if learned is None:
        return "Evaluate the adapter to see what it learned: `locft evaluate`."
    return f"{learned}\n{advice}".rstrip()


def what_to_change(trainer: BreadthFirstTrainer, given: BreadthFirstConfig) -> str:
    """Return advice if a training learned less than it could; otherwise an empty text.

    Args:
        trainer: after its training.
        given: the arguments as the user gave them.
    """
    learned, epochs = trainer.learned, len(trainer.epoch_losses)
    if learned is None or learned.is_enough:
        return ""
    if given.learning_rate != AUTO:
        return f"To learn more: leave out the learning rate ({given.learning_rate:g}); the default fits the model."
    if given.edit_order == "breadth_first" and epochs >= (given.num_train_epochs or 0):
        return (
            f"To learn more: train longer (--num_train_epochs {2 * epochs}), or at another location "
            "(`locft locate` finds one)."
        )
    return "To learn more: train at another location (`locft locate` finds one), or to a lower --loss_floor."


def train_edits(
    model_name_or_path: str | os.PathLike[str],
    edits: EditSource,
    peft_config: PeftConfig | LocationPreset | None = None,
    args: BreadthFirstConfig | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_conflict: Literal["warn", "error", "last"] = "warn",
    num_edits: int | None = None,
    evaluate_every: int = 0,
    evaluate_num_edits: int = 100,
    best_metric: str | None = None,
    patience: int = 2,
    keep_reliability: float | None = None,
    ship_edits: bool = False,
) -> TrainingSummary:
    """Write edits into a model and save the adapter to `args.output_dir`.

    Args:
        model_name_or_path: the base model: a folder or a name on the Hub.
        edits: anything that `read_edits` reads.
        peft_config: what to train: a `LocFTConfig`, the configuration of another PEFT method, or the preset that
            `locft locate` found. `None`: `LocFTConfig()`.
        args: the recipe and the output folder; `None`: the published recipe.
        revision: branch, tag or commit of the base model on the Hub.
        dtype: dtype of the base model: `"auto"` (as in the checkpoint), `"float32"`, `"bfloat16"` or `"float16"`.
        trust_remote_code: run the code that comes with the base model. Read that code first.
        on_conflict: what to do about a prompt with two targets, see `read_edits`.
        num_edits: use only the first N edits; `None`: all.
        evaluate_every: epochs between evaluations during training; 0: no evaluation. See `EvaluationCallback`.
        evaluate_num_edits: number of edits to evaluate, drawn with `args.seed`.
        best_metric: metric that selects the best epoch; enables early stopping.
        patience: stop after this many evaluations without improvement.
        keep_reliability: after training, set the smallest `scale` from 0.5 to 1 with at least this reliability on
            `evaluate_num_edits` edits, see `choose_scale`.
        ship_edits: save the edits in the adapter folder. Everyone with the adapter can read them, and
            `update_adapter` then needs no other file.

    Returns:
        What was learned, and a summary of the saved adapter.

    Raises:
        ValueError: if the edits, the location or the recipe are invalid, or the model is not a decoder-only language
            model with a fast tokenizer; if `args.output_dir` is missing, or holds an adapter, a model or the
            checkpoints of an interrupted run and neither `overwrite_output_dir` nor `resume_from_checkpoint` is set.
            Nothing is trained or written.
        DiskFullError: if the disk has no room. A note says what is safe, as on Ctrl-C.
        NotADirectoryError: if `args.output_dir` is a file.
        OSError: if the base model or its tokenizer cannot be loaded.

    Example:
        >>> summary = train_edits("Qwen/Qwen2.5-7B-Instruct", "edits.json", args=BreadthFirstConfig(output_dir="out"))
        >>> print(summary)
    """
    args = BreadthFirstConfig() if args is None else args
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _what_to_train(peft_config, model_name_or_path, source)
    # find errors before a large model is loaded or trained
    if best_metric is not None and not evaluate_every:
        raise ValueError(f"best_metric={best_metric!r} needs evaluations during training. Set evaluate_every, too.")
    folder = check_training_folder(args)
    _check(config, keep_reliability)
    read = first_edits(edits, num_edits, on_conflict)
    check_sources(read, args)
    with explained_interruption(what_training_leaves(folder)):
        model, tokenizer = load_model(model_name_or_path, dtype, **source)
        trainer = _trainer(model, tokenizer, config, args, read, revision)
        sample = random.Random(args.seed).sample(read, min(evaluate_num_edits, len(read)))
        if evaluate_every:
            callback = _evaluation(sample, args, every=evaluate_every, best_metric=best_metric, patience=patience)
            trainer.add_callback(callback)
        begin_again(args)
        check_space(folder, trainer.model, args)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if keep_reliability is not None:
            _weaken(trainer, sample, keep_reliability)
            trainer.learned = trainer.measure_learned()
        trainer.save_model()
        if ship_edits and args.should_save:
            describe_adapter(folder, edits=trainer.edits)
        trainer.accelerator.wait_for_everyone()  # all processes read the files that the main process wrote
        saved = inspect_adapter(folder)
    content = {each.name: getattr(saved, each.name) for each in fields(saved)}
    return TrainingSummary(**content, learned=trainer.learned, advice=what_to_change(trainer, args))


def _trainer(
    model: Any,
    tokenizer: Any,
    config: PeftConfig,
    args: BreadthFirstConfig,
    edits: Sequence[Edit],
    revision: str | None,
) -> BreadthFirstTrainer:
    complete_config(config, model, args)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* prompts have several targets")  # read_edits has already warned
        return BreadthFirstTrainer(
            model=get_peft_model(model, config, revision=revision),
            args=args,
            train_dataset=edits,
            processing_class=tokenizer,
        )


def _check(peft_config: PeftConfig, keep_reliability: float | None) -> None:
    if keep_reliability is not None and not (0 < keep_reliability <= 1 and isinstance(peft_config, LocFTConfig)):
        raise ValueError(
            f"keep_reliability={keep_reliability!r}: expected a number above 0, at most 1, and a LocFTConfig."
        )


def _evaluation(sample: Sequence[Edit], args: BreadthFirstConfig, **fields: Any) -> EvaluationCallback:
    evaluation = EvaluationConfig(protocols=["generation", "token_accuracy"])  # in the chat template as trained
    return EvaluationCallback(sample, args=evaluation, draw=draw_curves if can_draw() else None, **fields)


def _weaken(trainer: BreadthFirstTrainer, sample: Sequence[Edit], reliability: float) -> None:
    """Set the smallest scale of the delta that keeps the reliability on a sample of the edits."""
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    prompts = [without_questions(edit) for edit in sample]
    evaluation = EvaluationConfig(protocols=["generation"])  # in the chat template as trained
    evaluator = EditEvaluator(model, trainer.processing_class, prompts, evaluation, progress=not args.disable_tqdm)

    def measured(weaker: PeftModel) -> dict[str, float]:
        found = evaluator.evaluate(weaker).results["reliability_exact_match"].after.value
        return {"reliability": found, "scale": weaker.peft_config[weaker.active_adapter].scale}

    trade_off = TradeOff({"scale": -1.0}, at_least={"reliability": reliability})
    chosen = choose_scale(model, measured, trade_off, WEAKER_SCALES, progress=not args.disable_tqdm)
    logger.warning(
        "Set the scale of the delta to %g, the smallest that keeps the reliability.\n%s", chosen.scale, chosen
    )


def _what_to_train(
    wanted: PeftConfig | LocationPreset | None, model_name_or_path: str | os.PathLike[str], source: dict[str, Any]
) -> PeftConfig:
    if wanted is not None and not isinstance(wanted, (PeftConfig, LocationPreset)):
        found = f"found a {type(wanted).__name__}"
        advice = ". Pass the recipe as args." if isinstance(wanted, BreadthFirstConfig) else "."
        raise ValueError(f"peft_config: {found}; expected a LocFTConfig or another PeftConfig{advice}")
    if isinstance(wanted, LocationPreset):
        return wanted.config_for(AutoConfig.from_pretrained(model_name_or_path, **source))
    return LocFTConfig() if wanted is None else copy.deepcopy(wanted)


def complete_config(config: PeftConfig, model: Any, args: BreadthFirstConfig) -> None:
    """Fill in what a configuration leaves open and the model and the recipe decide: task type and location."""
    _set_task_type(config, model)
    _set_default_location(config, model, args)


def _set_task_type(config: PeftConfig, model: Any) -> None:
    if config.task_type in (None, "CAUSAL_LM"):
        config.task_type = task_type_of(model)  # lets PEFT's Auto classes load the adapter


def _set_default_location(config: PeftConfig, model: Any, args: BreadthFirstConfig) -> None:
    if not isinstance(config, LocFTConfig) or config.target_modules is not None:
        return
    if args.recipe == "balanced" and config.layers_to_transform is None and config.target_parameters is None:
        config.target_modules = balanced_config(model).target_modules
