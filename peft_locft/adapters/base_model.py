"""The commit and the licence of a base model, from local files and the Hub's cache."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LICENCE_FIELDS = ("license", "license_name", "license_link")
MAX_CARD_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The base model of an adapter.

    Attributes:
        name_or_path: its folder, or its name on the Hub.
        revision: branch, tag or commit on the Hub.
        commit: the commit on the Hub; `None` if it is unknown.
        license: `license` in the header of its card; `None` if it is unknown.
        license_name: `license_name`, likewise.
        license_link: `license_link`, likewise.
        others: fields of a later format.
    """

    name_or_path: str | None
    revision: str | None
    commit: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def known_here(cls, name_or_path: str | None, revision: str | None = None) -> BaseModel:
        """Return a base model with the commit and licence from its folder, or from the Hub's cache.

        Args:
            name_or_path: a folder, or a name on the Hub.
            revision: branch, tag or commit on the Hub.
        """
        config = _known_file(name_or_path, "config.json", revision)
        # a file in the cache is at …/snapshots/<commit>/config.json
        commit = None if config is None or Path(name_or_path or "").is_dir() else config.parent.name
        card = _known_file(name_or_path, "README.md", revision)
        licence: dict[str, Any] = {} if card is None else _licence(card)
        return cls(name_or_path, revision, commit, **licence)


def _known_file(base: str | None, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not base:
        return None
    file = Path(base) / name
    if Path(base).is_dir():
        return file if file.is_file() else None
    try:
        cached = try_to_load_from_cache(base, name, revision=revision)
    except HFValidationError:  # not a valid name on the Hub
        return None
    return Path(cached) if isinstance(cached, str) else None


def _licence(card: Path) -> dict[str, str]:
    from huggingface_hub import ModelCard

    with card.open("rb") as file:
        text = file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace")
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data
    except Exception:  # invalid YAML: the licence is unknown
        return {}
    values = {name: getattr(data, name, None) for name in LICENCE_FIELDS}
    # the values go into the header of the adapter's card: allow only names and links
    return {name: value for name, value in values.items() if isinstance(value, str) and is_plain(value)}


def is_plain(value: str) -> bool:
    """Whether text is short and has only letters, digits and the punctuation of names and links."""
    return re.fullmatch(r"[\w.,:/?=#& +-]{1,200}", value) is not None
