"""The value of one field: a text, or nothing."""

import math
import re
import reprlib

SURROGATE = re.compile("[\ud800-\udfff]")


def texts(value: object, name: str) -> tuple[str, ...]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(text(item, name) for item in items if not is_absent(item))


def right_answers(value: object, name: str) -> tuple[str, ...]:
    """Return the different texts of an answer: a text, a list of aliases, or a list of such lists."""
    if not isinstance(value, (list, tuple)):
        return () if is_absent(value) else (text(value, name),)
    return tuple(dict.fromkeys(answer for item in value for answer in right_answers(item, name)))


def first_text(value: object, name: str) -> str | None:
    return next(iter(right_answers(value, name)), None)


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


def is_absent(value: object) -> bool:
    # a table leaves a cell out as empty text, null or NaN
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))
