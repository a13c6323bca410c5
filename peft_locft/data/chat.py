"""Prompts in a tokenizer's chat template: when it is used, what it writes around prompts, and what before answers."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from .edits import Edit, Message, Prompt, place_of, prompt_of
from .joining import TargetSeparator

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ChatTemplate = Literal["auto", "on", "off", "both"]

ADVICE = "set tokenizer.chat_template, or pass chat_template='off'"
MARK = "locft_written_form"
ANSWER = "the answer whose place is looked for"
# what opens thoughts, at the end of a generation prompt: <think>, [THINK], <|START_THINKING|>
OPENED = re.compile(r"[<\[]\|?(?:START_)?(\w+)\|?[>\]]\s*\Z")
TAG = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*\Z")


def chat_template_mode(value: object, where: str = "chat_template") -> ChatTemplate:
    """Return a setting as one of `"auto"`, `"on"`, `"off"`, `"both"`; `True` is `"on"`, `False` is `"off"`.

    Args:
        value: the setting; the words `"true"` and `"false"` of a command line or a YAML file count too.
        where: its name, for the message.

    Raises:
        ValueError: if it is something else.
    """
    word = str(value).lower()
    word = {"true": "on", "false": "off"}.get(word, word)
    for known in get_args(ChatTemplate):
        if word == known:
            return known
    raise ValueError(f"{where}={value!r}: expected one of {', '.join(get_args(ChatTemplate))}.")


def template_arguments(value: Any, where: str = "chat_template_kwargs") -> dict[str, Any] | None:
    """Return the arguments of a chat template, given as a dictionary or as JSON.

    Args:
        value: the arguments; `None`: none are given.
        where: the name of the setting, for the message.

    Raises:
        ValueError: if it is something else, or an argument is one that this package sets.
    """
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        expected = 'expected arguments by name, such as {"enable_thinking": false} on a command line'
        raise ValueError(f"{where}: found {value!r}; {expected}.")
    taken = sorted({"tokenize", "add_generation_prompt", "continue_final_message", "conversation"} & set(value or ()))
    if taken:
        raise ValueError(f"{where}: found {taken[0]!r}, which is set for you: leave it out.")
    return None if value is None else dict(value)


def choose_chat_template(
    value: object,
    edits: Sequence[Edit],
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """Return what `"auto"` means for these edits: `"both"` if the tokenizer has a chat template, else `"off"`.

    Edits that are all conversations are written with the template alone, so they give `"on"`. A template that cannot
    write one question and its answer is not used. Any other setting than `"auto"` is returned as it is.

    Args:
        value: a setting, see [`chat_template_mode`].
        edits: the edits.
        tokenizer: the model's tokenizer.
        template_kwargs: arguments of the template.

    Raises:
        ValueError: as in `chat_template_mode`, or if the template does not have these arguments.
    """
    mode = chat_template_mode(value)
    if mode != "auto":
        return mode
    if edits and all(edit.history is not None for edit in edits):
        return "on"
    if not tokenizer.chat_template:
        return "off"
    writer = ChatWriter(tokenizer, template_kwargs or {})
    try:
        writer.prompt(Prompt("Who?"))
    except ValueError as error:
        logger.warning("Edits are written as plain text, since %s", error)
        return "off"
    return "both"


def in_chat(edit: Edit) -> Edit:
    """Return an edit as a conversation: as it is, or one that its prompt begins."""
    return edit if edit.history is not None else replace(edit, history=())


def in_forms(edits: Iterable[Edit], chat_template: bool | str) -> list[Edit]:
    """Return each edit in the forms of a setting: as text, as a conversation, or as both, one after the other.

    A conversation has one form only, whatever the setting.

    Args:
        edits: the edits.
        chat_template: `"on"`, `"off"` or `"both"`.
    """
    mode = chat_template_mode(chat_template)
    return [form for edit in edits for form in _forms(edit, mode)]


def _forms(edit: Edit, chat_template: ChatTemplate) -> tuple[Edit, ...]:
    if edit.history is not None or chat_template == "off":
        return (edit,)
    return (in_chat(edit),) if chat_template == "on" else (edit, in_chat(edit))


def prompts_in_forms(prompts: Iterable[str | Prompt], chat_template: bool | str) -> list[Prompt]:
    """Return each prompt in the forms of a setting, as `in_forms` returns edits."""
    asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    edits = [Edit(prompt=prompt.text, target=ANSWER, history=prompt.history) for prompt in asked]
    return [prompt_of(edit) for edit in in_forms(edits, chat_template)]


class WrittenForm(NamedTuple):
    """How edits are written in a training run: the settings that an evaluation takes over."""

    chat_template: ChatTemplate = "auto"
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({})
    target_separator: TargetSeparator = "auto"


def written_form(trained: Any) -> WrittenForm:
    """Return how a recipe or a recorded run writes edits; it has the three settings of [`WrittenForm`]."""
    template_kwargs = dict(trained.chat_template_kwargs or {})
    return WrittenForm(chat_template_mode(trained.chat_template), template_kwargs, trained.target_separator)


def mark_form(model: nn.Module, trained: Any) -> None:
    """Store on a model how its edits were written, for evaluations in this process.

    Args:
        model: gets an attribute, which is not saved.
        trained: a recipe or a recorded run.
    """
    setattr(model, MARK, written_form(trained))


def marked_form(model: nn.Module) -> WrittenForm:
    """Return what [`mark_form`] has stored on a model; settings that leave all open if it has stored nothing."""
    found: WrittenForm = getattr(model, MARK, WrittenForm())
    return found


class WrittenEdit(NamedTuple):
    """An edit as the text of a conversation.

    Args:
        text: the whole.
        boundary: where the model begins to answer, in characters.
        end: end of the target, in characters; the template closes the turn after it.
    """

    text: str
    boundary: int
    end: int


@dataclass
class ChatWriter:
    """Writes conversations with a tokenizer's chat template.

    A prompt is all that stands before its answer: what the template ends a prompt with for generation, and what it
    writes in front of the answer itself, such as an empty block of thoughts or the header of a channel. Where the
    template begins the answer's thoughts for the model, they are closed.

    Args:
        tokenizer: a tokenizer with a chat template.
        template_kwargs: arguments of the template, such as `{"enable_thinking": False}`.
    """

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    _closing: str | None = None

    def __post_init__(self) -> None:
        template = self.tokenizer.chat_template
        if template is None:
            raise ValueError(
                "tokenizer: found no chat template; set tokenizer.chat_template, or pass chat_template='off'"
            )
        unknown = [name for name in self.template_kwargs if not re.search(rf"\b{re.escape(name)}\b", str(template))]
        if unknown:
            raise ValueError(
                f"chat_template_kwargs: found {unknown[0]!r}, which the chat template does not use; expected the name "
                "of a variable in tokenizer.chat_template: fix it, or leave it out."
            )

    def prompt(self, prompt: Prompt) -> str:
        """Return the text up to the answer.

        Raises:
            ValueError: if the template fails, or leaves out the prompt or the answer.
        """
        written = self._write(prompt, ANSWER, repr(prompt.text))
        return written.text[: written.boundary]

    def edit(self, edit: Edit) -> WrittenEdit:
        """Return an edit as text.

        Raises:
            ValueError: as in `prompt`, or if the template changes the target.
        """
        return self._write(prompt_of(edit), edit.target, place_of(edit))

    def _write(self, prompt: Prompt, target: str, place: str) -> WrittenEdit:
        head, whole = self._render(prompt), self._render(prompt, target)
        if self._closing is None:
            # a search for the target would also find "end" in "<|im_end|>"
            self._closing = self._render(prompt, ANSWER).rpartition(ANSWER)[2]
        end = len(whole) - len(self._closing)
        begin = _begin_of(target, whole[:end]) if whole.endswith(self._closing) else None
        if begin is None:
            found = f"the chat template gives {whole!r}; expected the target {target!r} as the last answer"
            raise ValueError(f"{place}: {found}: {ADVICE}")
        return _joined(head, whole, begin, end)

    def answer_mark(self, prompt: Prompt) -> str | None:
        """Return the tag after which the template begins an answer, such as that which ends thoughts, if there is one.

        Raises:
            ValueError: as in `prompt`.
        """
        before = self.prompt(prompt)[len(self._render(prompt)) :]
        tag = TAG.search(before)
        return tag[1] if tag else None

    def _render(self, prompt: Prompt, target: str | None = None) -> str:
        turns = [*(prompt.history or ()), Message("user", prompt.text)]
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        if target is not None:
            messages.append({"role": "assistant", "content": target})
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=target is None, tokenize=False, **self.template_kwargs
            )
        except Exception as error:  # a template can raise errors of its own, and any error of Python's
            after = (
                "" if prompt.history is None else f" after {len(prompt.history)} messages" if prompt.history else ""
            )
            found = f"the chat template fails for a user's turn{after}{'' if target is None else ' and an answer'}"
            raise ValueError(f"{prompt.text!r}: {found}: {error}; {ADVICE}") from error
        text = str(rendered)
        if prompt.text.strip() not in text:
            raise ValueError(f"{prompt.text!r}: the chat template gives {text!r}, which lacks the prompt; {ADVICE}")
        return text


def _begin_of(target: str, text: str) -> int | None:
    """Return where a target begins that ends a text, as it is or trimmed by the template; `None` if it does not."""
    for one, other in ((target, text), (target.strip(), text.rstrip())):
        if other.endswith(one):
            return len(other) - len(one)
    return None


def _joined(head: str, whole: str, begin: int, end: int) -> WrittenEdit:
    """Return the whole text, with the prompt for generation at its beginning.

    Args:
        head: the prompt for generation.
        whole: the conversation with the answer.
        begin: where the answer begins in `whole`.
        end: where it ends.
    """
    before = whole[:begin]
    if before.startswith(head):
        # a token often takes in the space before a word, so that space belongs to the answer
        boundary = max(len(head), len(before.rstrip(" ")))
        return WrittenEdit(whole, boundary, end)
    # the prompt for generation has more than a finished turn, such as the tag that opens thoughts
    same = next(n for n in range(len(head)) if head[n] != before[n : n + 1])
    opened = OPENED.search(head[same:])
    if opened:
        tag = opened[0].strip()
        closes = tag.replace("START", "END") if "START" in tag else tag[0] + "/" + tag[1:]
        head = f"{head.rstrip()}\n\n{closes}\n\n"
    return WrittenEdit(head + whole[begin:], len(head), len(head) + end - begin)
