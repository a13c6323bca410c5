"""The field's fine-tuning baselines on the same edits: what the order, the batches and the averaging do."""

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

from ..data.edits import Edit, edits_sha256, first_edits, read_edits
from ..data.texts import TextSource
from ..engine.loading import load_model
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import EditEvaluator, EditSource
from ..io.files import write_atomically
from ..reporting.baseline_table import FIGURES, Baseline, baselines_to_markdown
from ..reporting.plots import can_draw, draw_baselines
from ..training.config import BreadthFirstConfig
from ..tuner import LocFTConfig
from .trials import known_result, try_adapter

logger = logging.getLogger(__name__)

# what is scored, and whether the target ends with EOS; EasyEdit's FT-L and FT-M have none
METHODS: dict[str, dict[str, Any]] = {
    "FT-L": {"objective": "prompt_last", "append_eos": False},
    "FT-M": {"objective": "target_new", "append_eos": False},
    "LocFT": {"objective": "target_new", "append_eos": True},
    "LoRA": {"objective": "target_new", "append_eos": True},
}
RANK = 32  # of LoRA, with alpha twice as large (arXiv 2402.11078)


def baselines(batch_size: int, methods: Sequence[str] = tuple(METHODS)) -> list[Baseline]:
    """Return each method depth-first and breadth-first one edit a step, and breadth-first in mini-batches.

    One edit a step, only the order differs: the controlled experiment of arXiv 2509.22072. LocFT breadth-first in
    mini-batches, averaged by edit, is the published LocFT-BF.

    Args:
        batch_size: of the mini-batches.
        methods: some of `METHODS`.

    Raises:
        ValueError: if a method is unknown, or `batch_size` is below 2.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown or batch_size < 2:
        raise ValueError(
            f"methods={list(methods)}, batch_size={batch_size}: expected methods out of {', '.join(METHODS)}, and "
            "mini-batches of 2 or more."
        )
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
) -> list[dict[str, Any]]:
    """Train and evaluate every baseline on the same edits, at the same location, from the same base.

    Each result is written to `args.output_dir` when it is there, and taken from there by a later call with the same
    arguments; so are, in the end, `baselines.md` and, with matplotlib, `baselines.png`.

    Args:
        model: the base; every adapter is taken off it again.
        tokenizer: its fast tokenizer.
        edits: whatever `read_edits` reads.
        args: epochs, learning rate, batch size of the mini-batches, and where results go; order, objective, averaging
            and EOS are each baseline's own.
        location: what is trained; `None` is `LocFTConfig()`. LoRA takes the same modules.
        methods: some of `METHODS`.
        evaluation: how each is evaluated.
        text: for perplexity, see `evaluate_edits`.

    Returns:
        For each baseline a dictionary: what it is, its figures with their intervals, and the seconds it trained.

    Raises:
        ValueError: if edits, methods or recipe cannot be used; nothing is trained then.

    Example:
        >>> args = BreadthFirstConfig(output_dir="baselines", per_device_train_batch_size=20, learning_rate=2e-3)
        >>> rows = compare_baselines(model, tokenizer, "zsre.json", args)
    """
    chosen = baselines(args.per_device_train_batch_size, methods)
    edits = read_edits(edits)
    folder = Path(args.output_dir)
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
    rows = []
    for baseline in tqdm(chosen, desc="baselines", disable=bool(args.disable_tqdm)):
        cell = setting | {"baseline": asdict(baseline)}
        path = folder / f"{str(baseline).replace(', ', '_').replace(' ', '-')}.json"
        row = known_result(path, cell)
        if row is None:
            row = cell | _measure(model, tokenizer, edits, baseline, args, location, evaluator)
            write_atomically(path, json.dumps(row, indent=1) + "\n")
        rows.append(row)
    write_atomically(folder / "baselines.md", baselines_to_markdown(rows) + "\n")
    if can_draw():
        draw_baselines(rows, folder / "baselines.png")
    return rows


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
    }
    tried = try_adapter(model, tokenizer, edits, _peft_config(baseline, location), replace(args, **recipe), evaluator)
    figures = {name: result for name, result in tried.report.results.items() if name in FIGURES}
    return {
        "seconds": tried.training_seconds,
        "epoch_losses": tried.epoch_losses[-1:],
        "figures": {name: result.after._asdict() for name, result in figures.items()},
        "before": {name: result.before._asdict() for name, result in figures.items() if result.before},
    }


def _peft_config(baseline: Baseline, location: LocFTConfig) -> PeftConfig:
    config = copy.deepcopy(location)
    config.task_type = "CAUSAL_LM"
    if baseline.method != "LoRA":
        return config
    return LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
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
) -> list[dict[str, Any]]:
    """Load a model and compare baselines on it; what `locft baselines` does. Arguments as of `compare_baselines`.

    Args:
        model_name_or_path: the base: a folder or a name on the Hub.
        num_edits: take so many from the beginning; `None`: all.
        max_text_tokens: of `text` at most.
        revision: branch, tag or commit of the base on the Hub.
        dtype: `"auto"` (as the checkpoint says), `"float32"`, `"bfloat16"` or `"float16"`.
        trust_remote_code: run the code that comes with the base.
    """
    read = first_edits(edits, num_edits)
    model, tokenizer = load_model(model_name_or_path, dtype, revision=revision, trust_remote_code=trust_remote_code)
    evaluation = EvaluationConfig(chat_template=args.chat_template, max_text_tokens=max_text_tokens)
    return compare_baselines(
        model, tokenizer, read, args, location=location, methods=methods, evaluation=evaluation, text=text
    )
