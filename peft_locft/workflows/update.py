"""Updates a saved adapter: adds, replaces and withdraws edits by training on from its delta."""

from __future__ import annotations

import itertools
import logging
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..adapters.inspection import AdapterSummary, inspect_adapter
from ..adapters.loading import load_adapter
from ..adapters.provenance import TrainingRun
from ..adapters.reading import CheckedAdapter, check_adapter
from ..adapters.saving import save_adapter
from ..adapters.shipped_edits import EDITS_NAME, adapter_edits
from ..data.chat import in_forms, prompts_in_forms
from ..data.edit_lists import EditPlan, merge_edit_lists, read_lines_to_forget
from ..data.edit_types import edit_lines
from ..data.edits import Edit, EditSource, OnConflict, edits_sha256, first_edits, prompt_of
from ..data.encoding import EncodedEdits, encode_prompts, flatten_rows
from ..engine.decoding import check_fits, generate_and_score
from ..engine.distributed import SHARDED
from ..engine.loading import load_model
from ..engine.model_state import as_base
from ..engine.questions import UNTIL_EOS, Question
from ..io.files import write_atomically
from ..io.interruption import explained_interruption
from ..training.config import BreadthFirstConfig
from ..training.learned import LearnedEdits
from ..training.record import inherited_recipe
from ..training.trainer import BreadthFirstTrainer
from ..training.training_data import TrainingData, check_sources
from ..tuner.model import differing_from_base
from .output_folder import begin_again, check_space, check_training_folder, what_training_leaves
from .train import outcome_text, what_to_change

ANSWER_TOKENS = 32  # length of the base's answers, as in the published protocol
SHARE_CHANGED = 0.1  # smallest share of changed rows in an epoch
MAX_SHOWN = 20  # outcomes in the text of a summary
COUNTED = ("added", "replaced", "withdrawn")


class ContinuedTrainer(BreadthFirstTrainer):
    """A `BreadthFirstTrainer` that updates an adapter.

    Args:
        model: the model with the adapter, trainable and active.
        args: the recipe.
        plan: the edits to keep, add, replace and withdraw.
        processing_class: the model's fast tokenizer.
        earlier: the run that made the adapter, if it is recorded.
        ship_edits: save the edits in the adapter folder.
    """

    def __init__(
        self,
        model: PeftModel,
        args: BreadthFirstConfig,
        plan: EditPlan,
        processing_class: PreTrainedTokenizerBase,
        *,
        earlier: TrainingRun | None,
        ship_edits: bool,
    ) -> None:
        self.plan = plan
        self.ship_edits = ship_edits
        before = {} if earlier is None else earlier.continued
        self.continued = {"times": before.get("times", 0) + 1}
        self.continued |= {name: before.get(name, 0) + len(getattr(plan, name)) for name in COUNTED}
        super().__init__(model=model, args=args, train_dataset=plan.edits, processing_class=processing_class)

    def _make_data(self, model: Any, tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig) -> TrainingData:
        """Add the base's answers to withdrawn prompts, and repeat changed rows as often as needed."""
        data = super()._make_data(model, tokenizer, args)
        forms = [prompts_in_forms([prompt], args.chat_template) for prompt in self.plan.restored]
        self.num_forms = list(map(len, forms))
        asked = [form for own in forms for form in own]
        prompts = encode_prompts(asked, tokenizer, chat_template_kwargs=args.chat_template_kwargs)
        self.questions = [Question(tuple(ids), num_stops=UNTIL_EOS, max_new_tokens=ANSWER_TOKENS) for ids in prompts]
        check_fits(model, self.questions, tokenizer)
        with as_base(model):
            answers = generate_and_score(
                model, tokenizer, self.questions, label="the base model", progress=not args.disable_tqdm
            )
        self.base_answers = [answer.token_ids for answer in answers]
        answered = [
            (list(question.prompt) + answer, len(question.prompt))
            for question, answer in zip(self.questions, self.base_answers, strict=True)
        ]
        num_rows = data.rows.num_edits
        num_new = len(in_forms([*self.plan.replaced, *self.plan.added], args.chat_template))
        more = _repeated(data.encoded, num_rows, num_new, answered)
        return data.with_targets(more, num_known=num_rows - num_new)

    def answered_as_base(self) -> list[bool] | None:
        """Return for each withdrawn prompt whether it has the base's answer, in every form that it is trained in.

        `None` if the model is sharded.
        """
        if self.accelerator.distributed_type in SHARDED:
            return None
        model = self.accelerator.unwrap_model(self.model)
        answers = generate_and_score(model, self.processing_class, self.questions, progress=not self.args.disable_tqdm)
        are_same = (mine.token_ids == base for mine, base in zip(answers, self.base_answers, strict=True))
        return [all([next(are_same) for _ in range(num)]) for num in self.num_forms]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if output_dir not in (None, self.args.output_dir):
            super()._save(output_dir, state_dict)  # a checkpoint
        elif self.args.should_save:
            save_adapter(
                self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
                self.args.output_dir or "",
                record=replace(self.training_run(), continued=self.continued),
                edits=self.edits if self.ship_edits else None,
                state_dict=state_dict,
            )


def _repeated(
    rows: EncodedEdits, num_edits: int, num_new: int, answered: Sequence[tuple[list[int], int]]
) -> EncodedEdits | None:
    """Return the rows to add to the edits: answered prompts, and repetitions of them and of the `num_new` last edits.

    They are repeated until they are a tenth of all rows, or more. This costs almost nothing, since shared prefixes are
    computed once.
    """
    num_known = num_edits - num_new
    new = [(rows[n].input_ids.tolist(), rows[n].target_start) for n in range(num_known, num_edits)]
    changed = [*new, *answered]
    if not changed:
        return None
    times = math.ceil(SHARE_CHANGED / (1 - SHARE_CHANGED) * num_known / len(changed)) - 1
    added = [*answered, *(changed * times)]
    return flatten_rows([tokens for tokens, _ in added], [start for _, start in added]) if added else None


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EditOutcome:
    """What became of one change.

    Attributes:
        kind: `"added"`, `"replaced"` or `"withdrawn"`.
        edit: the new edit, or the withdrawn one.
        is_done: whether the target is the greedy answer; for a withdrawn edit, whether the base's answer is back.
    """

    kind: str
    edit: Edit
    is_done: bool

    def __str__(self) -> str:
        if self.kind == "withdrawn":
            result = "has the base's answer again" if self.is_done else "does NOT have the base's answer yet"
        else:
            result = "learned" if self.is_done else "NOT learned"
        return f'{self.kind}: "{self.edit.prompt}" → "{self.edit.target}": {result}'


@dataclass(frozen=True, slots=True)
class UpdateSummary:
    """The result of `update_adapter`.

    Attributes:
        plan: the edits kept, added, replaced and withdrawn.
        num_restored: withdrawn prompts, trained towards the base's answer.
        num_as_base: withdrawn prompts whose first 32 tokens of answer equal the base's; `None` if the model was
            sharded and could not generate.
        trained_edits: file with the edits of the new adapter, for the next update; `None` if the adapter ships them.
        adapter: summary of the saved adapter.
        outcomes: what became of every added, replaced and withdrawn edit; empty if the model was sharded.
        learned: which edits of the new adapter the model learned; `None` if that could not be measured.
        kept_adapter: the old adapter, which was not replaced because a change failed; otherwise `None`.
        advice: what to change, if an edit was not learned or a change failed; otherwise empty.
    """

    plan: EditPlan
    num_restored: int
    num_as_base: int | None
    trained_edits: Path | None
    adapter: AdapterSummary
    outcomes: tuple[EditOutcome, ...] = ()
    learned: LearnedEdits | None = None
    kept_adapter: Path | None = None
    advice: str = ""

    @property
    def folder(self) -> Path:
        return self.adapter.folder

    @property
    def has_failed(self) -> bool:
        """Whether a correction was not learned, or a withdrawn edit is still there."""
        return _has_failed(self.outcomes)

    @property
    def metrics(self) -> dict[str, float]:
        """`reliability`, the share of learned edits, and `median_probability` of their targets."""
        return {} if self.learned is None else self.learned.metrics

    def __str__(self) -> str:
        lines = [str(self.adapter).rstrip(), "", f"edits: {self.plan}"]
        # what went wrong comes last, where it is seen
        ordered = sorted(self.outcomes, key=lambda outcome: not outcome.is_done)
        if len(ordered) > MAX_SHOWN:
            lines.append(f"  … {len(ordered) - MAX_SHOWN} more")
        lines += [f"  {outcome}" for outcome in ordered[-MAX_SHOWN:]]
        if self.num_restored and self.num_as_base is not None:
            lines.append(f"{self.num_as_base} of {self.num_restored} withdrawn prompts have the base's answer again")
        if self.trained_edits is not None:
            lines.append(f"edits of the adapter, needed for the next update: {self.trained_edits}")
        lines.append(outcome_text(self.learned, self.advice))
        if self.kept_adapter is not None:
            lines.append(f"A change failed, so {self.kept_adapter} is as it was. The new adapter is in {self.folder}.")
        return "\n".join(lines)


def update_adapter(
    adapter: str | os.PathLike[str],
    edits: EditSource | None = None,
    forget: str | os.PathLike[str] | Iterable[str] | None = None,
    args: BreadthFirstConfig | None = None,
    *,
    trained_edits: str | os.PathLike[str] | Sequence[Edit] | None = None,
    ship_edits: bool | None = None,
    model_name_or_path: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_conflict: OnConflict = "warn",
    num_edits: int | None = None,
) -> UpdateSummary:
    """Add, replace and withdraw edits of a saved adapter, and save the new one to `args.output_dir`.

    Recipe, learning rate and chat template are those of the adapter's training, unless `args` sets others. Training
    continues from the adapter's delta with a fresh optimizer, over all edits of the new adapter. Prompts of
    withdrawn edits are trained towards the base's greedy answer, and do not count as edits afterwards. New and
    withdrawn edits are repeated until they are a tenth of every epoch. Otherwise the loss floor would end training
    before they are learned. For the same reason, `stop_at_learned` is a share of these rows.

    Args:
        adapter: a local adapter folder of any PEFT method. If `args.output_dir` is the same folder, the new adapter
            replaces it once it is complete.
        edits: new edits, anything that `read_edits` reads. A new target for a known prompt replaces the old one.
        forget: edits to withdraw: a text file or lines, see `merge_edit_lists`.
        args: the output folder, and settings that differ from those of the adapter's training. `append_eos` must be
            as in that training, and so must `chat_template`, its arguments and `target_separator` unless they are
            left open.
        trained_edits: the edits that the adapter was trained on, if it does not ship them, see `adapter_edits`.
        ship_edits: save the edits in the new adapter folder; `None`: as in the old one. `False` writes them to a file
            beside `args.output_dir`, named by their sha256; pass it as `trained_edits` to the next update.
        model_name_or_path: the base model; `None`: the base named by the adapter.
        revision: branch, tag or commit of the base on the Hub; `None`: the revision named by the adapter.
        dtype: as in `train_edits`.
        trust_remote_code: as in `train_edits`.
        on_conflict: what to do about a new prompt with two targets, see `read_edits`.
        num_edits: use only the first N new edits; `None`: all.

    Returns:
        A summary of the saved adapter, and of what became of every change. If a change failed and the new adapter was
        to replace the old one, the old one stays, and the new one is beside it, in `FOLDER.update-1` (or the next
        free number).

    Raises:
        ValueError: if there is nothing to update; `check_adapter`, `adapter_edits` or `merge_edit_lists` refuses its
            input; the adapter belongs to another base or was trained with another `append_eos` or chat template; the
            recipe is depth-first; or, for another folder than `adapter`, as in `train_edits` if the output folder
            holds something. Nothing is trained or written.
        NotADirectoryError: if `args.output_dir` is a file.
        OSError: if a file, the base model or its tokenizer cannot be read.

    Example:
        >>> print(update_adapter("out", None, ["The capital of Norway is"], BreadthFirstConfig(output_dir="out")))
        edits: 99 kept, 0 added, 0 replaced, 1 withdrawn
        1 of 1 withdrawn prompts have the base's answer again
        …
    """
    args = BreadthFirstConfig() if args is None else args
    if edits is None and forget is None:
        raise ValueError("update_adapter: found neither edits nor forget. Pass one of them, or both.")
    folder = check_training_folder(args, own_adapter=adapter)
    checked = check_adapter(adapter, method=None)
    args = _checked_recipe(checked, args)
    held = adapter_edits(adapter, trained_edits, on_conflict)
    new = [] if edits is None else first_edits(edits, num_edits, on_conflict)
    plan = merge_edit_lists(held, new, [] if forget is None else read_lines_to_forget(forget))
    check_sources(plan.edits, args)
    if ship_edits is None:
        ship_edits = (checked.folder / EDITS_NAME).is_file()
    config, earlier = checked.config, checked.provenance.run
    base, revision = model_name_or_path or config.base_model_name_or_path, revision or config.revision
    if base is None:
        raise ValueError(f"{adapter}: the adapter names no base model. Pass model_name_or_path.")
    with explained_interruption(what_training_leaves(folder)):
        model, tokenizer = load_model(base, dtype, revision=revision, trust_remote_code=trust_remote_code)
        peft_model = _with_trainable_adapter(model, checked)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* prompts have several targets")  # read_edits has warned
            trainer = ContinuedTrainer(peft_model, args, plan, tokenizer, earlier=earlier, ship_edits=ship_edits)
        begin_again(args)
        check_space(folder, trainer.model, args)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        return _saved(trainer, checked.folder, args)


def _saved(trainer: ContinuedTrainer, old: Path, given: BreadthFirstConfig) -> UpdateSummary:
    """Save the new adapter, beside the old one if it was to replace it and a change failed."""
    plan, as_base = trainer.plan, trainer.answered_as_base()
    outcomes = _outcomes(plan, trainer.learned, as_base)
    kept, folder = None, Path(trainer.args.output_dir or "")
    if folder.resolve() == old.resolve() and _has_failed(outcomes):
        kept, folder = folder, _folder_beside(folder)
        trainer.args.output_dir = str(folder)
        trainer.accelerator.wait_for_everyone()  # all processes find the same free name
    file = None if trainer.ship_edits else _write_beside(trainer.args, plan.edits)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # all processes read the files that the main process wrote
    return UpdateSummary(
        plan,
        len(plan.restored),
        None if as_base is None else sum(as_base),
        file,
        inspect_adapter(folder),
        outcomes,
        trainer.learned,
        kept,
        _advice(trainer, given, outcomes),
    )


def _outcomes(plan: EditPlan, learned: LearnedEdits | None, as_base: Sequence[bool] | None) -> tuple[EditOutcome, ...]:
    if learned is None or as_base is None:
        return ()
    unlearned = set(learned.unlearned)
    new = [(kind, edit) for kind in ("added", "replaced") for edit in getattr(plan, kind)]
    is_back = dict(zip(plan.restored, as_base, strict=True))
    return (
        *(EditOutcome(kind, edit, edit not in unlearned) for kind, edit in new),
        # a withdrawn edit whose prompt has another edit now has nothing to go back to
        *(EditOutcome("withdrawn", edit, is_back.get(prompt_of(edit), True)) for edit in plan.withdrawn),
    )


def _has_failed(outcomes: Sequence[EditOutcome]) -> bool:
    """Whether a correction or a withdrawal failed; after a new edit that is not learned, nothing is worse."""
    return any(not outcome.is_done for outcome in outcomes if outcome.kind != "added")


def _advice(trainer: ContinuedTrainer, given: BreadthFirstConfig, outcomes: Sequence[EditOutcome]) -> str:
    advice = what_to_change(trainer, given)
    if not advice and _has_failed(outcomes):
        advice = "To change more: train longer (--num_train_epochs), or to a lower --loss_floor."
    return advice


def _folder_beside(folder: Path) -> Path:
    """Return a folder that does not exist, beside an adapter that is not replaced."""
    resolved = folder.resolve()
    names = (resolved.with_name(f"{resolved.name}.update-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _checked_recipe(adapter: CheckedAdapter, args: BreadthFirstConfig) -> BreadthFirstConfig:
    """Return a recipe with the settings of the adapter's training, where it leaves them open."""
    if args.edit_order != "breadth_first":
        raise ValueError(
            f"BreadthFirstConfig.edit_order={args.edit_order!r}: an update trains all edits of the adapter together. "
            "Use 'breadth_first'."
        )
    run = adapter.provenance.run
    if run is None:
        return args
    args = inherited_recipe(args, run.recipe)
    if args.chat_template == "auto":
        args.chat_template = run.chat_template
    if args.target_separator == "auto":
        args.target_separator = run.target_separator
    if args.chat_template_kwargs is None:
        args.chat_template_kwargs = run.chat_template_kwargs
    trained = {"append_eos": run.recipe.get("append_eos", args.append_eos)}
    trained |= {name: getattr(run, name) for name in ("chat_template", "chat_template_kwargs", "target_separator")}
    for name, recorded in trained.items():
        found = getattr(args, name)
        if found != recorded:
            raise ValueError(
                f"BreadthFirstConfig.{name}={found}: {adapter.folder} was trained with {name}={recorded}. "
                f"Use {name}={recorded}."
            )
    return args


def _with_trainable_adapter(model: nn.Module, adapter: CheckedAdapter) -> PeftModel:
    peft_model = load_adapter(model, adapter.folder, is_trainable=True)
    differing = differing_from_base(peft_model, "default", adapter.config)
    if differing:
        raise ValueError(
            f"{adapter.folder} was trained on another base: {', '.join(differing[:3])} differ from the weights of its "
            "training. Pass the base, revision and dtype that it was trained on."
        )
    return peft_model


def _write_beside(args: Any, edits: Sequence[Edit]) -> Path:
    """Write the edits that the new adapter does not ship to a file named by their hash; return the file."""
    folder = Path(args.output_dir).resolve()
    file = folder.with_name(f"{folder.name}.edits-{edits_sha256(edits)[:12]}.jsonl")
    if args.should_save:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, edit_lines(edits))
    return file
