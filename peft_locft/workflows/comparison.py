"""Answers of a base model and of its adapters, side by side: what `locft try` does."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..adapters.loading import base_of, load_adapter
from ..adapters.reading import check_adapter, read_provenance
from ..data.edits import Edit
from ..data.encoding import encode_prompts
from ..engine.decoding import check_fits, generate_and_score
from ..engine.loading import load_model
from ..engine.model_state import as_base, max_length
from ..engine.questions import UNTIL_EOS, Answer, Question, end_token_ids
from ..evaluation.evaluator import check_base
from ..evaluation.scoring import begins_with
from ..reporting.columns import side_by_side, wrapped
from .added_edit import has_edits, train_beside, train_on

BASE = "base"
TOGETHER = "all together"
ADDED = "added edits"
MAX_NEW_TOKENS = 64
MOST_REMEMBERED = 1000  # answers of the base


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """A greedy answer.

    Attributes:
        text: the answer, without special tokens.
        is_complete: whether the model ended it; `False`: it was cut at `max_new_tokens`.
    """

    text: str
    is_complete: bool

    def __str__(self) -> str:
        return self.text if self.is_complete else f"{self.text} …"


@dataclass(frozen=True, slots=True)
class ComparedAnswers:
    """The answers to one question.

    Attributes:
        question: the question.
        base: the answer of the base.
        edited: the answers with adapters, by the adapter's name; `"all together"`: with all of them.
    """

    question: str
    base: ModelAnswer
    edited: dict[str, ModelAnswer]

    def is_changed(self, name: str) -> bool:
        """Whether the answer with an adapter differs from that of the base."""
        return self.edited[name] != self.base

    def to_text(self, width: int) -> str:
        """Return the question and its answers side by side, in lines of at most `width` characters."""
        columns = [(BASE, str(self.base))]
        for name, answer in self.edited.items():
            columns.append((f"{name} ({'changed' if self.is_changed(name) else 'same answer'})", str(answer)))
        return "\n".join([*wrapped(self.question, width), "", side_by_side(columns, width)])

    def __str__(self) -> str:
        return self.to_text(shutil.get_terminal_size().columns)


@dataclass(frozen=True, slots=True)
class LearnedEdit:
    """The result of `AdapterComparison.learn`.

    Attributes:
        edit: the edit.
        name: the adapter that was trained, `"added edits"` for a new one.
        folder: where it was saved.
        num_edits: the number of its edits.
        answer: its answer to the prompt.
        seconds: duration of the training.
    """

    edit: Edit
    name: str
    folder: Path
    num_edits: int
    answer: ModelAnswer
    seconds: float

    @property
    def is_learned(self) -> bool:
        """Whether the answer begins with the target."""
        return begins_with(self.answer.text, self.edit.target)

    def __str__(self) -> str:
        how = "Learned" if self.is_learned else "Not learned"
        edits = f"{self.num_edits} edit{'' if self.num_edits == 1 else 's'} in {self.name}"
        return f"{how} in {self.seconds:.0f} s: {self.edit.prompt!r} is answered with {self.answer.text!r}. {edits}."


class AdapterComparison:
    """A base model with adapters, which answers questions with and without them.

    One thread at a time uses the model; others wait.

    Args:
        model: the base model, without adapters. The comparison puts adapters into it: do not use it elsewhere.
        tokenizer: its fast tokenizer.
        adapters: PEFT adapters of this base: local folders or names on the Hub, at least one.
        allow_other_base: also take adapters that were trained on another base.

    Attributes:
        folders: the adapters, by the names that they have in answers: their folders' names, if these differ.

    Raises:
        ValueError: if there is no adapter, an adapter is refused by `check_adapter`, or does not fit the base or was
            trained on another.

    Example:
        >>> comparison = AdapterComparison.load(["out"])
        >>> answers = comparison.ask("The capital of Norway is")
        >>> answers.base.text, answers.edited["out"].text
        ('Oslo.', 'Bergen')
        >>> print(answers)
        The capital of Norway is
        <BLANKLINE>
        base                                   | out (changed)
        -------------------------------------- | --------------------------------------
        Oslo.                                  | Bergen
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Sequence[str | os.PathLike[str]],
        *,
        allow_other_base: bool = False,
    ) -> None:
        self.tokenizer, self.allow_other_base = tokenizer, allow_other_base
        self.folders = _named(adapters)
        self._lock = threading.RLock()
        self._base: Any = model
        self._base_answers: dict[Question, ModelAnswer] = {}
        self._attach()

    @classmethod
    def load(
        cls,
        adapters: Sequence[str | os.PathLike[str]],
        *,
        model_name_or_path: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        allow_other_base: bool = False,
    ) -> AdapterComparison:
        """Load the base model of some adapters, and the adapters.

        Args:
            adapters: as in the constructor.
            model_name_or_path: the base: a folder or a name on the Hub; `None`: the one that the adapters name.
            revision: branch, tag or commit of the base on the Hub; `None`: the one that the first adapter names.
            dtype: `"auto"` (the checkpoint's), `"float32"`, `"bfloat16"` or `"float16"`.
            trust_remote_code: run the code that comes with the base. Read that code first.
            allow_other_base: as in the constructor.

        Raises:
            ValueError: as in the constructor, and if the adapters name no base or several.
            OSError: if the base or its tokenizer cannot be loaded.
        """
        folders = _named(adapters)
        if model_name_or_path is None:
            model_name_or_path = _common_base(folders)
            revision = revision or PeftConfig.from_pretrained(next(iter(folders.values()))).revision
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        model, tokenizer = load_model(model_name_or_path, dtype, **source)
        return cls(model, tokenizer, adapters, allow_other_base=allow_other_base)

    # ------------------------------------------------------------------ adapters

    @property
    def names(self) -> list[str]:
        """The names of the adapters."""
        return list(self.folders)

    @property
    def base_name(self) -> str:
        """The name or folder of the base."""
        return str(getattr(self._base, "name_or_path", "") or type(self._base).__name__)

    def own_scale(self, name: str) -> float | None:
        """Return the scale that an adapter was saved with; `None` for methods other than LocFT, which have none."""
        return self._own_scales[name]

    def _template_arguments(self, names: Sequence[str]) -> dict[str, Any] | None:
        """Return the arguments of the chat template that the first of some adapters was trained with."""
        run = read_provenance(Path(self.folders[names[0]])).run if names else None
        return None if run is None else run.chat_template_kwargs

    def trained_in_chat(self, names: Sequence[str] | None = None) -> bool:
        """Return whether adapters (`None`: all) were trained with the chat template, as their provenance says.

        Raises:
            ValueError: if some were and some were not.
        """
        recorded = {name: recorded_chat_template(self.folders[name]) for name in self._known(names)}
        if len(set(recorded.values())) > 1:
            trained = ", ".join(f"{name} {'with' if found else 'without'}" for name, found in recorded.items())
            raise ValueError(
                f"The adapters were trained differently: {trained} the chat template. Pass chat_template=True or "
                "False (--chat_template or --no_chat_template), or try one adapter at a time."
            )
        return all(recorded.values())

    # ------------------------------------------------------------------ questions

    def ask(
        self,
        question: str,
        names: Sequence[str] | None = None,
        *,
        together: bool = False,
        scale: float | None = None,
        chat_template: bool | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> ComparedAnswers:
        """Answer one question; see `ask_all`."""
        options: dict[str, Any] = {"together": together, "scale": scale, "chat_template": chat_template}
        return self.ask_all([question], names, max_new_tokens=max_new_tokens, **options)[0]

    def ask_all(
        self,
        questions: Sequence[str],
        names: Sequence[str] | None = None,
        *,
        together: bool = False,
        scale: float | None = None,
        chat_template: bool | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> list[ComparedAnswers]:
        """Answer questions greedily: the base, each adapter alone, and all of them together.

        Args:
            questions: prompts to continue, or what a user says in chat.
            names: the adapters to ask; `None`: all.
            together: also answer with these adapters at once; their deltas add up.
            scale: strength of the deltas in place of the adapters' own scale; 0 gives the base.
            chat_template: ask as a user in chat; `None`: as the adapters were trained, see `trained_in_chat`.
            max_new_tokens: the largest number of tokens in an answer; fewer where the model's positions end.

        Raises:
            ValueError: if a question is blank or too long for the model, an adapter is unknown or has no scale, the
                tokenizer has no chat template, or the adapters were trained differently.
            FloatingPointError: if the logits are NaN or infinite.
        """
        blank = [number for number, question in enumerate(questions, start=1) if not question.strip()]
        if blank:
            raise ValueError(f"Question {blank[0]} is empty; expected text.")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: expected 1 or more.")
        names = self._known(names)
        if chat_template is None:
            chat_template = self.trained_in_chat(names)
        arguments = self._template_arguments(names) if chat_template else None
        prompts = encode_prompts(
            questions, self.tokenizer, chat_template=chat_template, chat_template_kwargs=arguments
        )
        # a short answer is better than none; a prompt that does not fit is refused below
        most = max_length(self._base) or sys.maxsize
        lengths = [max(1, min(max_new_tokens, most - len(ids))) for ids in prompts]
        asked = [
            Question(tuple(ids), num_stops=UNTIL_EOS, max_new_tokens=length)
            for ids, length in zip(prompts, lengths, strict=True)
        ]
        with self._lock:
            check_fits(self._model, asked, self.tokenizer)
            with self._scaled(names, scale):
                base = self._answers_of_base(asked)
                edited = {name: self._answers_of([name], asked, name) for name in names}
                if together:
                    edited[TOGETHER] = self._answers_of(names, asked, TOGETHER)
        return [
            ComparedAnswers(question, base[number], {name: answers[number] for name, answers in edited.items()})
            for number, question in enumerate(questions)
        ]

    def _answers_of(self, names: Sequence[str], asked: Sequence[Question], label: str) -> list[ModelAnswer]:
        adapter_names = [self._adapter_names[name] for name in names]
        if len(adapter_names) == 1:
            self._model.set_adapter(adapter_names[0], inference_mode=True)
        else:
            self._model.base_model.set_adapter(adapter_names, inference_mode=True)
        return self._answers(asked, label)

    def _answers_of_base(self, asked: Sequence[Question]) -> list[ModelAnswer]:
        new = [question for question in dict.fromkeys(asked) if question not in self._base_answers]
        with as_base(self._model):
            answers = self._answers(new, BASE)
        if len(self._base_answers) > MOST_REMEMBERED:
            self._base_answers = {question: self._base_answers[question] for question in asked if question not in new}
        self._base_answers |= zip(new, answers, strict=True)
        return [self._base_answers[question] for question in asked]

    def _answers(self, asked: Sequence[Question], label: str) -> list[ModelAnswer]:
        answers = generate_and_score(self._model, self.tokenizer, asked, label=label)
        end_ids = end_token_ids(self.tokenizer, self._model)
        return [self._in_words(answer, end_ids) for answer in answers]

    def _in_words(self, answer: Answer, end_ids: frozenset[int]) -> ModelAnswer:
        text = self.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        return ModelAnswer(str(text).strip(), answer.token_ids[-1] in end_ids)

    # ------------------------------------------------------------------ new edits

    def learn(self, name: str, edit: Edit, output_dir: str | os.PathLike[str]) -> LearnedEdit:
        """Train one more edit, save the adapter that has it, and use that from now on.

        An adapter that ships its edits is trained on, with the new edit beside its own, by the recipe of its
        training. Without its edits it would lose them: the new edit then goes into an adapter of its own, at the same
        location, named `"added edits"`.

        Args:
            name: the adapter.
            edit: the new edit; a prompt that the adapter knows gets the new target.
            output_dir: folder for the new adapter. The old folder is not changed.

        Raises:
            ValueError: if the adapter is unknown, or the trainer refuses the edit. The comparison is as before.
            RuntimeError: if the loss becomes NaN or infinite; likewise.
        """
        (name,) = self._known([name])
        with self._lock:
            if not has_edits(self.folders[name]) and ADDED in self.folders:
                name = ADDED
            folder = self.folders[name]
            begun = time.perf_counter()
            self._base = self._model.unload()
            try:
                if has_edits(folder):
                    num_edits = train_on(self._base, self.tokenizer, folder, edit, output_dir)
                else:
                    num_edits = train_beside(self._base, self.tokenizer, folder, edit, output_dir)
                    name = ADDED
                self.folders[name] = os.fspath(output_dir)
            finally:
                self._attach()
            seconds = time.perf_counter() - begun
            answer = self.ask(edit.prompt, [name], max_new_tokens=MAX_NEW_TOKENS).edited[name]
        return LearnedEdit(edit, name, Path(output_dir), num_edits, answer, seconds)

    # ------------------------------------------------------------------ the model

    def _attach(self) -> None:
        """Put the adapters onto the base."""
        # PEFT's names of adapters may have no dots
        self._adapter_names = {name: f"adapter_{number}" for number, name in enumerate(self.folders)}
        edited = self._base
        for name, folder in self.folders.items():
            if Path(folder).is_dir():
                check_adapter(folder, method=None)
            edited = load_adapter(edited, folder, self._adapter_names[name])
        self._model = edited
        check_base(edited, self.allow_other_base)
        configs = {name: edited.peft_config[adapter] for name, adapter in self._adapter_names.items()}
        self._own_scales = {
            name: config.scale if config.peft_type == "LOCFT" else None for name, config in configs.items()
        }

    def _known(self, names: Sequence[str] | None) -> list[str]:
        unknown = [name for name in names or [] if name not in self.folders]
        if unknown:
            raise ValueError(f"found no adapter {unknown[0]!r}; expected one of {', '.join(self.folders)}.")
        return list(self.folders if names is None else names)

    @contextmanager
    def _scaled(self, names: Sequence[str], scale: float | None) -> Iterator[None]:
        """Set the scale of adapters for a while."""
        without = [name for name in names if self._own_scales[name] is None]
        if scale is not None and without:
            raise ValueError(f"scale={scale:g}: {without[0]} is no LocFT adapter and has no scale. Leave it out.")
        try:
            for name in names if scale is not None else ():
                self._model.base_model.set_scale(self._adapter_names[name], scale)
            yield
        finally:
            for name in names if scale is not None else ():
                self._model.base_model.set_scale(self._adapter_names[name], self._own_scales[name])


def recorded_chat_template(adapter: str | os.PathLike[str]) -> bool:
    """Return whether an adapter was trained with the chat template; `False` if its provenance does not say."""
    # an adapter on the Hub is not a local folder: its run is unknown
    run = read_provenance(Path(adapter)).run
    # "both" has trained it as plain text too: what people type into a chat model is chat
    return run is not None and run.recipe.get("chat_template") in (True, "on", "both")


def _named(adapters: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """Return the adapters by short names, if these differ; else by what they are given as."""
    folders = list(dict.fromkeys(os.fspath(adapter) for adapter in adapters))
    if not folders:
        raise ValueError("AdapterComparison: found no adapter; expected at least one.")
    short = [Path(folder).resolve().name for folder in folders]
    distinct = len(set(short)) == len(short) and not {BASE, TOGETHER} & set(short)
    return dict(zip(short if distinct else folders, folders, strict=True))


def _common_base(folders: dict[str, str]) -> str:
    bases = {name: base_of(folder) for name, folder in folders.items()}
    if len(set(bases.values())) > 1:
        found = ", ".join(f"{base} of {name}" for name, base in bases.items())
        raise ValueError(f"The adapters name several base models: {found}. Pass model_name_or_path.")
    return next(iter(bases.values()))
