"""Records that note which of their fields are read, so that nothing is dropped in silence."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from .column_names import looks_like_a_part
from .edit_types import same_text
from .field_values import is_absent


class Record(Mapping[str, Any]):
    """A record that notes which of its fields are read.

    Args:
        values: its fields.
        left_out: counts the names of fields that are not read although they look like a part of an edit.
        parent: names of the fields that it stands in, such as `"locality."`.
    """

    def __init__(self, values: Mapping[str, Any], left_out: Counter[str], parent: str = "") -> None:
        self._values, self._left_out, self.parent = values, left_out, parent
        self._read: set[str] = set()
        self._children: list[Record] = []

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        self._read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def first(self, names: Sequence[str]) -> str | None:
        """Return the first of the names that is filled, or else the first that is there; this does not read it."""
        there = [name for name in names if name in self._values]
        return next((name for name in there if not is_absent(self._values[name])), there[0] if there else None)

    def child(self, values: Mapping[str, Any], name: str) -> "Record":
        """Return a record in one of the fields."""
        child = Record(values, self._left_out, f"{self.parent}{name}.")
        self._children.append(child)
        return child

    def note_unread(self, texts: Set[str]) -> None:
        """Count the fields that are not read and look like a part of an edit.

        Args:
            texts: all that was read, in the form of `same_text`: a field that only repeats it is not lost.
        """
        for name, value in self._values.items():
            if name not in self._read and looks_like_a_part(str(name), value) and not set(_texts(value)) <= texts:
                self._left_out[f"{self.parent}{name}"] += 1
        for child in self._children:
            child.note_unread(texts)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield same_text(value)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
