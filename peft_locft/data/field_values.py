"""The value of one field: a text, several texts, an answer with its aliases, or nothing."""

import ast
import datetime
import io
import json
import math
import numbers
import re
import reprlib
import tokenize
from collections.abc import Mapping
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")
# the names of an answer and of its aliases in a mapping, as in RippleEdits, CounterFact and KILT
ANSWER_KEYS = ("value", "str", "text", "answer", "label", "name")
ALIAS_KEYS = ("aliases", "alias")
MAX_WHOLE_FLOAT = 2**53  # the last float after which not every whole number is one


def optional_text(value: object, name: str) -> None:
    if value is not None:
        text(value, name)


def text(value: object, name: str) -> str:
    if is_absent(value):
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


def texts(value: object, name: str) -> tuple[str, ...]:
    """Return the different texts of a field: of a text, a list, or a list that is written as text."""
    value = unpacked(value)
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(text(item, name) for item in items if not is_absent(item)))


def right_answers(value: object, name: str, *, is_target: bool = False) -> tuple[str, ...]:
    """Return the different texts of an answer.

    Args:
        value: a text, a number, a date; a list of aliases, or of such lists; a mapping with the text and its aliases.
        name: of the field, for messages.
        is_target: as in `unpacked`.
    """
    value = unpacked(value, is_target=is_target)
    if isinstance(value, str):
        return () if is_absent(value) else (text(value, name),)
    if isinstance(value, Mapping):
        key = next((key for key in ANSWER_KEYS if key in value), None)
        if key is None:
            expected = f"expected text, or a record with one of {', '.join(ANSWER_KEYS)}"
            raise ValueError(f"field {name!r}: found {reprlib.repr(dict(value))}; {expected}")
        value = [value[key], *(value.get(alias) for alias in ALIAS_KEYS)]
    if isinstance(value, (list, tuple)):
        return tuple(dict.fromkeys(answer for item in value for answer in right_answers(item, name)))
    return () if is_absent(value) else (text(as_text(value), name),)


def first_text(value: object, name: str) -> str | None:
    return next(iter(right_answers(value, name)), None)


def as_text(value: object) -> object:
    """Return a number, a date or a truth value as text, in the form in which people write it; others as they are."""
    if isinstance(value, str):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # of numpy
        value = value.item()
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_WHOLE_FLOAT:
        value = int(value)  # pandas makes floats of a column of whole numbers that has an empty cell
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    is_number = isinstance(value, (numbers.Number, bool)) and not (isinstance(value, float) and math.isinf(value))
    return str(value) if is_number else value


def is_absent(value: object) -> bool:
    # a table leaves a cell out as empty text, null, NaN, NaT or NA
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (list, tuple, Mapping)):
        return not value
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and math.isnan(value)


def unpacked(value: Any, *, is_target: bool = False) -> Any:
    """Return the list or mapping that a program has written as text, as pandas does into a cell; others as they are.

    JSON, Python's notation and numpy's are read. A text that only begins with a bracket stays a text.

    Args:
        value: of any field.
        is_target: it is what a model shall write, which may be JSON: only Python's notation is a list of answers.
    """
    if not isinstance(value, str):
        return value.tolist() if hasattr(value, "tolist") and getattr(value, "ndim", False) else value
    cell = value.strip()
    if (cell[:1], cell[-1:]) not in (("[", "]"), ("{", "}")) and not cell.startswith("array("):
        return value
    try:
        found = json.loads(cell)
        if is_target:
            return value
    except ValueError:
        found = _python_value(cell)
    # a list of numbers, such as "[1990]", says nothing of a list of texts
    holds_texts = isinstance(found, (dict, list)) and (
        not found or any(isinstance(each, (str, dict, list)) for each in found)
    )
    return found if holds_texts else value


def _python_value(cell: str) -> object:
    cell = re.sub(r"^array\((.*?)(,\s*dtype=\w+)?\)$", r"\1", cell, flags=re.DOTALL)
    written: list[str] = []
    try:
        before = None
        for token in tokenize.generate_tokens(io.StringIO(cell).readline):
            if before == token.type == tokenize.STRING:
                written.append(",")  # numpy writes none between texts, and Python would join them to one
            written.append("None" if token.string == "nan" else token.string)
            before = token.type if token.string.strip() else before
        return ast.literal_eval(" ".join(written).strip())
    except (ValueError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError):
        return None
