"""Fields of records, by the column names of the known data sets: prompt, target, rephrasings and probes."""

import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

ProbeFields = tuple[str, str | None]  # prompt and answer

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

SURROGATE = re.compile("[\ud800-\udfff]")


def find_vocabulary(rows: list[tuple[str, object]]) -> tuple[str, ...]:
    records = [row for _, row in rows if isinstance(row, Mapping)]
    columns = dict.fromkeys(chain.from_iterable(records))
    found = [vocabulary for vocabulary in VOCABULARIES if columns.keys() >= set(vocabulary)]
    if records and len(found) != 1:
        known = "; ".join(f"{' and '.join(names)} ({owner})" for names, owner in VOCABULARIES.items())
        problem = "no prompt / target columns recognized" if not found else "several prompt / target columns"
        raise ValueError(
            f"{rows[0][0]}: {problem}: found the columns {', '.join(map(str, columns))}; expected exactly one of "
            f"{known}: rename or remove columns"
        )
    return found[0] if records else ()


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


def probes(value: object, name: str) -> Iterator[ProbeFields]:
    """Yield nested probes: from a list, or from a mapping of a kind ("Forgetfulness") to a list."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from probes(item, name)
    elif isinstance(value, Mapping):
        keys = next((keys for keys in NESTED_PROBE_KEYS if value.keys() >= set(keys)), None)
        if keys or "prompt" in value:
            yield from paired(value, *(keys or NESTED_PROBE_KEYS[0]), parent=f"{name}.")
        else:
            for kind, item in value.items():
                yield from probes(item, f"{name}.{kind}")
    elif not _absent(value):
        expected = 'expected records such as {"prompt": "…", "answer": "…"}: fix it, or use the columns '
        columns = "locality_prompt and locality_ground_truth (or portability_…)"
        raise ValueError(f"field {name!r}: found {reprlib.repr(value)}; {expected}{columns}")


def paired(record: Mapping[str, Any], prompt: str, answer: str, parent: str = "") -> Iterator[ProbeFields]:
    """Yield probes from a field of prompts and a field of answers: one of each, or lists of equal length."""
    prompts, answers = record.get(prompt), record.get(answer)
    if _absent(prompts) and _absent(answers):
        return
    if not isinstance(prompts, (list, tuple)):
        prompts, answers = [prompts], [answers]
    elif _absent(answers):
        answers = [None] * len(prompts)
    if not isinstance(answers, (list, tuple)) or len(answers) != len(prompts):
        found = f"{len(prompts)} prompts and {reprlib.repr(answers)}"
        raise ValueError(f"field {parent + answer!r}: found {found}; expected one answer per {parent + prompt!r}")
    for one_prompt, one_answer in zip(prompts, answers, strict=True):
        yield text(one_prompt, parent + prompt), first_text(one_answer, parent + answer)


def texts(value: object, name: str) -> tuple[str, ...]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(text(item, name) for item in items if not _absent(item))


def first_text(value: object, name: str) -> str | None:
    # an answer is text, a list of aliases, or a list of such lists
    while isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return None if _absent(value) else text(value, name)


def optional_text(value: object, name: str) -> None:
    if value is not None:
        text(value, name)


def text(value: object, name: str) -> str:
    if _absent(value):
        raise ValueError(f"field {name!r}: found nothing ({value!r}); expected text: add it, or remove the record")
    if not isinstance(value, str):
        advice = f': write "{value}" with quotes' if isinstance(value, (int, float)) else ""
        raise ValueError(
            f"field {name!r}: found {reprlib.repr(value)} ({type(value).__name__}); expected text{advice}"
        )
    if SURROGATE.search(value):
        raise ValueError(
            f"field {name!r}: unpaired UTF-16 surrogate in {reprlib.repr(value)}; re-export the file as UTF-8"
        )
    return value


def _absent(value: object) -> bool:
    # a table leaves a cell out as empty text, null or NaN
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))
