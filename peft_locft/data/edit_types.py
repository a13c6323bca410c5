"""Edits and their probes: the classes, their checks, how edits are hashed, written and told apart."""

import hashlib
import json
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from .field_values import optional_text, text

# characters that are neither seen nor read: soft hyphen, zero-width space, marks of direction, byte order mark
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")


@dataclass(frozen=True, slots=True)
class Probe:
    """A question that tests what an edit changes elsewhere.

    Args:
        prompt: the question; not empty.
        answer: the expected answer, not empty; None if unknown.
        aliases: other right answers.
        kind: what it asks, where the data set says so: `"yes_no"`, `"negation"`, `"multiple_choice"`, `"reversed"`,
            `"either_or"`, `"multi_hop"`, `"same_subject"`, `"same_relation"` or a name of the data set; `""`: not
            said.
        choices: the possible answers, `answer` among them; `()`: any answer.
        language: the code of its language, such as `"zh"`; None if not said.

    Raises:
        ValueError: if a text is empty or a field has another type; if there are aliases without an answer, or the
            answer is not among the choices.
    """

    prompt: str
    answer: str | None = None
    _: KW_ONLY
    aliases: tuple[str, ...] = ()
    kind: str = ""
    choices: tuple[str, ...] = ()
    language: str | None = None

    def __post_init__(self) -> None:
        text(self.prompt, "prompt")
        optional_text(self.answer, "answer")
        _check_tuple(self.aliases, str, "aliases")
        _check_tuple(self.choices, str, "choices")
        if not isinstance(self.kind, str):
            raise ValueError(f"field 'kind': found {reprlib.repr(self.kind)}; expected text, or '' if it is not said")
        optional_text(self.language, "language")
        if self.aliases and self.answer is None:
            raise ValueError(f"field 'aliases': found {reprlib.repr(self.aliases)} without an answer; expected both")
        if self.choices and self.answer is not None and self.answer not in self.choices:
            found = f"found {reprlib.repr(self.choices)} without the answer {self.answer!r}"
            raise ValueError(f"field 'choices': {found}; expected it among them")

    @property
    def right_answers(self) -> tuple[str, ...]:
        """The answer and its aliases; `()` if no answer is known."""
        return () if self.answer is None else (self.answer, *self.aliases)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Args:
        role: `"system"`, `"user"`, `"assistant"`, or another role that the model's chat template knows.
        content: its text; not empty.

    Raises:
        ValueError: if `role` or `content` is empty or not text.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        text(self.role, "role")
        text(self.content, "content")


class Prompt(NamedTuple):
    """What a model is asked.

    Args:
        text: the text; in a conversation, the last message of the user.
        history: the messages before it, such as a system prompt; `()` if it begins the conversation. `None`: it is no
            conversation, so no chat template is put around it.
    """

    text: str
    history: tuple[Message, ...] | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """One fact to write into a model: the edited model continues `prompt` with `target`.

    Args:
        prompt: input of the model; not empty.
        target: the new answer; not empty.
        aliases: other right forms of the target: accepted by the evaluation, never trained on.
        rephrasings: other prompts with the same meaning, to measure generalization; never trained on.
        paraphrases: other prompts with the same meaning, to train on; never evaluated.
        locality: questions whose answers must not change.
        portability: questions whose answers follow from the edit; those of several steps have the kind `"multi_hop"`.
        belief: questions of belief that the data set words itself, such as "Is it true that …?".
        cross_lingual: questions in another language than the prompt, whose answers follow from the edit.
        sub_questions: questions about parts of a long target.
        subject: what the fact is about.
        relation: what it says of the subject, such as "capital" or a property of Wikidata.
        ground_truth: the answer before the edit.
        language: the code of the prompt's language, such as `"zh"`; None if not said.
        history: the messages of the conversation before `prompt`, such as a system prompt; `()` if `prompt` begins it.
            The edit is then always written with the model's chat template, and so are its rephrasings and probes,
            after the same messages. `None`: no conversation.
        source: where the edit was read ("zsre.json:12"), for messages; ignored when edits are compared.

    Raises:
        ValueError: if a text is empty, or a field has another type.

    Example:
        >>> Edit("The capital of France is", "Lyon", rephrasings=("France's capital city is",))
    """

    prompt: str
    target: str
    _: KW_ONLY
    rephrasings: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    subject: str | None = None
    ground_truth: str | None = None
    history: tuple[Message, ...] | None = None
    aliases: tuple[str, ...] = ()
    belief: tuple[Probe, ...] = ()
    cross_lingual: tuple[Probe, ...] = ()
    sub_questions: tuple[Probe, ...] = ()
    relation: str | None = None
    language: str | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        text(self.prompt, "prompt")
        text(self.target, "target")
        for name in TEXT_FIELDS:
            _check_tuple(getattr(self, name), str, name)
        for name in PROBE_FIELDS:
            _check_tuple(getattr(self, name), Probe, name)
        if self.history is not None:
            _check_tuple(self.history, Message, "history")
        for name in ("subject", "ground_truth", "relation", "language"):
            optional_text(getattr(self, name), name)

    @property
    def right_answers(self) -> tuple[str, ...]:
        """The target and its aliases."""
        return (self.target, *self.aliases)


# the fields of several texts, and those of probes
TEXT_FIELDS = ("rephrasings", "paraphrases", "aliases")
PROBE_FIELDS = ("locality", "portability", "belief", "cross_lingual", "sub_questions")


def _check_tuple(items: object, kind: type, name: str) -> None:
    if not isinstance(items, tuple) or not all(isinstance(item, kind) for item in items):
        raise ValueError(f"field {name!r}: found {reprlib.repr(items)}; expected a tuple of {kind.__name__}")
    if kind is str:
        for item in items:
            text(item, name)


def edits_sha256(edits: Iterable[Edit]) -> str:
    """Return the sha256 of edits as 64 hexadecimal digits: of one line of JSON per edit, without `source`.

    The order of the edits counts. Fields that were added later are left out where they say nothing, so that the hash
    of an edit without them is what it was before.
    """
    digest = hashlib.sha256()
    for edit in edits:
        digest.update(json.dumps(_hashed(edit), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


ALWAYS_HASHED = ("rephrasings", "locality", "portability", "subject", "ground_truth", "answer")


def _hashed(item: Any) -> Any:
    if isinstance(item, tuple):
        return [_hashed(each) for each in item]
    if not isinstance(item, (Edit, Probe, Message)):
        return item
    values = ((spec, getattr(item, spec.name)) for spec in fields(item) if spec.compare)
    return {spec.name: _hashed(value) for spec, value in values if spec.name in ALWAYS_HASHED or value != spec.default}


def edit_record(edit: Edit) -> dict[str, Any]:
    """Return an edit as a record that `read_edits` reads back, without empty fields and `source`.

    The prompt of a conversation is the list of its messages.
    """
    record = _filled(edit)
    if edit.history is not None:
        del record["history"]
        record["prompt"] = [*map(asdict, edit.history), {"role": "user", "content": edit.prompt}]
    return record


def edit_lines(edits: Iterable[Edit]) -> str:
    """Return edits as JSON, one record of [`edit_record`][peft_locft.data.edit_types.edit_record] per line."""
    return "".join(json.dumps(edit_record(edit), ensure_ascii=False) + "\n" for edit in edits)


def _filled(item: Edit | Probe) -> dict[str, Any]:
    values = {spec.name: getattr(item, spec.name) for spec in fields(item) if spec.compare}
    return {
        name: [_filled(each) if isinstance(each, Probe) else each for each in value]
        if isinstance(value, tuple)
        else value
        for name, value in values.items()
        if value or (name == "history" and value is not None)
    }


def same_text(text: str) -> str:
    """Return a text in the form in which prompts and targets identify an edit: two with one form are the same text.

    Characters are composed (Unicode's NFC), invisible ones are left out, and every run of whitespace is one space. It
    is only compared: an edit is trained as it was written. Letters that look different, such as full-width ones, are
    different.

    Example:
        >>> same_text("The  capital of Peru is ")
        'The capital of Peru is'
    """
    return " ".join(INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def fold_case(text: str) -> str:
    """Return a text in lower case in the form of `same_text`, in which trained and evaluated prompts are compared."""
    return same_text(unicodedata.normalize("NFD", text).casefold())


def prompt_of(edit: Edit) -> Prompt:
    """Return the prompt of an edit, with the messages before it."""
    return Prompt(edit.prompt, edit.history)


def prompt_identity(edit: Edit) -> Prompt:
    """Return the prompt of an edit, and the messages before it, in the form of `same_text`: what identifies it."""
    history = edit.history
    if history is not None:
        history = tuple(Message(message.role, same_text(message.content) or message.content) for message in history)
    return Prompt(same_text(edit.prompt), history)


def probes_of(edit: Edit) -> Iterator[tuple[str, Probe]]:
    """Yield every probe of an edit with the name of its field."""
    for name in PROBE_FIELDS:
        for probe in getattr(edit, name):
            yield name, probe


def without_questions(edit: Edit) -> Edit:
    """Return an edit without its rephrasings and probes."""
    nothing: dict[str, Any] = dict.fromkeys(PROBE_FIELDS, ())
    return replace(edit, rephrasings=(), **nothing)


def prompts_of(edit: Edit) -> Iterator[str]:
    """Yield every prompt of an edit: its own, its paraphrases, rephrasings and probes."""
    yield edit.prompt
    yield from edit.paraphrases
    yield from edit.rephrasings
    yield from (probe.prompt for _, probe in probes_of(edit))


def place_of(edit: Edit) -> str:
    """Return where an edit was read, or its prompt, for messages."""
    return edit.source or repr(edit.prompt)
