"""The edits that an adapter may ship beside its weights, and the prompts that several adapters edit."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data.edits import Edit, OnConflict, collapse_whitespace, edits_sha256, read_edits
from ..io.files import write_atomically
from .reading import check_adapter, read_lines

EDITS_NAME = "locft_edits.jsonl"
MAX_EDITS_BYTES = 500_000_000


def ship_edits(folder: Path, edits: Sequence[Edit], recorded: dict[str, object] | None) -> None:
    """Write edits into an adapter's folder, one JSON object a line, as `read_edits` reads them.

    Raises:
        ValueError: if they are not those that are `recorded` of the run that made the adapter, where one is.
    """
    _check_edits(edits, recorded, "edits")
    write_atomically(folder / EDITS_NAME, edit_lines(edits))


def edit_lines(edits: Sequence[Edit]) -> str:
    """Return edits as JSON, one object a line, as `read_edits` reads them."""
    records = [{name: value for name, value in asdict(edit).items() if name != "source" and value} for edit in edits]
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def shipped_edits(folder: str | os.PathLike[str]) -> list[Edit] | None:
    """Return the edits that an adapter folder ships, or None if it ships none.

    Raises:
        ValueError: if the folder is refused by `check_adapter`; if the edits cannot be read, or are not those whose
            sha256 is recorded of the run that made the adapter.
    """
    adapter = check_adapter(folder, method=None)
    file = adapter.folder / EDITS_NAME
    if not os.path.lexists(file):
        return None
    records = read_lines(adapter.folder, EDITS_NAME, MAX_EDITS_BYTES)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* prompts have several targets")
        edits = read_edits(records)
    _check_edits(edits, adapter.facts.get("edits"), file)
    return edits


@dataclass(frozen=True, slots=True)
class Conflict:
    """One prompt that several adapters edit.

    Attributes:
        prompt: the prompt, with single spaces.
        targets: what each of them answers it with, by the adapter's folder.
    """

    prompt: str
    targets: dict[str, tuple[str, ...]]

    @property
    def agree(self) -> bool:
        """Whether all of them answer alike. Their sum then changes the answer more than either was trained to."""
        return len({target for targets in self.targets.values() for target in targets}) == 1


@dataclass(frozen=True, slots=True)
class Conflicts:
    """What `find_conflicts` found.

    Attributes:
        conflicts: prompts that several of the adapters edit, those with different targets first.
        without_edits: the adapters that ship no edits, so that nothing is known of them.
        num_edits: of each of the others.
    """

    conflicts: list[Conflict]
    without_edits: list[str]
    num_edits: dict[str, int]

    def __str__(self) -> str:
        differing = [conflict for conflict in self.conflicts if not conflict.agree]
        lines = [
            f"{len(differing)} prompts have different targets in several adapters, "
            f"{len(self.conflicts) - len(differing)} the same; of "
            f"{', '.join(f'{count} edits in {name}' for name, count in self.num_edits.items()) or 'no edits'}"
        ]
        for conflict in differing:
            found = ", ".join(f"{' and '.join(map(repr, t))} in {name}" for name, t in conflict.targets.items())
            lines.append(f"  {conflict.prompt!r}: {found}")
        lines += [f"{name} ships no edits: nothing is known of its prompts" for name in self.without_edits]
        return "\n".join(lines)


def find_conflicts(adapters: Sequence[str | os.PathLike[str]]) -> Conflicts:
    """Find the prompts that several adapters edit, in the edits that they ship.

    Deltas add up, whatever they were trained on: of two that answer one prompt differently, the sum answers with
    either or neither. Prompts are compared with spaces run together, and as they are otherwise: a rephrasing of
    another's prompt is not found.

    Args:
        adapters: local adapter folders, at least two.

    Raises:
        ValueError: if there are fewer than two, or one of them is refused by `shipped_edits`.

    Example:
        >>> print(find_conflicts(["monday", "tuesday"]))
        1 prompts have different targets in several adapters, 0 the same; of 100 edits in monday, 80 edits in tuesday
          'The capital of Norway is': 'Bergen' in monday, 'Tromsø' in tuesday
    """
    names = list(dict.fromkeys(str(adapter) for adapter in adapters))
    if len(names) < 2:
        raise ValueError(f"adapters={names}: expected at least two different ones to compare.")
    targets: dict[str, dict[str, tuple[str, ...]]] = {}
    without, num_edits = [], {}
    for name in names:
        edits = shipped_edits(name)
        if edits is None:
            without.append(name)
            continue
        num_edits[name] = len(edits)
        for edit in edits:
            of_prompt = targets.setdefault(collapse_whitespace(edit.prompt), {})
            of_prompt[name] = tuple(dict.fromkeys([*of_prompt.get(name, ()), edit.target]))
    found = [Conflict(prompt, by_adapter) for prompt, by_adapter in targets.items() if len(by_adapter) > 1]
    return Conflicts(sorted(found, key=lambda conflict: conflict.agree), without, num_edits)


def _check_edits(edits: Sequence[Edit], recorded: dict[str, object] | None, where: object) -> None:
    if recorded is not None and edits_sha256(edits) != recorded["sha256"]:
        raise ValueError(
            f"{where}: found {len(edits)} edits with the sha256 {edits_sha256(edits)[:16]}…; expected the "
            f"{recorded['count']} that the adapter was trained on, {str(recorded['sha256'])[:16]}…. Give those, or "
            "leave them out."
        )


def adapter_edits(
    adapter: str | os.PathLike[str],
    trained_edits: str | os.PathLike[str] | Sequence[Edit] | None = None,
    on_conflict: OnConflict = "warn",
) -> list[Edit]:
    """Return the edits that an adapter was trained on: those that it ships, or those of a file that fits its record.

    Args:
        adapter: a local adapter folder.
        trained_edits: whatever `read_edits` reads, for an adapter that ships none. It may go on behind those that the
            adapter was trained on, if these are its first.
        on_conflict: as the adapter was trained.

    Raises:
        ValueError: if the folder is refused by `check_adapter`, if it ships no edits and none are given, or if those
            that are given are not those whose sha256 is recorded of the run that made the adapter.
    """
    if trained_edits is None:
        shipped = shipped_edits(adapter)
        if shipped is None:
            raise ValueError(
                f"{adapter} ships no edits, so that it is not known which it holds. Give those that it was trained on "
                "as trained_edits (--trained_edits FILE); describe_adapter(…, edits=…) or --ship_edits ships them."
            )
        return shipped
    recorded = check_adapter(adapter, method=None).facts.get("edits")
    if recorded is None:
        raise ValueError(
            f"{adapter} does not record which edits it was trained on, so that trained_edits cannot be it."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* prompts have several targets")
        read = read_edits(trained_edits, on_conflict=on_conflict)
    held = read[: recorded["count"]]
    if edits_sha256(held) != recorded["sha256"]:
        raise ValueError(
            f"trained_edits: found {len(read)} edits, the first {len(held)} with sha256 {edits_sha256(held)[:16]}…; "
            f"expected the {recorded['count']} that {adapter} was trained on, {recorded['sha256'][:16]}…. Give the "
            "file that it was trained on, unchanged."
        )
    return held
