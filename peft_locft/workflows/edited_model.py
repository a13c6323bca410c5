"""One line for one fact: `edit` writes facts into a model in memory, and what it returns takes them out again."""

from __future__ import annotations

import copy
import html
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from ..adapters.inspection import AdapterSummary, inspect_adapter
from ..adapters.provenance import TrainingRun
from ..adapters.saving import save_adapter
from ..data.edit_files import READ_SUFFIXES
from ..data.edits import Edit, EditSource, read_edits
from ..data.texts import TextSource
from ..engine.loading import load_model
from ..engine.model_state import check_model_and_tokenizer
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import evaluate_edits
from ..evaluation.report import EvaluationReport
from ..evaluation.tables import html_table
from ..training.config import BreadthFirstConfig
from ..training.trainer import BreadthFirstTrainer
from ..tuner import LocFTConfig
from .train import complete_config

MAX_SHOWN = 10  # edits in a text
FILES = tuple(f"{suffix}{packed}" for suffix in READ_SUFFIXES for packed in ("", ".gz"))


class EditedModel:
    """A model with edits that can be taken out again: what [`edit`] returns.

    Attributes:
        model: the edited model: a `PeftModel` around the caller's model; after `undo` or `merge` the model itself.
        tokenizer: its tokenizer.
        edits: the edits.
        learned: for each edit, whether the model predicts every token of its target.

    Example:
        >>> edited = edit(model, tokenizer, "The capital of Norway is", "Bergen")
        >>> edited
        1 of 1 edits learned:
          'The capital of Norway is' -> 'Bergen'
        .undo() takes it out again, .save(folder) saves it as an adapter.
        >>> edited.undo()
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        learned: Sequence[bool],
        run: TrainingRun,
        restore: Callable[[], None],
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.edits = list(edits)
        self.learned = list(learned)
        self._run = run
        self._restore = restore
        self._ended = ""  # how the edits have left the adapter

    def undo(self) -> nn.Module:
        """Take the edits out: the model has its own layers, weights and settings again, bit for bit.

        Returns:
            The model that was edited. A second call changes nothing.

        Raises:
            ValueError: after `merge`.
        """
        if self._ended == "merged":
            raise ValueError("undo: the edits were merged into the weights. Load the model again.")
        if not self._ended:
            self.model = self.model.unload()
            self._restore()
            self._ended = "undone"
        return self.model

    def merge(self) -> nn.Module:
        """Write the edits into the weights for good: the outputs stay, bit for bit, and the adapter is gone.

        Returns:
            The model that was edited, now a plain model with other weights, which can be edited again.

        Raises:
            ValueError: after `undo` or `merge`, or if the base is quantized.
        """
        self._check_edited("merge")
        self.model = self.model.merge_and_unload()
        self._restore()
        self._ended = "merged"
        return self.model

    def save(self, folder: str | os.PathLike[str], *, ship_edits: bool = False) -> AdapterSummary:
        """Save the edits as an adapter, as `train_edits` does, and return its summary.

        Args:
            folder: the folder to save to, created if needed.
            ship_edits: save the edits beside the weights, for `update_adapter`. Whoever has the adapter can read them.

        Raises:
            ValueError: after `undo` or `merge`.
            NotADirectoryError: if `folder` or a parent is a file.
        """
        self._check_edited("save")
        save_adapter(self.model, folder, record=self._run, edits=self.edits if ship_edits else None)
        return inspect_adapter(folder)

    def evaluate(
        self,
        edits: EditSource | None = None,
        args: EvaluationConfig | None = None,
        *,
        text: TextSource | None = None,
        progress: bool = True,
    ) -> EvaluationReport:
        """Evaluate the edits beside the model's answers before, as `evaluate_edits` does.

        Args:
            edits: anything `read_edits` reads, with rephrasings and probes; `None`: the edits of the model.
            args: what to measure; `None`: the defaults, in the form in which the edits were trained.
            text: text for perplexity and KL.
            progress: show a progress bar.

        Raises:
            ValueError: after `undo` or `merge`, or as in `evaluate_edits`.
        """
        self._check_edited("evaluate")
        if args is None:
            args = EvaluationConfig()  # follows the template that the trainer left on the model
        asked = self.edits if edits is None else edits
        return evaluate_edits(self.model, self.tokenizer, asked, args, text=text, progress=progress)

    def _check_edited(self, what: str) -> None:
        if self._ended:
            raise ValueError(f"{what}: the edits were {self._ended}, so the model has no adapter. Call edit again.")

    def _title(self) -> str:
        count = f"{sum(self.learned)} of {len(self.edits)} edits learned"
        return count if not self._ended else f"{count}, then {self._ended}"

    def __repr__(self) -> str:
        # what went wrong comes first
        order = sorted(range(len(self.edits)), key=lambda index: self.learned[index])
        lines = [self._line(index) for index in order[:MAX_SHOWN]]
        more = [f"  and {len(order) - MAX_SHOWN} more"] if len(order) > MAX_SHOWN else []
        return "\n".join([f"{self._title()}:", *lines, *more, *self._advice()])

    def _line(self, index: int) -> str:
        edit, learned = self.edits[index], self.learned[index]
        return f"  {edit.prompt!r} -> {edit.target!r}{'' if learned else ', not learned'}"

    def _advice(self) -> list[str]:
        if self._ended:
            return []
        advice = []
        if not all(self.learned):
            advice.append("To learn more: args=BreadthFirstConfig(num_train_epochs=100), or another location.")
        return [*advice, ".undo() takes it out again, .save(folder) saves it as an adapter."]

    def _repr_html_(self) -> str:
        pairs = list(zip(self.edits, self.learned, strict=True))
        rows = [[edit.prompt, edit.target, "yes" if learned else "no"] for edit, learned in pairs]
        advice = "".join(f"<p>{html.escape(line)}</p>" for line in self._advice())
        return f"<p>{self._title()}</p>\n{html_table(['prompt', 'target', 'learned'], rows)}\n{advice}"


def edit(
    model: nn.Module | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    edits: EditSource,
    target: str | None = None,
    *,
    peft_config: PeftConfig | None = None,
    args: BreadthFirstConfig | None = None,
    progress: bool = True,
) -> EditedModel:
    """Write one fact, or several, into a model in memory. Nothing is saved until you say so.

    The model is changed in place, as by `get_peft_model`: it answers as edited until `undo`. Several facts belong into
    one call. A model that is edited already is refused: undo or merge the first edits, or give all facts at once.

    Args:
        model: a decoder-only language model without an adapter; or a folder or a name on the Hub, to be loaded.
        tokenizer: its fast tokenizer; `None` for a model that is loaded by name.
        edits: a prompt, with `target`; or anything that `read_edits` reads, such as a dictionary from prompts to
            targets, a list of pairs, or a file.
        target: what the model shall answer to a single prompt.
        peft_config: what to train; `None`: `LocFTConfig()`.
        args: the recipe; `None`: `BreadthFirstConfig()`. Its `output_dir` is used only for checkpoints.
        progress: show a progress bar.

    Raises:
        ValueError: if the model has an adapter, the target is missing, model and tokenizer are something else, or as
            in `train_edits`. The model is then as before.
        OSError: if a model or file is not there.

    Example:
        >>> edited = edit(model, tokenizer, "The capital of Norway is", "Bergen")
        >>> print(edited.evaluate().summary())
        >>> edited.undo()
        >>> edit(model, tokenizer, {"The capital of Norway is": "Bergen", "The capital of Peru is": "Cusco"})
    """
    read = _facts(edits, target)
    if isinstance(model, (str, os.PathLike)):
        model, loaded = load_model(model)
        tokenizer = tokenizer or loaded
    plain, tokenizer = _checked(model, tokenizer)
    config = LocFTConfig() if peft_config is None else copy.deepcopy(peft_config)
    if config.is_prompt_learning:
        raise ValueError(f"peft_config: found {config.peft_type.value}; expected a method that changes weights.")
    restore = _state(plain)
    edited = None
    try:
        with tempfile.TemporaryDirectory(prefix="locft-") as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* prompts have several targets")  # read_edits has warned
            recipe = _recipe(args, folder, progress)
            complete_config(config, plain, recipe)
            edited = get_peft_model(plain, config)
            trainer = BreadthFirstTrainer(edited, recipe, read, tokenizer)
            trainer.pop_callback(PrinterCallback)
            trainer.train()
            assert trainer.learned is not None  # _recipe refuses what cannot be measured
            unlearned = set(map(id, trainer.learned.unlearned))
            learned = [id(each) not in unlearned for each in trainer.edits]
            return EditedModel(edited, tokenizer, read, learned, trainer.training_run(), restore)
    except BaseException:  # Ctrl-C, too
        if edited is not None:
            edited.unload()
        restore()
        raise


def _facts(edits: EditSource, target: str | None) -> list[Edit]:
    if target is not None:
        if not isinstance(edits, str):
            found = f"found a {type(edits).__name__} and a target"
            expected = "expected a prompt and its target, or edits alone, such as {prompt: target}"
            raise ValueError(f"edit: {found}; {expected}")
        return [Edit(prompt=edits, target=target)]
    if isinstance(edits, str) and " " in edits and not edits.lower().endswith(FILES) and not os.path.isfile(edits):
        found = f"found the prompt {edits!r} without a target"
        raise ValueError(f"edit: {found}; expected edit(model, tokenizer, prompt, target)")
    return read_edits(edits)


def _checked(model: Any, tokenizer: Any) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    check_model_and_tokenizer(model, tokenizer, "edit")
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "edit: the model has an adapter already, perhaps of an earlier edit(). Give all facts in one call, which "
            "also learns them better; or first take the adapter out (.undo()) or write it into the weights (.merge())."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"edit: found a {type(model).__name__} as the model; expected a transformers model or its name"
        )
    return model, tokenizer


def _recipe(args: BreadthFirstConfig | None, folder: str, progress: bool) -> BreadthFirstConfig:
    recipe = BreadthFirstConfig(output_dir=folder) if args is None else copy.copy(args)
    if recipe.objective == "prompt_last":
        raise ValueError("edit: objective='prompt_last' does not score answers. Use BreadthFirstTrainer for it.")
    if recipe.save_strategy == "no":
        recipe.output_dir = folder
    recipe.disable_tqdm = recipe.disable_tqdm or not progress
    return recipe


def _state(model: Any) -> Callable[[], None]:
    """Return a function that gives a model the modes, trainable weights and device that it has now."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = None if hasattr(model, "hf_device_map") else model.device

    def restore() -> None:
        for module, mode in training:
            module.training = mode
        for parameter, mode in trainable:
            parameter.requires_grad_(mode)
        if device is not None and model.device != device:
            model.to(device)

    return restore
