"""Trains one more edit on a model that is already loaded: into a saved adapter, or into a new one."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback

from ..adapters.loading import load_adapter
from ..adapters.reading import check_adapter, read_provenance
from ..adapters.saving import describe_adapter
from ..adapters.shipped_edits import shipped_edits
from ..data.edit_lists import merge_edit_lists
from ..data.edits import Edit
from ..engine.loading import task_type_of
from ..training.config import BreadthFirstConfig
from ..training.record import inherited_recipe
from ..training.trainer import BreadthFirstTrainer
from ..tuner import LocFTConfig
from .update import ContinuedTrainer

LOCATION = ("target_modules", "layers_to_transform", "layers_pattern", "target_parameters", "train_bias", "scale")


def has_edits(adapter: str | os.PathLike[str]) -> bool:
    """Return whether an adapter is a local folder that ships its edits."""
    return Path(adapter).is_dir() and shipped_edits(adapter) is not None


def train_on(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | os.PathLike[str],
    edit: Edit,
    output_dir: str | os.PathLike[str],
) -> int:
    """Train an adapter that ships its edits on, with one more edit, and save it to another folder.

    Args:
        base: the base model, without adapters; afterwards, too.
        tokenizer: its tokenizer.
        adapter: the adapter's folder.
        edit: the new edit.
        output_dir: folder for the new adapter.

    Returns:
        The number of edits of the new adapter.
    """
    checked = check_adapter(adapter, method=None)
    plan = merge_edit_lists(shipped_edits(adapter) or [], [edit])
    args = _recipe_of(adapter, output_dir)
    model = load_adapter(base, adapter, is_trainable=True)
    earlier = checked.provenance.run
    _train(model, lambda: ContinuedTrainer(model, args, plan, tokenizer, earlier=earlier, ship_edits=True))
    return len(plan.edits)


def train_beside(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | os.PathLike[str],
    edit: Edit,
    output_dir: str | os.PathLike[str],
) -> int:
    """Train an edit into a new adapter, by the recipe and at the location of another; arguments as in `train_on`."""
    args = _recipe_of(adapter, output_dir)
    config = PeftConfig.from_pretrained(os.fspath(adapter))
    location = {name: getattr(config, name) for name in LOCATION} if isinstance(config, LocFTConfig) else {}
    model = get_peft_model(base, LocFTConfig(task_type=task_type_of(base), **location))
    _train(model, lambda: BreadthFirstTrainer(model, args, [edit], tokenizer))
    describe_adapter(output_dir, edits=[edit])
    return 1


def _train(model: Any, make_trainer: Any) -> None:
    """Train and save, and take the adapter off the base."""
    trainer = None
    try:
        trainer = make_trainer()
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
    finally:
        model.unload()
        trainer = None
        gc.collect()  # trainer and model refer to each other


def _recipe_of(adapter: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> BreadthFirstConfig:
    run = read_provenance(Path(adapter)).run
    recorded: dict[str, Any] = {} if run is None else run.recipe
    quiet: dict[str, Any] = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    args = inherited_recipe(BreadthFirstConfig(output_dir=os.fspath(output_dir), **quiet), recorded)
    if run is not None:
        args.chat_template, args.chat_template_kwargs = run.chat_template, run.chat_template_kwargs
        args.target_separator = run.target_separator
    return args
