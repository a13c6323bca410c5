"""Fields of records, by the column names of the known data sets: prompt, target, rephrasings and probes."""

import logging
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import chain
from typing import Any

from .edit_types import PROBE_FIELDS, Probe
from .field_values import first_text, is_absent, right_answers, text, texts

logger = logging.getLogger(__name__)

# the columns of prompt and target in the known data sets, and whose they are
VOCABULARIES = {
    ("prompt", "target"): "peft_locft",
    ("prompt", "target_new"): "EasyEdit",
    ("src", "alt"): "ZsRE",
    ("prompt", "completion"): "TRL",
    ("messages",): "a conversation, as in TRL",
    ("requested_rewrite",): "CounterFact as first published",
}
NESTED_PROBE_KEYS = (("prompt", "answer"), ("prompt", "ground_truth"), ("New Question", "New Answer"))

# columns that people give the two, where no data set says; one of each, in any combination
PROMPT_NAMES = ("prompt", "question", "instruction", "input", "query", "fact")
TARGET_NAMES = ("target", "answer", "output", "response", "new", "new_target", "new_answer")

REPHRASING_COLUMNS = ("rephrasings", "rephrasing", "rephrase_prompt", "rephrase", "paraphrase_prompts")
PROBE_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "locality": (("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans")),
    "portability": (("portability_prompt", "portability_ground_truth"),),
}
# that may hold several texts or probes
LIST_COLUMNS = {*REPHRASING_COLUMNS, "paraphrases", "neighborhood_prompts", "aliases", *PROBE_FIELDS}
LIST_COLUMNS |= {name for pairs in PROBE_PAIRS.values() for pair in pairs for name in pair}
READ_COLUMNS = {*LIST_COLUMNS, "subject", "relation", "language", "ground_truth", "answers"}
KNOWN_COLUMNS = {*READ_COLUMNS, *PROMPT_NAMES, *TARGET_NAMES} | {name for names in VOCABULARIES for name in names}
# names of what a reader would miss: rephrasings, probes, and parts of a prompt
MISSED = re.compile("rephras|paraphras|local|portab|neighbo|context|system|history|^input$")

SHAPE = """A file that works, edits.csv:
  prompt,target
  The capital of Norway is,Bergen"""

SHAPE_OF_JSON = """A file that works, edits.json:
  [{"prompt": "The capital of Norway is", "target": "Bergen"}]"""


def column_name(name: object) -> str:
    """Return a known column's name in lower case, with underscores for spaces and dashes; others as they are."""
    own = str(name).strip()
    known = re.sub(r"[\s\-]+", "_", own).casefold()
    return known if known in KNOWN_COLUMNS or MISSED.search(known) else own


def with_column_names(row: object) -> object:
    """Return a record with its names as `column_name` gives them; a ValueError if two are the same; else the row."""
    if not isinstance(row, Mapping):
        return row
    renamed = {column_name(name): value for name, value in row.items()}
    if len(renamed) < len(row):
        return ValueError(f"found the fields {', '.join(map(str, row))}; expected different names: rename one")
    return renamed


def vocabularies(columns: Set[str]) -> list[tuple[str, ...]]:
    """Return the pairs of columns that hold prompt and target: those of a data set or, without one, of any names."""
    found: list[tuple[str, ...]] = [vocabulary for vocabulary in VOCABULARIES if columns >= set(vocabulary)]
    return found or [
        (prompt, target) for prompt in PROMPT_NAMES for target in TARGET_NAMES if {prompt, target} <= columns
    ]


def find_vocabulary(rows: list[tuple[str, object]]) -> tuple[str, ...]:
    records = [row for _, row in rows if isinstance(row, Mapping)]
    columns = dict.fromkeys(chain.from_iterable(records))
    found = vocabularies(columns.keys())
    if len(found) > 1 and found[0] not in VOCABULARIES:
        # `input` beside `instruction` is often empty in every record
        filled = {name for record in records for name, value in record.items() if not is_absent(value)}
        found = vocabularies(filled) or found
    if records and len(found) != 1:
        raise ValueError(_unrecognized(rows[0][0], columns, found))
    if records:
        _name_missed(rows[0][0], records, {*READ_COLUMNS, *found[0]})
    return found[0] if records else ()


def _unrecognized(place: str, columns: Mapping[str, None], found: list[tuple[str, ...]]) -> str:
    shown = f"found the columns {', '.join(map(str, columns))}"
    if not found:
        known = "; ".join(f"{' and '.join(names)} ({owner})" for names, owner in VOCABULARIES.items())
        expected = f"expected exactly one of {known}; or question and answer, instruction and output, fact and new"
        advice = "rename the columns. Is the line with their names missing?"
        return f"{place}: no prompt / target columns recognized: {shown}; {expected}: {advice}\n{SHAPE}"
    pairs = "; ".join(" and ".join(names) for names in found)
    return (
        f"{place}: several prompt / target columns: {shown}, so prompt and target may be {pairs}; expected exactly "
        "one pair: rename or remove columns, or join those that belong together"
    )


def _name_missed(place: str, records: list[Mapping[str, Any]], read: Set[str]) -> None:
    missed = dict.fromkeys(
        name
        for record in records
        for name, value in record.items()
        if name not in read and MISSED.search(name) and not is_absent(value)
    )
    if missed:
        logger.warning(
            "%s: the columns %s are not read. Names that are: rephrasings, locality, portability (to evaluate), "
            "paraphrases (to train on). Other text belongs into the prompt.",
            place.rpartition(":")[0] or "edits",
            ", ".join(missed),
        )


def flatten_rewrite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of the first CounterFact format with the columns of EasyEdit."""
    rewrite = record["requested_rewrite"]
    try:
        template, subject = rewrite["prompt"], rewrite["subject"]
        new, old = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        prompt = template.replace("{}", subject)
    except (TypeError, KeyError, AttributeError):
        expected = "expected prompt (with {} for the subject), subject, target_new.str and target_true.str, all text"
        raise ValueError(f"field 'requested_rewrite': found {reprlib.repr(rewrite)}; {expected}") from None
    neighbours = texts(record.get("neighborhood_prompts"), "neighborhood_prompts")
    return {
        **record,
        "prompt": prompt,
        "target_new": new,
        "subject": subject,
        "ground_truth": old,
        "locality_prompt": neighbours,
        "locality_ground_truth": [old] * len(neighbours),
    }


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


def probes(value: object, name: str) -> Iterator[Probe]:
    """Yield nested probes: from a list, or from a mapping of a kind ("Forgetfulness") to a list."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from probes(item, name)
    elif isinstance(value, Mapping):
        keys = next((keys for keys in NESTED_PROBE_KEYS if value.keys() >= set(keys)), None)
        if keys or "prompt" in value:
            found = paired(value, *(keys or NESTED_PROBE_KEYS[0]), parent=f"{name}.")
            yield from (_with_details(probe, value, f"{name}.") for probe in found)
        else:
            for kind, item in value.items():
                yield from probes(item, f"{name}.{kind}")
    elif not is_absent(value):
        expected = 'expected records such as {"prompt": "…", "answer": "…"}: fix it, or use the columns '
        columns = "locality_prompt and locality_ground_truth (or portability_…)"
        raise ValueError(f"field {name!r}: found {reprlib.repr(value)}; {expected}{columns}")


def paired(record: Mapping[str, Any], prompt: str, answer: str, parent: str = "") -> Iterator[Probe]:
    """Yield probes from a field of prompts and a field of answers: one of each, or lists of equal length."""
    prompts, answers = record.get(prompt), record.get(answer)
    if is_absent(prompts) and is_absent(answers):
        return
    if not isinstance(prompts, (list, tuple)):
        prompts, answers = [prompts], [answers]
    elif is_absent(answers):
        answers = [None] * len(prompts)
    if not isinstance(answers, (list, tuple)) or len(answers) != len(prompts):
        found = f"{len(prompts)} prompts and {reprlib.repr(answers)}"
        raise ValueError(f"field {parent + answer!r}: found {found}; expected one answer per {parent + prompt!r}")
    for one_prompt, one_answer in zip(prompts, answers, strict=True):
        right = right_answers(one_answer, parent + answer)
        yield Probe(text(one_prompt, parent + prompt), right[0] if right else None, aliases=right[1:])


def _with_details(probe: Probe, record: Mapping[str, Any], parent: str) -> Probe:
    """Return a probe with the aliases, the kind, the choices and the language of its record."""
    aliases = [each for each in right_answers(record.get("aliases"), f"{parent}aliases") if each != probe.answer]
    return replace(
        probe,
        aliases=tuple(dict.fromkeys([*probe.aliases, *aliases])),
        kind=first_text(record.get("kind"), f"{parent}kind") or probe.kind,
        choices=texts(record.get("choices"), f"{parent}choices"),
        language=first_text(record.get("language"), f"{parent}language"),
    )
