"""The probes in a record: in pairs of columns, and nested in lists and mappings of any depth."""

import re
import reprlib
import string
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .column_names import plain_name, probe_column
from .edit_types import Probe
from .field_values import first_text, is_absent, right_answers, text, texts, unpacked
from .record_fields import Record

# the names of a question, its answer and its details in a nested record
PROMPTS = (
    *("prompt", "new_question", "question", "query", "input", "loc", "port", "src", "text", "sub_question", "q"),
    *("prompts", "questions", "queries", "inputs", "cloze"),
)
ANSWERS = (
    *("answer", "new_answer", "ground_truth", "target", "target_new", "loc_ans", "port_ans", "ans", "answers"),
    *("targets", "ground_truths", "label", "output", "alt", "object", "sub_answer", "a", "value", "expected"),
)
ALIASES = ("aliases", "alias", "answer_alias", "answer_aliases", "target_aliases", "new_answer_alias")
CHOICES = ("choices", "options")
LANGUAGES = ("language", "lang")
CHOICE_COLUMNS = ("multiple_choices", "multiple_choice", "choices", "options")
# what stands between a kind and its probes, as in RippleEdits
WRAPPERS = ("test_queries", "queries", "tests", "probes", "items")
KINDS = {
    "reasoning": "multi_hop",
    "compositionality_i": "multi_hop",
    "compositionality_ii": "multi_hop",
    "mhop": "multi_hop",
    "relation_specificity": "same_subject",
    "relation_specifity": "same_subject",
    "neighborhood": "same_relation",
    "neighbourhood": "same_relation",
    "yes": "yes_no",
    "no": "yes_no",
}
YES_NO = ("Yes", "No")


def probes_of_record(record: Record, prompt: str, target: str, subject: str | None) -> dict[str, list[Probe]]:
    """Return the probes of a record by field; those of `"generality"` are rephrasings or portability.

    Args:
        record: a record of one edit.
        prompt: of the edit.
        target: of the edit, the right one of several choices.
        subject: of the edit, to which reversed questions lead.

    Raises:
        ValueError: if they cannot be read; it says the field, what was found and what was expected.
    """
    groups: dict[tuple[str, str, str], dict[str, str]] = {}
    for name in record:
        column = probe_column(name)
        if column is not None:
            groups.setdefault((column.field, column.stem, column.kind), {})[column.word] = name
    found: dict[str, list[Probe]] = {}
    for (field, stem, kind), columns in groups.items():
        kept = [*_probes_of_columns(record, columns, kind)]
        found.setdefault(field, []).extend(_with_default(probe, stem, subject) for probe in kept)
    found.setdefault("belief", []).extend(_multiple_choice(record, prompt, target))
    return found


def _probes_of_columns(record: Record, columns: dict[str, str], kind: str) -> Iterator[Probe]:
    """Yield the probes of columns that share a stem: of the one that is named so, and of a pair."""
    own = columns.get("")
    holds_records = own is not None and _holds_records(record.get(own))
    if own is not None and (holds_records or "prompt" in columns):
        yield from nested(record, record[own], own, kind)
    prompts = columns.get("prompt") or (None if holds_records else own)
    answers, aliases = columns.get("answer"), columns.get("alias")
    if prompts is not None and _holds_records(record.get(prompts)):
        yield from nested(record, record[prompts], prompts, kind)
    elif prompts is not None or answers is not None:
        guessed = prompts or re.sub(r"_?(ans|answers?|ground_truths?|targets?|outputs?|labels?)$", "", answers or "")
        for probe in paired(record, guessed, answers, aliases):
            yield replace(probe, kind=kind)


def _holds_records(value: object) -> bool:
    value = unpacked(value)
    return isinstance(value, Mapping) or (isinstance(value, (list, tuple)) and any(map(_holds_records, value)))


def _with_default(probe: Probe, stem: str, subject: str | None) -> Probe:
    """Return a question of belief with the answer that the name of its column says."""
    if probe.kind == "yes_no" and stem.startswith(("yes", "no")):
        answer = probe.answer or YES_NO[stem.startswith("no")]
        return replace(probe, answer=answer, choices=YES_NO if answer in YES_NO else ())
    if probe.kind == "reversed" and probe.answer is None:
        return replace(probe, answer=subject)
    return probe


def nested(record: Record, value: Any, name: str, kind: str = "") -> Iterator[Probe]:
    """Yield nested probes: from a text, a list, a record, or a mapping of a kind ("Forgetfulness") to any of these.

    Args:
        record: what the field stands in.
        value: of the field.
        name: of the field.
        kind: of the probes that say none.
    """
    value = unpacked(value)
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from nested(record, item, name, kind)
    elif isinstance(value, Mapping):
        names = {plain_name(key): key for key in value}
        named = {plain: value[key] for plain, key in names.items()} if len(names) == len(value) else dict(value)
        child = record.child(named, name)
        prompts = child.first(PROMPTS)
        if prompts is not None:
            yield from _of_nested_record(child, prompts, kind)
        elif wrapped := [key for key in WRAPPERS if key in named]:
            for key in wrapped:
                yield from nested(child, child[key], key, kind)
        else:
            for plain, key in names.items():
                yield from _of_kind(child, child[plain], str(key), kind)
    elif isinstance(value, str) and not is_absent(value):
        yield Probe(text(value, f"{record.parent}{name}"), kind=kind)
    elif not is_absent(value):
        expected = 'expected records such as {"prompt": "…", "answer": "…"}: fix it, or use the columns '
        columns = "locality_prompt and locality_ground_truth (or portability_…)"
        raise ValueError(f"field {record.parent + name!r}: found {reprlib.repr(value)}; {expected}{columns}")


def _of_kind(record: Record, value: Any, name: str, kind: str) -> Iterator[Probe]:
    """Yield the probes of a mapping from kinds to probes, or from questions to answers."""
    if " " in name.strip() and not _holds_records(value):
        right = right_answers(value, record.parent + name)
        yield Probe(text(name, record.parent), right[0] if right else None, aliases=right[1:], kind=kind)
        return
    plain = plain_name(name)
    if plain.isdigit():  # the number of a probe
        yield from nested(record, value, "*", kind)
    else:
        yield from nested(record, value, name, KINDS.get(plain, plain))


def _of_nested_record(record: Record, prompts: str, kind: str) -> Iterator[Probe]:
    """Yield the probes of a record of one question, or of equally long lists, with their details."""
    kind = first_text(record.get("kind"), f"{record.parent}kind") or kind
    name = record.first(LANGUAGES)
    language = None if name is None else first_text(record[name], record.parent + name)
    name = record.first(CHOICES)
    choices = () if name is None else texts(record[name], record.parent + name)
    subject = record.get("subject")
    for probe in paired(record, prompts, record.first(ANSWERS), record.first(ALIASES)):
        if isinstance(subject, str):
            probe = replace(probe, prompt=probe.prompt.replace("{}", subject))
        yield replace(_with_choices(probe, choices), kind=kind, language=language)


def _with_choices(probe: Probe, choices: tuple[str, ...]) -> Probe:
    """Return a probe with choices; an answer that is a letter or a number is that of a choice."""
    answer = probe.answer
    if not choices or answer is None or answer in choices:
        return replace(probe, choices=choices)
    place = string.ascii_uppercase.find(answer.upper()) if len(answer) == 1 and not answer.isdigit() else -1
    place = int(answer) if answer.isdigit() else place
    if 0 <= place < len(choices):
        return replace(probe, answer=choices[place], choices=choices)
    return replace(probe, choices=(answer, *choices))


def paired(record: Record, prompts: str, answers: str | None, aliases: str | None = None) -> Iterator[Probe]:
    """Yield probes from a field of prompts and a field of answers: one of each, or lists of equal length.

    An answer may be a list of right answers; so may be the answers of one prompt.
    """
    asked, known = unpacked(record.get(prompts)), unpacked(record.get(answers)) if answers else None
    if is_absent(asked) and is_absent(known):
        return
    others = unpacked(record.get(aliases)) if aliases else None
    if not isinstance(asked, (list, tuple)):
        asked, known, others = [asked], [known], [others]
    elif len(asked) == 1 and not (isinstance(known, (list, tuple)) and len(known) == 1):
        known, others = [known], [others]
    known = [None] * len(asked) if is_absent(known) else known
    others = others if isinstance(others, (list, tuple)) and len(others) == len(asked) else [None] * len(asked)
    if not isinstance(known, (list, tuple)) or len(known) != len(asked):
        found = f"{len(asked)} prompts and {reprlib.repr(known)}"
        expected = f"expected one answer per {record.parent + prompts!r}"
        raise ValueError(f"field {record.parent + (answers or '')!r}: found {found}; {expected}")
    for prompt, answer, other in zip(asked, known, others, strict=True):
        if is_absent(prompt) and is_absent(answer):
            continue
        right = right_answers([answer, other], record.parent + (answers or prompts))
        yield Probe(text(prompt, record.parent + prompts), right[0] if right else None, aliases=right[1:])


def _multiple_choice(record: Record, prompt: str, target: str) -> Iterator[Probe]:
    """Yield the prompt with choices: with letters before them, as in HalluEditBench, or as a list."""
    listed = record.first(CHOICE_COLUMNS)
    options = () if listed is None else texts(record[listed], listed)
    lettered = first_text(record.get("multiple_choice_with_letters"), "multiple_choice_with_letters")
    letter = first_text(record.get("multiple_choice_labels"), "multiple_choice_labels")
    if lettered is not None and letter is not None:
        right = re.search(rf"(?:^|\s){re.escape(letter)}\. (.+?)(?=\s+[A-Z]\. |$)", lettered, re.DOTALL)
        letters = tuple(string.ascii_uppercase[: len(options)])
        choices = letters if letter in letters else ()
        aliases = (right[1].strip(),) if right else ()
        yield Probe(f"{prompt}\n{lettered}", letter, aliases=aliases, kind="multiple_choice", choices=choices)
    elif options:
        yield replace(_with_choices(Probe(prompt, target), options), kind="multiple_choice")
