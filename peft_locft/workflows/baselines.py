"""Compare fine-tuning baselines on the same edits: the effect of order, batch size and averaging."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from peft import LoraConfig, PeftConfig
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.edits import Edit, EditSource, edits_sha256, first_edits, read_edits
from ..data.texts import TextSource
from ..engine.loading import load_model
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import EditEvaluator
from ..io.files import write_atomically
from ..io.interruption import explained_interruption
from ..reporting.baselines import TABLE_METRICS, Baseline, BaselineResult, baselines_to_markdown
from ..reporting.drawing import can_draw
from ..reporting.plots import draw_baselines
from ..training.callbacks import logging_beside_bars
from ..training.config import BreadthFirstConfig, batch_size_for
from ..training.training_data import with_chat_template
from ..tuner import LocFTConfig
from .output_folder import check_output_folder, what_trials_leave
from .trials import known_result, try_adapter

logger = logging.getLogger(__name__)

# the objective, and whether the target ends with EOS; EasyEdit's FT-L and FT-M have no EOS
METHODS: dict[str, dict[str, Any]] = {
    "FT-L": {"objective": "prompt_last", "append_eos": False},
    "FT-M": {"objective": "target_new", "append_eos": False},
    "LocFT": {"objective": "target_new", "append_eos": True},
    "LoRA": {"objective": "target_new", "append_eos": True},
}
LORA_RANK = 32  # alpha is twice as large (arXiv 2402.11078)


def baselines(batch_size: int, methods: Sequence[str] = tuple(METHODS)) -> list[Baseline]:
    """Return four baselines for each method: depth-first and breadth-first, one edit per step and in mini-batches.

    With one edit per step, only the order differs: the controlled experiment of arXiv 2509.22072. LocFT breadth-first
    in mini-batches, averaged by edit, is the published LocFT-BF.

    Args:
        batch_size: size of the mini-batches.
        methods: keys of `METHODS`.

    Raises:
        ValueError: if a method is unknown, or `batch_size` is below 2.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ValueError(f"methods: found {', '.join(unknown)}; expected some of {', '.join(METHODS)}.")
    if batch_size < 2:
        raise ValueError(f"batch_size={batch_size}: expected 2 or more, as breadth-first trains in mini-batches.")
    return [
        baseline
        for method in methods
        for baseline in (
            Baseline(method, "depth_first", 1),
            Baseline(method, "breadth_first", 1),
            Baseline(method, "breadth_first", batch_size),
            Baseline(method, "breadth_first", batch_size, "token"),
        )
    ]


def compare_baselines(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: EditSource,
    args: BreadthFirstConfig,
    *,
    location: LocFTConfig | None = None,
    methods: Sequence[str] = tuple(METHODS),
    evaluation: EvaluationConfig | None = None,
    text: TextSource | None = None,
) -> list[BaselineResult]:
    """Train and evaluate every baseline on the same edits, at the same location, from the same base.

    Each result is written to `args.output_dir` immediately, and a later call with the same arguments reuses it. At the
    end, the comparison writes `baselines.md` and, with matplotlib, `baselines.png`.

    Args:
        model: the base; unchanged at the end, since every adapter is removed.
        tokenizer: its fast tokenizer.
        edits: anything `read_edits` reads.
        args: epochs, learning rate, size of the mini-batches, and output folder. Each baseline sets order, objective,
            averaging and EOS.
        location: the location to train; `None`: `LocFTConfig()`. LoRA trains the same modules.
        methods: keys of `METHODS`.
        evaluation: evaluation settings.
        text: text for perplexity, see `evaluate_edits`.

    Returns:
        A result for each baseline.

    Raises:
        ValueError: if edits, methods or recipe are invalid; if `args.output_dir` is missing, or holds an adapter or a
            model (see `overwrite_output_dir`). Nothing is trained.

    Example:
        >>> args = BreadthFirstConfig(output_dir="baselines", per_device_train_batch_size=20, learning_rate=2e-3)
        >>> results = compare_baselines(model, tokenizer, "zsre.json", args)
        >>> print(baselines_to_markdown(results))
    """
    folder = check_output_folder(args.output_dir, overwrite=args.overwrite_output_dir, what="a comparison")
    edits = read_edits(edits)
    chosen = baselines(batch_size_for(len(edits), args), methods)
    args = with_chat_template(args, edits, tokenizer)
    evaluation = evaluation or EvaluationConfig()
    if evaluation.chat_template == "auto":  # as the baselines are trained
        evaluation = replace(
            evaluation, chat_template=args.chat_template, chat_template_kwargs=args.chat_template_kwargs
        )
    folder.mkdir(parents=True, exist_ok=True)
    evaluator = EditEvaluator(model, tokenizer, edits, evaluation, text=text, progress=not args.disable_tqdm)
    location = location or LocFTConfig()
    setting = {
        "edits": edits_sha256(edits),
        "model": getattr(model.config, "name_or_path", ""),
        "evaluation": asdict(evaluator.args),
        "epochs": args.num_train_epochs,
        "learning_rate": args.learning_rate,
        "loss_floor": args.loss_floor,
        "seed": args.seed,
    }
    results = []
    stopped = explained_interruption(what_trials_leave(folder, "*.json"))
    with stopped, logging_beside_bars(not args.disable_tqdm):
        for baseline in (bar := tqdm(chosen, desc="baselines", disable=bool(args.disable_tqdm))):
            bar.set_postfix_str(str(baseline))
            cell = setting | {"baseline": asdict(baseline)}
            path = folder / f"{str(baseline).replace(', ', '_').replace(' ', '-')}.json"
            row = known_result(path, cell)
            if row is None:
                row = cell | _measure(model, tokenizer, edits, baseline, args, location, evaluator)
                write_atomically(path, json.dumps(row, indent=1) + "\n")
            results.append(BaselineResult.from_dict(row))
        write_atomically(folder / "baselines.md", baselines_to_markdown(results) + "\n")
        if can_draw():
            draw_baselines(results, folder / "baselines.png")
    return results


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    baseline: Baseline,
    args: BreadthFirstConfig,
    location: LocFTConfig,
    evaluator: EditEvaluator,
) -> dict[str, Any]:
    recipe = METHODS[baseline.method] | {
        "edit_order": baseline.edit_order,
        "per_device_train_batch_size": baseline.batch_size,
        "loss_averaging": baseline.loss_averaging,
        "save_strategy": "no",
        "disable_tqdm": True,  # one bar is enough
    }
    trial = try_adapter(model, tokenizer, edits, _peft_config(baseline, location), replace(args, **recipe), evaluator)
    metrics = {name: result for name, result in trial.report.results.items() if name in TABLE_METRICS}
    return {
        "training_seconds": trial.training_seconds,
        "final_loss": trial.epoch_losses[-1] if trial.epoch_losses else None,
        "metrics": {name: result.after._asdict() for name, result in metrics.items()},
        "before": {name: result.before._asdict() for name, result in metrics.items() if result.before},
    }


def _peft_config(baseline: Baseline, location: LocFTConfig) -> PeftConfig:
    config = copy.deepcopy(location)
    config.task_type = "CAUSAL_LM"
    if baseline.method != "LoRA":
        return config
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
    methods: Sequence[str] = tuple(METHODS),
    num_edits: int | None = None,
    text: TextSource | None = None,
    max_text_tokens: int = 16384,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> list[BaselineResult]:
    """Load a model and compare baselines on it, as `locft baselines` does. Further arguments: see `compare_baselines`.

    Args:
        model_name_or_path: the base: a folder or a name on the Hub.
        num_edits: use only the first `num_edits` edits; `None` for all.
        max_text_tokens: maximum number of tokens of `text`.
        revision: branch, tag or commit of the base on the Hub.
        dtype: `"auto"` (the checkpoint's), `"float32"`, `"bfloat16"` or `"float16"`.
        trust_remote_code: run code that comes with the base.
    """
    # find errors before a large model is loaded
    check_output_folder(args.output_dir, overwrite=args.overwrite_output_dir, what="a comparison")
    read = first_edits(edits, num_edits)
    model, tokenizer = load_model(model_name_or_path, dtype, revision=revision, trust_remote_code=trust_remote_code)
    evaluation = EvaluationConfig(max_text_tokens=max_text_tokens)
    return compare_baselines(
        model, tokenizer, read, args, location=location, methods=methods, evaluation=evaluation, text=text
    )
