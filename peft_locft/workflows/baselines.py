"""Compare baselines and rivals on the same edits: fine-tuning in either order, closed forms, and retrieval."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.edits import Edit, EditSource, edits_sha256, first_edits, fold_case, read_edits
from ..data.texts import TextSource
from ..engine.loading import load_model
from ..engine.memory import Usage
from ..evaluation.citations import bibtex, papers_of_baselines
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import EditEvaluator
from ..evaluation.report import EvaluationReport
from ..io.files import write_atomically
from ..io.interruption import explained_interruption
from ..reporting.baselines import (
    Baseline,
    BaselineResult,
    baselines_to_csv,
    baselines_to_latex,
    baselines_to_markdown,
)
from ..reporting.drawing import can_draw
from ..reporting.plots import draw_baselines
from ..training.callbacks import logging_beside_bars
from ..training.config import BreadthFirstConfig, batch_size_for
from ..training.recipes import RECIPES
from ..training.training_data import with_chat_template
from ..tuner import LocFTConfig
from ..tuner.presets import balanced_config, resolve_location
from .output_folder import check_output_folder, what_trials_leave
from .rivals import RIVALS, Rivals
from .trials import known_result, try_adapter

logger = logging.getLogger(__name__)

# the objective, and whether the target ends with EOS; EasyEdit's FT-L and FT-M have no EOS
METHODS: dict[str, dict[str, Any]] = {
    "FT-L": {"objective": "prompt_last", "append_eos": False},
    "FT-M": {"objective": "target_new", "append_eos": False},
    "LocFT": {"objective": "target_new", "append_eos": True},
    "LoRA": {"objective": "target_new", "append_eos": True},
}
# every field of a recipe; rate and batch size are those of the comparison
RECIPES_OF = {"LocFT-published": "published", "LocFT-balanced": "balanced"}
ALL_METHODS = (*METHODS, *RECIPES_OF, *RIVALS)
LORA_RANK = 32  # alpha is twice as large (arXiv 2402.11078)
FORMAT = 2  # of the files of results


def baselines(batch_size: int, methods: Sequence[str] = tuple(METHODS)) -> list[Baseline]:
    """Return the baselines of some methods.

    FT-L, FT-M, LocFT and LoRA have four each: depth-first and breadth-first, one edit per step and in mini-batches.
    With one edit per step, only the order differs: the controlled experiment of arXiv 2509.22072. LocFT breadth-first
    in mini-batches, averaged by edit, is the published LocFT-BF. Any other method has one.

    Args:
        batch_size: size of the mini-batches.
        methods: some of `ALL_METHODS`.

    Raises:
        ValueError: if a method is unknown, or `batch_size` is below 2.
    """
    unknown = sorted(set(methods) - set(ALL_METHODS))
    if unknown:
        raise ValueError(f"methods: found {', '.join(unknown)}; expected some of {', '.join(ALL_METHODS)}.")
    if batch_size < 2:
        raise ValueError(f"batch_size={batch_size}: expected 2 or more, as breadth-first trains in mini-batches.")
    return [baseline for method in methods for baseline in _baselines_of(method, batch_size)]


def _baselines_of(method: str, batch_size: int) -> list[Baseline]:
    if method in RIVALS:
        return [Baseline(method)]
    if method in RECIPES_OF:
        return [Baseline(method, "breadth_first", batch_size, RECIPES[RECIPES_OF[method]]["loss_averaging"])]
    return [
        Baseline(method, "depth_first", 1),
        Baseline(method, "breadth_first", 1),
        Baseline(method, "breadth_first", batch_size),
        Baseline(method, "breadth_first", batch_size, "token"),
    ]


def compare_baselines(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: EditSource,
    args: BreadthFirstConfig,
    *,
    location: LocFTConfig | None = None,
    methods: Sequence[str] | None = None,
    tuning_edits: EditSource = (),
    num_seeds: int = 1,
    columns: Sequence[str] | None = None,
    evaluation: EvaluationConfig | None = None,
    text: TextSource | None = None,
) -> list[BaselineResult]:
    """Edit by every baseline, and evaluate it: the same edits, location, base and evaluator.

    Each result is written to `args.output_dir` immediately, and a later call with the same arguments reuses it. At the
    end, the comparison writes `baselines.md`, `baselines.csv`, `baselines.tex` (booktabs), `baselines.bib` and, with
    matplotlib, `baselines.png`.

    Args:
        model: the base; unchanged at the end, since every adapter is removed.
        tokenizer: its fast tokenizer.
        edits: anything `read_edits` reads.
        args: epochs, learning rate, size of the mini-batches, seed, and output folder. Each baseline sets order,
            objective, averaging and EOS.
        location: the location to edit; `None`: `LocFTConfig()`, and for LocFT-balanced `balanced_config(model)`. LoRA
            trains the same modules.
        methods: some of `ALL_METHODS`; `None`: all that suit the location and the edits, and a warning names the
            others.
        tuning_edits: other edits, on which closed-form methods choose their settings, see `choose_settings`; `()`:
            they use the published ones. Those with a prompt of `edits` are left out.
        num_seeds: seeds for each baseline: `args.seed` and those that follow.
        columns: metrics to show, by any name of the report; `None`: those of `TABLE_METRICS`.
        evaluation: evaluation settings.
        text: text for perplexity, see `evaluate_edits`.

    Returns:
        A result for each baseline and seed.

    Raises:
        ValueError: if edits, methods or recipe are invalid, or a method that you name does not suit the location; if
            `args.output_dir` is missing, or holds an adapter or a model (see `overwrite_output_dir`). Nothing is
            trained.

    Example:
        >>> args = BreadthFirstConfig(output_dir="baselines", per_device_train_batch_size=20, learning_rate=2e-3)
        >>> results = compare_baselines(model, tokenizer, "zsre.json", args, methods=["LocFT-balanced", "MEMIT"])
        >>> print(baselines_to_markdown(results))
    """
    folder = check_output_folder(args.output_dir, overwrite=args.overwrite_output_dir, what="a comparison")
    if num_seeds < 1:
        raise ValueError(f"num_seeds={num_seeds}: expected 1 or more.")
    edits = read_edits(edits)
    batch_size = batch_size_for(len(edits), args)
    baselines(batch_size, methods or ())
    args = with_chat_template(args, edits, tokenizer)
    evaluation = _asked_as_trained(evaluation or EvaluationConfig(), args)
    others = _others(tuning_edits, edits)
    rivals = Rivals(model, tokenizer, edits, others, location or LocFTConfig(), args, folder)
    chosen = baselines(batch_size, _suited(rivals, methods))
    folder.mkdir(parents=True, exist_ok=True)
    evaluator = EditEvaluator(model, tokenizer, edits, evaluation, text=text, progress=not args.disable_tqdm)
    comparison = _Comparison(rivals, evaluator, args, location)
    results = []
    stopped = explained_interruption(what_trials_leave(folder, "*.json"))
    with stopped, logging_beside_bars(not args.disable_tqdm):
        cells = [(baseline, args.seed + number) for baseline in chosen for number in range(num_seeds)]
        for baseline, seed in (bar := tqdm(cells, desc="baselines", disable=bool(args.disable_tqdm))):
            bar.set_postfix_str(str(baseline))
            results.append(comparison.result(baseline, seed))
        _write(folder, results, columns)
    return results


def _asked_as_trained(evaluation: EvaluationConfig, args: BreadthFirstConfig) -> EvaluationConfig:
    if evaluation.target_separator == "auto":
        evaluation = replace(evaluation, target_separator=args.target_separator)
    if evaluation.chat_template != "auto":
        return evaluation
    return replace(evaluation, chat_template=args.chat_template, chat_template_kwargs=args.chat_template_kwargs)


def _others(tuning_edits: EditSource, edits: Sequence[Edit]) -> list[Edit]:
    """Return the tuning edits that have no prompt in common with the edits that are reported."""
    if isinstance(tuning_edits, Sequence) and not tuning_edits:
        return []
    reported = {fold_case(prompt) for edit in edits for prompt in (edit.prompt, *edit.rephrasings)}
    found = read_edits(tuning_edits)
    return [edit for edit in found if reported.isdisjoint(map(fold_case, (edit.prompt, *edit.rephrasings)))]


def _suited(rivals: Rivals, methods: Sequence[str] | None) -> list[str]:
    """Return the methods to compare; those that nobody named may be left out, with a warning."""
    found = []
    for method in ALL_METHODS if methods is None else methods:
        why = rivals.why_not(method) if method in RIVALS else None
        if why is not None and methods is not None:
            raise ValueError(f"methods: {why}")
        if why is None:
            found.append(method)
        else:
            logger.warning("Left out: %s", why)
    return found


def _write(folder: Path, results: Sequence[BaselineResult], columns: Sequence[str] | None) -> None:
    write_atomically(folder / "baselines.csv", baselines_to_csv(results))
    cited = papers_of_baselines(result.baseline.method for result in results)
    write_atomically(folder / "baselines.bib", bibtex(cited) + "\n")
    write_atomically(folder / "baselines.md", baselines_to_markdown(results, columns) + "\n")
    write_atomically(folder / "baselines.tex", baselines_to_latex(results, columns) + "\n")
    if can_draw():
        draw_baselines(results, folder / "baselines.png", columns)


class _Comparison:
    """Measures baselines on the same edits, and stores each result."""

    def __init__(
        self, rivals: Rivals, evaluator: EditEvaluator, args: BreadthFirstConfig, location: LocFTConfig | None
    ) -> None:
        self.rivals, self.evaluator, self.args, self.location = rivals, evaluator, args, location
        self.setting = {
            "format": FORMAT,
            "edits": edits_sha256(rivals.edits),
            "tuning_edits": edits_sha256(rivals.tuning_edits),
            "model": getattr(rivals.model.config, "name_or_path", ""),
            "evaluation": asdict(evaluator.args),
            "epochs": args.num_train_epochs,
            "learning_rate": args.learning_rate,
            "loss_floor": args.loss_floor,
        }

    def result(self, baseline: Baseline, seed: int) -> BaselineResult:
        """Return the result of a baseline with a seed: the stored one, or a new one, which is stored."""
        cell = self.setting | {"seed": seed, "baseline": asdict(baseline)}
        name = str(baseline).replace(", ", "_").replace(" ", "-")
        path = self.rivals.folder / f"{name}{'' if seed == self.args.seed else f'_seed-{seed}'}.json"
        row = known_result(path, cell)
        if row is None:
            row = cell | self._measured(baseline, _with_seed(self.args, seed))
            write_atomically(path, json.dumps(row, indent=1) + "\n")
        return BaselineResult.from_dict(row)

    def _measured(self, baseline: Baseline, args: BreadthFirstConfig) -> dict[str, Any]:
        if baseline.method in RIVALS:
            rival = self.rivals.measure(baseline.method, self.evaluator, args)
            return _row(rival.report, rival.usage) | {"chosen": rival.chosen, "notes": rival.notes}
        model, tokenizer, edits = self.rivals.model, self.rivals.tokenizer, self.rivals.edits
        config = _peft_config(baseline, self.location, model)
        trial = try_adapter(model, tokenizer, edits, config, _recipe(baseline, args), self.evaluator)
        row = _row(trial.report, trial.usage)
        return row | {"final_loss": trial.epoch_losses[-1] if trial.epoch_losses else None}


def _row(report: EvaluationReport, usage: Usage) -> dict[str, Any]:
    return {
        "final_loss": None,
        "training_seconds": usage.seconds,
        "processor_seconds": usage.processor_seconds,
        "peak_bytes": usage.peak_bytes,
        "metrics": {name: result.after._asdict() for name, result in report.results.items()},
        "before": {name: result.before._asdict() for name, result in report.results.items() if result.before},
    }


def _recipe(baseline: Baseline, args: BreadthFirstConfig) -> BreadthFirstConfig:
    own: dict[str, Any] = {
        "edit_order": baseline.edit_order,
        "per_device_train_batch_size": baseline.batch_size,
        "loss_averaging": baseline.loss_averaging,
        "save_strategy": "no",
        "disable_tqdm": True,  # one bar is enough
    }
    if baseline.method in RECIPES_OF:
        open_fields: dict[str, Any] = dict.fromkeys(RECIPES["published"] | RECIPES["balanced"])
        return replace(args, **(open_fields | own | {"recipe": RECIPES_OF[baseline.method]}))
    return replace(args, **(METHODS[baseline.method] | own))


def _peft_config(baseline: Baseline, location: LocFTConfig | None, model: PreTrainedModel) -> PeftConfig:
    if location is None and baseline.method == "LocFT-balanced":
        return balanced_config(model, task_type="CAUSAL_LM")
    config = copy.deepcopy(location or LocFTConfig())
    config.task_type = "CAUSAL_LM"
    if baseline.method != "LoRA":
        return config
    if config.target_modules is None:  # PEFT's own default for LoRA is another location
        resolve_location(config, model)
    return LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=config.target_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        exclude_modules=config.exclude_modules,
        task_type="CAUSAL_LM",
    )


def run_baselines(
    model_name_or_path: str | os.PathLike[str],
    edits: EditSource,
    args: BreadthFirstConfig,
    *,
    location: LocFTConfig | None = None,
    methods: Sequence[str] | None = None,
    num_edits: int | None = None,
    tuning_edits: EditSource | None = None,
    num_tuning_edits: int = 30,
    num_seeds: int = 1,
    columns: Sequence[str] | None = None,
    evaluation: EvaluationConfig | None = None,
    text: TextSource | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> list[BaselineResult]:
    """Load a model and compare baselines on it, as `locft baselines` does. Further arguments: see `compare_baselines`.

    Args:
        model_name_or_path: the base: a folder or a name on the Hub.
        num_edits: compare on the first `num_edits` edits; `None` for all.
        tuning_edits: the edits to choose settings on; `None`: those of `edits` behind the first `num_edits`.
        num_tuning_edits: use only the first `num_tuning_edits` of them.
        revision: branch, tag or commit of the base on the Hub.
        dtype: `"auto"` (the checkpoint's), `"float32"`, `"bfloat16"` or `"float16"`.
        trust_remote_code: run code that comes with the base.
    """
    # find errors before a large model is loaded
    check_output_folder(args.output_dir, overwrite=args.overwrite_output_dir, what="a comparison")
    everything = read_edits(edits)
    read = first_edits(everything, num_edits)
    others = everything[len(read) :] if tuning_edits is None else read_edits(tuning_edits)
    model, tokenizer = load_model(model_name_or_path, dtype, revision=revision, trust_remote_code=trust_remote_code)
    return compare_baselines(
        model,
        tokenizer,
        read,
        args,
        location=location,
        methods=methods,
        tuning_edits=others[:num_tuning_edits],
        num_seeds=num_seeds,
        columns=columns,
        evaluation=evaluation,
        text=text,
    )


def _with_seed(args: BreadthFirstConfig, seed: int) -> BreadthFirstConfig:
    seeded = copy.copy(args)
    seeded.seed = seed
    return seeded
