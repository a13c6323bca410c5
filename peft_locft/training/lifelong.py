"""An adapter that lives on: edits are added, replaced and withdrawn by training from its delta."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel
from torch import nn

from ..adapters.adapter_folder import check_folder
from ..adapters.adapter_reading import CheckedAdapter, check_adapter
from ..adapters.inspection import AdapterSummary, inspect_adapter
from ..adapters.shipped_edits import EDITS_NAME, edit_lines
from ..data.edit_lists import EditPlan, held_edits, merge_edit_lists, read_lines_to_forget
from ..data.training_data import check_sources
from ..edits import Edit, OnConflict, edits_sha256, first_edits
from ..files import write_whole
from ..recipe import BreadthFirstConfig
from ..running.loading import load_model
from ..tuner.provenance import differing_from_base
from .continued_trainer import ContinuedTrainer
from .resume import whole_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UpdateSummary:
    """What `update_adapter` did.

    Attributes:
        plan: the edits, and what became of them.
        num_restored: prompts of withdrawn edits that the base is to answer again.
        num_as_base: those of them that are answered token for token as the base answers, at most 32 tokens; `None` if
            the model was spread over processes, so that it could not be asked.
        kept_edits: the file with the edits that the new adapter holds, for the next time; `None` if it ships them.
        adapter: what was saved.
    """

    plan: EditPlan
    num_restored: int
    num_as_base: int | None
    kept_edits: Path | None
    adapter: AdapterSummary

    @property
    def folder(self) -> Path:
        return self.adapter.folder

    def __str__(self) -> str:
        lines = [f"edits: {self.plan}"]
        if self.num_restored and self.num_as_base is not None:
            lines.append(f"{self.num_as_base} of {self.num_restored} withdrawn prompts are answered as by the base")
        if self.kept_edits is not None:
            lines.append(f"the edits that the adapter holds, which it does not ship: {self.kept_edits}")
        return "\n".join([*lines, "", str(self.adapter)])


def update_adapter(
    adapter: str | os.PathLike[str],
    edits: str | os.PathLike[str] | Sequence[Edit] | datasets.Dataset | None = None,
    forget: str | os.PathLike[str] | Iterable[str] | None = None,
    args: BreadthFirstConfig | None = None,
    *,
    kept_edits: str | os.PathLike[str] | Sequence[Edit] | None = None,
    ship_edits: bool | None = None,
    model_name_or_path: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_conflict: OnConflict = "warn",
    num_edits: int | None = None,
) -> UpdateSummary:
    """Add, replace and withdraw edits of a saved adapter, and save the new one to `args.output_dir`.

    Training begins with the adapter's delta and a fresh optimizer, over all the edits that are held in the end. The
    prompts of withdrawn edits are trained towards what the base itself answers, greedily, and are no edits afterwards.
    What is new or withdrawn makes up a tenth of every epoch at least, by repetition, so that the loss floor does not
    end training while a few of it are lost among thousands that are known. For the same reason the share in
    `stop_at_learned` is of these rows: no more of all may be unlearned than it leaves of them.

    Args:
        adapter: a local adapter folder, of any PEFT method. It is left as it is, until the new one is whole, if
            `args.output_dir` is the same folder.
        edits: new ones, whatever `read_edits` reads; one with another target for a known prompt replaces that.
        forget: which to withdraw: a text file or lines, see `merge_edit_lists`.
        args: the recipe, and where to save; `None` is the published one. What edits look like to the model
            (`append_eos`, `chat_template`) must be as the adapter was trained.
        kept_edits: the edits that the adapter was trained on, if it does not ship them, see `held_edits`.
        ship_edits: whether the new adapter ships its edits; `None` is as the old one does. Otherwise they are written
            beside `args.output_dir`, to a file that is named by their sha256, and is `kept_edits` the next time.
        model_name_or_path: the base model; `None` is the one that the adapter names.
        revision: branch, tag or commit of the base on the Hub; `None` is the one that the adapter names.
        dtype: as in `train_edits`.
        trust_remote_code: as in `train_edits`.
        on_conflict: what to do about one prompt with two targets among the new edits, see `read_edits`.
        num_edits: take so many of the new edits from the beginning; `None`: all.

    Returns:
        What was saved, and how many withdrawn prompts are answered as the base answers.

    Raises:
        ValueError: if there is nothing to do; if the adapter is refused by `check_adapter`, belongs to another base or
            was trained with another form of edits; if the edits cannot be used, or `held_edits` or `merge_edit_lists`
            refuses them; if `args` are of depth-first order. Nothing is trained or written then.
        NotADirectoryError: if `args.output_dir` is a file.
        OSError: if a file, the base model or its tokenizer cannot be read.

    Example:
        >>> print(update_adapter("out", None, ["The capital of Norway is"], BreadthFirstConfig(output_dir="out")))
        edits: 99 kept, 0 added, 0 replaced, 1 withdrawn
        1 of 1 withdrawn prompts are answered as by the base
        …
    """
    args = BreadthFirstConfig() if args is None else args
    if edits is None and forget is None:
        raise ValueError("update_adapter: found neither new edits nor edits to forget; expected one of them, or both.")
    check_folder(args.output_dir)
    checked = check_adapter(adapter, method=None)
    _check_recipe(checked, args)
    held = held_edits(adapter, kept_edits, on_conflict)
    new = [] if edits is None else first_edits(edits, num_edits, on_conflict)
    plan = merge_edit_lists(held, new, [] if forget is None else read_lines_to_forget(forget))
    check_sources(plan.edits, args)
    if args.resume_from_checkpoint:
        whole_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if ship_edits is None:
        ship_edits = (checked.folder / EDITS_NAME).is_file()
    config = checked.config
    base, revision = model_name_or_path or config.base_model_name_or_path, revision or config.revision
    if base is None:
        raise ValueError(f"{adapter}: it does not say which base model it belongs to; give model_name_or_path.")
    model, tokenizer = load_model(base, dtype, revision=revision, trust_remote_code=trust_remote_code)
    peft_model = _with_trainable_adapter(model, checked)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* prompts have several targets")  # said by read_edits, once
        trainer = ContinuedTrainer(peft_model, args, plan, tokenizer, earlier=checked.facts, ship_edits=ship_edits)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    num_restored, num_as_base = len(trainer.questions), trainer.count_as_base()
    if num_as_base is not None and num_as_base < num_restored:
        logger.warning(
            "%d of %d withdrawn prompts are not answered as by the base. Train longer, or to a lower loss_floor.",
            num_restored - num_as_base,
            num_restored,
        )
    file = None if ship_edits else _write_beside(args, plan.edits)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # one process writes what all of them read now
    return UpdateSummary(plan, num_restored, num_as_base, file, inspect_adapter(args.output_dir))


def _check_recipe(adapter: CheckedAdapter, args: BreadthFirstConfig) -> None:
    if args.edit_order != "breadth_first":
        raise ValueError(
            f"BreadthFirstConfig.edit_order={args.edit_order!r}: an adapter is trained on over all its edits "
            "together. Give 'breadth_first'."
        )
    for name in ("append_eos", "chat_template"):
        found, recorded = getattr(args, name), adapter.facts.get("recipe", {}).get(name, getattr(args, name))
        if found != recorded:
            raise ValueError(
                f"BreadthFirstConfig.{name}={found}: {adapter.folder} was trained with {recorded}, and its edits "
                f"would look different to the model. Give {name}={recorded}."
            )


def _with_trainable_adapter(model: nn.Module, adapter: CheckedAdapter) -> PeftModel:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was trained on another base")  # an error below
            peft_model = PeftModel.from_pretrained(model, str(adapter.folder), is_trainable=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{adapter.folder}: the adapter does not fit the base model: {error}") from None
    differing = differing_from_base(peft_model, "default", adapter.config)
    if differing:
        raise ValueError(
            f"{adapter.folder} was trained on another base: {', '.join(differing[:3])} differ from the weights that "
            "its deltas belong to. Give its own base, at the revision and dtype that it was trained on."
        )
    return peft_model


def _write_beside(args: Any, edits: Sequence[Edit]) -> Path:
    """Write the list that the new adapter does not ship; its name keeps it from replacing an older adapter's."""
    folder = Path(args.output_dir).resolve()
    file = folder.with_name(f"{folder.name}.edits-{edits_sha256(edits)[:12]}.jsonl")
    if args.should_save:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, edit_lines(edits))
    return file
