"""The scope of an adapter: the subjects of its edits, by which a gateway sends a request to it or to the base."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.edit_types import fold_case
from ..data.edits import Edit, EditSource, read_edits
from ..data.scripts import begins_word, ends_word
from ..io.files import write_atomically
from .reading import check_adapter, read_json
from .shipped_edits import shipped_edits

SCOPE_NAME = "locft_scope.json"
SCOPE_FORMAT = 1
MAX_SCOPE_BYTES = 100_000_000
HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Scope:
    """The subjects that an adapter is about. A text without any of them needs no adapter.

    Subjects are compared without case, in one Unicode form, and as whole words; in scripts without spaces, anywhere.

    Attributes:
        subjects: the subjects in lower case, or their hashes.
        lengths: the lengths of the subjects in characters.
        salt: what is hashed before each subject; `None` if the subjects are stored as text.
    """

    subjects: frozenset[str]
    lengths: tuple[int, ...]
    salt: str | None = None

    @classmethod
    def of(
        cls, edits: Iterable[Edit], aliases: Mapping[str, Sequence[str]] | None = None, *, hashed: bool = False
    ) -> Scope:
        """Return the scope of some edits.

        Args:
            edits: edits with a `subject`.
            aliases: other names of subjects, by subject.
            hashed: keep only hashes, so that the names cannot be read. They can be guessed: who has a list of names
                can try each.

        Raises:
            ValueError: if an edit names no subject, or an alias is of a subject that no edit has.
        """
        edits = list(edits)
        missing = [edit for edit in edits if not (edit.subject or "").strip()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(edits)} edits have no subject, such as {missing[0].prompt!r}: expected the "
                "name that each edit is about, in its column subject. `find_subjects` of peft_locft.data finds them "
                "in the prompts."
            )
        own = {str(edit.subject) for edit in edits}
        unknown = sorted(set(aliases or {}) - own)
        if unknown:
            raise ValueError(f"aliases: no edit has the subject {unknown[0]!r}.")
        names = {fold_case(name) for name in [*own, *(each for more in (aliases or {}).values() for each in more)]}
        names.discard("")
        salt = secrets.token_hex(HASH_BYTES) if hashed else None
        stored = names if salt is None else {_hash(salt, name) for name in names}
        return cls(frozenset(stored), tuple(sorted({len(name) for name in names})), salt)

    def matches(self, text: str) -> bool:
        """Whether a text names one of the subjects.

        Example:
            >>> scope = Scope.of([Edit("The capital of Norway is", "Bergen", subject="Norway")])
            >>> scope.matches("What is the capital of NORWAY?"), scope.matches("the capital of Sweden")
            (True, False)
        """
        return self.first_end(fold_case(text)) is not None

    def first_end(self, text: str, *, begin: int = 0, is_whole: bool = True) -> int | None:
        """Return where the first subject that a text names ends; `None`: it names none.

        Args:
            text: a text in the form of `fold_case`.
            begin: no subject begins before this place.
            is_whole: the text ends here. `False`: a word at its end may go on, so a subject there does not count.
        """
        starts = [place for place in range(begin, len(text)) if begins_word(text, place)]
        ends = {place for place in range(begin, len(text) + is_whole) if ends_word(text, place)}
        found = (
            start + length
            for start in starts
            for length in self.lengths
            if start + length in ends and self._has(text[start : start + length])
        )
        return min(found, default=None)

    def _has(self, name: str) -> bool:
        return (name if self.salt is None else _hash(self.salt, name)) in self.subjects

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the scope into an adapter's folder, as `locft_scope.json`, and return the file."""
        path = Path(folder) / SCOPE_NAME
        content = {
            "format": SCOPE_FORMAT,
            "salt": self.salt,
            "lengths": self.lengths,
            "subjects": sorted(self.subjects),
        }
        write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, adapter: str | os.PathLike[str]) -> Scope:
        """Read the scope of an adapter.

        Args:
            adapter: a local adapter folder.

        Raises:
            ValueError: if the folder has no scope, or it is broken.
        """
        folder = check_adapter(adapter, method=None).folder
        if not (folder / SCOPE_NAME).is_file():
            raise ValueError(
                f"{adapter} has no scope. Write one: `locft scope {adapter}`, or Scope.of(edits).save(folder)."
            )
        content: Any = read_json(folder, SCOPE_NAME, MAX_SCOPE_BYTES)
        try:
            scope = cls(frozenset(content["subjects"]), tuple(content["lengths"]), content["salt"])
            is_valid = content["format"] == SCOPE_FORMAT and all(isinstance(each, str) for each in scope.subjects)
            is_valid &= all(isinstance(each, int) and each > 0 for each in scope.lengths)
            is_valid &= scope.salt is None or isinstance(scope.salt, str)
        except (KeyError, TypeError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"{folder / SCOPE_NAME} is not the scope of an adapter. Write it again: `locft scope {adapter}`."
            )
        return scope


def save_scope(
    adapter: str | os.PathLike[str],
    edits: EditSource | None = None,
    *,
    aliases: str | os.PathLike[str] | Mapping[str, Sequence[str]] | None = None,
    hashed: bool = False,
) -> Scope:
    """Write the scope of an adapter into its folder, and return it.

    Args:
        adapter: a local adapter folder.
        edits: edits with a `subject`, anything that `read_edits` reads; `None`: those that the adapter ships.
        aliases: other names of subjects, by subject, or a JSON file with them.
        hashed: as in `Scope.of`.

    Raises:
        ValueError: as in `Scope.of`; also if no edits are given and the adapter ships none, or the file is not an
            object of lists of texts.
        OSError: if a file cannot be read or written.
    """
    folder = check_adapter(adapter, method=None).folder
    read = shipped_edits(folder) if edits is None else read_edits(edits)
    if read is None:
        raise ValueError(f"{adapter} ships no edits. Give them as edits, or `locft scope {adapter} --edits FILE`.")
    if isinstance(aliases, str | os.PathLike):
        aliases = _read_aliases(Path(aliases))
    scope = Scope.of(read, aliases, hashed=hashed)
    scope.save(folder)
    return scope


def _read_aliases(path: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_valid = all(isinstance(name, str) for names in content.values() for name in [*names]) and not any(
            isinstance(names, str) for names in content.values()
        )
    except (ValueError, AttributeError, TypeError):
        is_valid = False
    if not is_valid:
        raise ValueError(f'{path}: expected JSON such as {{"Norway": ["Norge", "Kingdom of Norway"]}}.')
    return dict(content)


def _hash(salt: str, name: str) -> str:
    return hashlib.sha256(f"{salt}{name}".encode()).hexdigest()
