"""Edits from records, whatever data set they are from: prompt, target, rephrasings, probes and what they are about."""

import contextlib
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from .column_names import (
    ONE_TEXT,
    PARAPHRASES,
    REPHRASING,
    TARGET_ALIASES,
    find_vocabulary,
    vocabularies,
)
from .data_sets import Fields, edited_record, records_of
from .edit_types import PROBE_FIELDS, Edit, Message, Probe, probes_of, same_text
from .field_values import first_text, is_absent, right_answers, text, texts, unpacked
from .languages import language_code
from .probe_fields import nested, probes_of_record
from .record_fields import Record

# prompt, target, aliases of the target, and the messages before the prompt
Written = tuple[str, str, tuple[str, ...], tuple[Message, ...] | None]


class EditReader:
    """Reads edits from records of one data set.

    Args:
        rows: the records with their places; what is no record is ignored.
        language: the language to edit, where a record is in several; `None`: English, or else the first.

    Attributes:
        left_out: how many records have a field that looks like a part of an edit and is not read, by its name.

    Raises:
        ValueError: if the columns of prompt and target are not recognized.
    """

    def __init__(self, rows: Sequence[tuple[str, Any]], language: str | None = None) -> None:
        self.language = language
        self.left_out: Counter[str] = Counter()
        self._edited: dict[int, tuple[Mapping[str, Any], dict[str, Fields]]] = {}
        for _, row in rows:
            if isinstance(row, Mapping):
                with contextlib.suppress(ValueError):  # `edits` says so, with its place
                    self._edited[id(row)] = edited_record(row, language)
        self.vocabulary = find_vocabulary(rows[0][0], [own for own, _ in self._edited.values()]) if rows else ()

    def edits(self, row: Mapping[str, Any], place: str) -> list[Edit]:
        """Return the edits of a record: several if it rewrites several facts.

        Raises:
            ValueError: if it cannot be read; it says the field, what was found and what was expected.
        """
        own, others = self._edited.get(id(row)) or edited_record(row, self.language)
        missing = [column for column in self.vocabulary if column not in own]
        if missing:
            found = f"found only {', '.join(map(str, own))}"
            raise ValueError(f"field {missing[0]!r}: {found}; expected it in every record: add it, or fix its name")
        edits = [*self._of_record(own, self.vocabulary, place)]
        for code, other in others.items():
            known = vocabularies(other.keys())
            if len(known) == 1:
                (spoken,) = self._of_record(other, known[0], place)
                edits[-1] = _with_translation(edits[-1], spoken, code)
        return edits

    def _of_record(self, row: Mapping[str, Any], vocabulary: tuple[str, ...], place: str) -> Iterator[Edit]:
        for fields in records_of(row, vocabulary):
            names = vocabulary if fields is row else ("prompt", "target")
            record = Record(fields, self.left_out)
            edit = _edit(record, names, place)
            yield edit
            record.note_unread(set(map(same_text, _texts_of(edit))))


def _texts_of(edit: Edit) -> Iterator[str]:
    probes = [probe for _, probe in probes_of(edit)]
    yield from (edit.prompt, *edit.right_answers, *edit.rephrasings, *edit.paraphrases)
    yield from chain.from_iterable((probe.prompt, *probe.right_answers, *probe.choices) for probe in probes)
    yield from filter(None, (edit.subject, edit.relation, edit.ground_truth, edit.language))


def _with_translation(edit: Edit, other: Edit, language: str) -> Edit:
    """Return an edit that is asked in another language, too."""
    asked = [Probe(other.prompt, other.target, aliases=other.aliases)]
    asked += [Probe(each, other.target, aliases=other.aliases, kind="rephrasing") for each in other.rephrasings]
    asked += [replace(probe, kind=probe.kind or "portability") for probe in other.portability]
    found: dict[str, Any] = {
        name: (*getattr(edit, name), *(replace(probe, language=language) for probe in getattr(other, name)))
        for name in ("locality", "belief", "sub_questions")
    }
    found["cross_lingual"] = (*edit.cross_lingual, *(replace(probe, language=language) for probe in asked))
    return replace(edit, **found)


def _edit(record: Record, vocabulary: tuple[str, ...], place: str) -> Edit:
    prompt, target, aliases, history = _prompt_and_target(record, vocabulary)
    for name in TARGET_ALIASES:
        if name in record:
            aliases += right_answers(record[name], name)
    about: dict[str, Any] = {field: _one_text(record, names, vocabulary) for field, names in ONE_TEXT.items()}
    subject = about["subject"]
    if subject is not None and "{}" in prompt:
        prompt = prompt.replace("{}", subject)
    if about["language"] is not None:
        about["language"] = language_code(about["language"]) or about["language"]
    probes = probes_of_record(record, prompt, target, subject)
    rephrasings = [*chain.from_iterable(_rephrasings(record, name, vocabulary) for name in record)]
    for probe in probes.pop("generality", []):
        if probe.answer is None or same_text(probe.answer) == same_text(target):
            rephrasings.append(probe.prompt)
        else:
            probes.setdefault("portability", []).append(replace(probe, kind=probe.kind or "generality"))
    probes["portability"] = [
        replace(probe, answer=target) if probe.kind == "persona" and probe.answer is None else probe
        for probe in probes.get("portability", [])
    ]
    fields: dict[str, Any] = {name: tuple(dict.fromkeys(probes.get(name, ()))) for name in PROBE_FIELDS}
    return Edit(
        prompt,
        target,
        history=history,
        aliases=tuple(alias for alias in dict.fromkeys(aliases) if alias != target),
        rephrasings=tuple(dict.fromkeys(rephrasings)),
        paraphrases=texts(record.get(PARAPHRASES), PARAPHRASES),
        source=place,
        **fields,
        **about,
    )


def _rephrasings(record: Record, name: str, vocabulary: tuple[str, ...]) -> Iterator[str]:
    if name == PARAPHRASES or name in vocabulary or not REPHRASING.fullmatch(name):
        return
    for item in _items(record[name]):
        if isinstance(item, Mapping):
            yield from (probe.prompt for probe in nested(record, item, name))
        elif not is_absent(item):
            yield text(item, name)


def _items(value: Any) -> Sequence[Any]:
    value = unpacked(value)
    return value if isinstance(value, (list, tuple)) else [value]


def _one_text(record: Record, names: Sequence[str], vocabulary: tuple[str, ...]) -> str | None:
    """Return the first text of the first column that is filled.

    The answer before the edit may be the output of the one model that a data set was made for.
    """
    for name in names:
        if name in record and name not in vocabulary:
            found = first_text(record[name], name)
            if found is not None:
                return found
    outputs = [name for name in record if name.startswith("output_")] if "ground_truth" in names else []
    return first_text(record[outputs[0]], outputs[0]) if len(outputs) == 1 else None


def _prompt_and_target(record: Record, vocabulary: tuple[str, ...]) -> Written:
    """Return the prompt, the target, its aliases and, of a conversation, the messages before the prompt."""
    values = [_messages(record[column]) for column in vocabulary]
    if len(vocabulary) == 2 and not isinstance(values[0], (list, tuple)) and not _are_messages(values[1]):
        prompt, right = text(values[0], vocabulary[0]), right_answers(values[1], vocabulary[1], is_target=True)
        return prompt, right[0] if right else text(values[1], vocabulary[1]), right[1:], None
    *history, (_, prompt), (_, target) = conversation(values, vocabulary)
    return prompt, target, (), tuple(Message(*message) for message in history)


def _messages(value: Any) -> Any:
    """Return the messages that a program has written as text; other values as they are."""
    found = unpacked(value)
    return found if _are_messages(found) else value


def _are_messages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(each, Mapping) and "content" in each for each in value)


def conversation(values: Sequence[object], names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the role and the text of every message in one or two fields, the answer last.

    Args:
        values: the whole conversation; or a prompt and its answer, each a list of messages or a text.
        names: the fields.
    """
    found: list[tuple[str, str]] = []
    for value, name, role in zip(values, names, ("user", "assistant"), strict=False):
        messages = value if isinstance(value, (list, tuple)) else [{"role": role, "content": value}]
        found += [_message(message, name) for message in messages]
    roles = [role for role, _ in found]
    if roles[-2:] != ["user", "assistant"]:
        raise ValueError(
            f"field {names[0]!r}: found messages with the roles {', '.join(roles) or 'of nobody'}; expected a "
            "conversation whose last two are the user's and the assistant's: the last is the target of the edit"
        )
    return found


def _message(message: object, name: str) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        expected = 'expected messages such as {"role": "user", "content": "…"}'
        raise ValueError(f"field {name!r}: found {reprlib.repr(message)}; {expected}")
    return text(message.get("role"), f"{name}.role"), text(message.get("content"), f"{name}.content")
