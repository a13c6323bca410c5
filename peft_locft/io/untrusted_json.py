"""JSON from strangers, parsed strictly, and their words as they may be shown."""

from __future__ import annotations

import json
import reprlib
from typing import Any


def strict_json(content: bytes) -> Any:
    """Return the content of a JSON text.

    Raises:
        ValueError: if it is not UTF-8 or not JSON, holds NaN or infinity, or has an object that names a key twice.
            (Of two values under one name, two readers may take different ones.)
        RecursionError: if it is nested too deeply.
    """
    return json.loads(content.decode("utf-8"), object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)


def json_object(content: bytes, where: object) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        content: the file's bytes.
        where: its name, for messages.

    Raises:
        ValueError: if it is refused by `strict_json`, or is not an object.
    """
    try:
        found = strict_json(content)
    except (ValueError, RecursionError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else one_line(error)
        raise ValueError(
            f"{where} is not readable: found no JSON ({why}); expected a JSON object. Download or save it again."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{where} is not readable: found {shortened(found)}; expected a JSON object. Download or save it again."
        )
    return found


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shortened(name)} is there twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Shortened(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if abs(x) < 10**60 else "a number of many digits"


def shortened(value: object) -> str:
    """Return a value as it may be shown: on one line, without control characters, up to 80 characters."""
    text = _Shortened().repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: object) -> str:
    """Return an error's message as it may be shown: on one line, without control characters, up to 300 characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return text if len(text) <= 300 else f"{text[:297]}..."
