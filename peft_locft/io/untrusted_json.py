"""Untrusted JSON, parsed strictly; and untrusted text, made safe to print."""

from __future__ import annotations

import json
import reprlib
from typing import Any


def strict_json(content: bytes) -> Any:
    """Return the content of a JSON text.

    Raises:
        ValueError: if it is not UTF-8 or not JSON, holds NaN or infinity, or an object has a duplicate key. (Two
            readers may use different values of a duplicate key.)
        RecursionError: if it is nested too deeply.
    """
    return json.loads(content.decode("utf-8"), object_pairs_hook=unique_pairs, parse_constant=_refuse_constant)


def json_object(content: bytes, where: object) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        content: the file's bytes.
        where: its name, for messages.

    Raises:
        ValueError: if `strict_json` refuses it, or it is not an object.
    """
    try:
        value = strict_json(content)
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else one_line(error)
        raise ValueError(
            f"{where} is not readable: found invalid JSON ({reason}); expected a JSON object. Download or save it "
            "again."
        ) from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{where} is not readable: found {shortened(value)}; expected a JSON object. Download or save it again."
        )
    return value


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs, as the hook of a JSON parser; a ValueError for a duplicate key."""
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"duplicate key {shortened(name)}")
        unique[name] = value
    return unique


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Shortened(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if abs(x) < 10**60 else "a number of 60 digits or more"


def shortened(value: object) -> str:
    """Return a value as text that is safe to print: one line, no control characters, up to 80 characters."""
    text = _Shortened().repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: object) -> str:
    """Return an error's message, safe to print: one line, no control characters, up to 300 characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return text if len(text) <= 300 else f"{text[:297]}..."
