"""Checks of values from an untrusted JSON file: each returns whether the value has the expected form."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any
from unicodedata import category

from .untrusted_json import shortened

Check = Callable[[Any], bool]
# by field name: the check, and the expected value in words
Fields = Mapping[str, tuple[Check, str]]

MAX_TEXT_LENGTH = 1000
# JSON has no such numbers, but a perplexity can be infinite or NaN
NOT_FINITE = ("inf", "-inf", "nan")


def is_text(value: Any) -> bool:
    """Whether it is text that is safe for a terminal: up to `MAX_TEXT_LENGTH` printable characters."""
    # str.isprintable is False for other spaces than the common one
    return (
        isinstance(value, str)
        and all(letter.isprintable() or category(letter) == "Zs" for letter in value)
        and len(value) <= MAX_TEXT_LENGTH
    )


def is_prose(value: Any) -> bool:
    """Whether it is text of any length: safe for the card and the report, not for a terminal."""
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_metric_value(value: Any) -> bool:
    """Whether it is a finite number, or one of `NOT_FINITE`."""
    return is_number(value) or (isinstance(value, str) and value in NOT_FINITE)


def is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def dict_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(is_text(key) and check(item) for key, item in value.items())


def any_of(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def has_fields(**fields: Check) -> Check:
    """Return a check for a dictionary with these fields; it may have others. A missing field is checked as None."""
    return lambda value: isinstance(value, dict) and all(check(value.get(name)) for name, check in fields.items())


def check_fields(values: dict[str, Any], fields: Fields, where: object) -> None:
    """Check the fields that `values` has.

    Raises:
        ValueError: if one fails its check.
    """
    for name, (check, expected) in fields.items():
        if name in values and not check(values[name]):
            raise ValueError(
                f"{where}: {name} is {shortened(values[name])}; expected {expected}. Download or save it again."
            )
