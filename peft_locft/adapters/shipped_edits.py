"""The edits that an adapter ships beside its weights, and prompts that several adapters edit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.edit_types import edit_lines
from ..data.edits import Edit, OnConflict, Prompt, edits_sha256, prompt_identity, read_each_edit, read_edits
from ..io.files import write_atomically
from .provenance import TrainingRun
from .reading import check_adapter, read_lines

EDITS_NAME = "locft_edits.jsonl"
MAX_EDITS_BYTES = 500_000_000


def ship_edits(folder: Path, edits: Sequence[Edit], run: TrainingRun | None) -> None:
    """Write edits into an adapter's folder, one JSON object per line, for `read_edits`.

    Raises:
        ValueError: if a training run is recorded, and these are not its edits.
    """
    _check_edits(edits, run, "edits")
    write_atomically(folder / EDITS_NAME, edit_lines(edits))


def shipped_edits(folder: str | os.PathLike[str]) -> list[Edit] | None:
    """Return the edits that an adapter folder ships; `None` if it ships none.

    Raises:
        ValueError: if `check_adapter` refuses the folder; if the edits cannot be read; if their sha256 is not that of
            the trained edits.
    """
    adapter = check_adapter(folder, method=None)
    file = adapter.folder / EDITS_NAME
    if not os.path.lexists(file):
        return None
    records = read_lines(adapter.folder, EDITS_NAME, MAX_EDITS_BYTES)
    edits = read_each_edit(records)
    _check_edits(edits, adapter.provenance.run, file)
    return edits


@dataclass(frozen=True, slots=True)
class Conflict:
    """One prompt that several adapters edit.

    Attributes:
        prompt: the prompt, with single spaces.
        targets: the targets of each adapter, by adapter folder.
    """

    prompt: str
    targets: dict[str, tuple[str, ...]]

    @property
    def agree(self) -> bool:
        """Whether all adapters have the same target. Their sum then changes the answer more than each alone."""
        return len({target for targets in self.targets.values() for target in targets}) == 1


@dataclass(frozen=True, slots=True)
class Conflicts:
    """Prompts that several adapters edit, from `find_conflicts`.

    Attributes:
        conflicts: the prompts, those with different targets first.
        without_edits: adapters that ship no edits, so their prompts are unknown.
        num_edits: number of edits of each other adapter.
    """

    conflicts: list[Conflict]
    without_edits: list[str]
    num_edits: dict[str, int]

    def __str__(self) -> str:
        differing = [conflict for conflict in self.conflicts if not conflict.agree]
        compared = ", ".join(f"{count} edits in {name}" for name, count in self.num_edits.items()) or "no edits"
        num_agreeing = len(self.conflicts) - len(differing)
        lines = [
            f"prompts of several adapters: {len(differing)} with different targets, {num_agreeing} with the same; "
            f"compared: {compared}"
        ]
        for conflict in differing:
            targets = ", ".join(f"{' and '.join(map(repr, t))} in {name}" for name, t in conflict.targets.items())
            lines.append(f"  {conflict.prompt!r}: {targets}")
        lines += [f"{name} ships no edits, so its prompts are unknown" for name in self.without_edits]
        return "\n".join(lines)


def find_conflicts(adapters: Sequence[str | os.PathLike[str]]) -> Conflicts:
    """Return the prompts that several adapters edit, according to their shipped edits.

    Deltas add up. If two adapters have different targets for one prompt, their sum may answer with either target or
    with neither. Prompts are compared literally, except for spaces: rephrasings are not found.

    Args:
        adapters: local adapter folders, at least two.

    Raises:
        ValueError: if there are fewer than two, or `shipped_edits` refuses one of them.

    Example:
        >>> print(find_conflicts(["monday", "tuesday"]))
        prompts of several adapters: 1 with different targets, 0 with the same; compared: 100 edits in monday, …
          'The capital of Norway is': 'Bergen' in monday, 'Tromsø' in tuesday
    """
    names = list(dict.fromkeys(str(adapter) for adapter in adapters))
    if len(names) < 2:
        raise ValueError(f"adapters={names}: expected at least two different adapters.")
    targets: dict[Prompt, dict[str, tuple[str, ...]]] = {}
    without_edits, num_edits = [], {}
    for name in names:
        edits = shipped_edits(name)
        if edits is None:
            without_edits.append(name)
            continue
        num_edits[name] = len(edits)
        for edit in edits:
            by_adapter = targets.setdefault(prompt_identity(edit), {})
            by_adapter[name] = tuple(dict.fromkeys([*by_adapter.get(name, ()), edit.target]))
    conflicts = [Conflict(prompt.text, by_adapter) for prompt, by_adapter in targets.items() if len(by_adapter) > 1]
    return Conflicts(sorted(conflicts, key=lambda conflict: conflict.agree), without_edits, num_edits)


def _check_edits(edits: Sequence[Edit], run: TrainingRun | None, where: object) -> None:
    if run is not None and edits_sha256(edits) != run.edits.sha256:
        raise ValueError(
            f"{where}: found {len(edits)} edits with the sha256 {edits_sha256(edits)[:16]}…; expected the "
            f"{run.edits.count} edits that the adapter was trained on, with the sha256 {run.edits.sha256[:16]}…. Give "
            "those edits, or ship none."
        )


def adapter_edits(
    adapter: str | os.PathLike[str],
    trained_edits: str | os.PathLike[str] | Sequence[Edit] | None = None,
    on_conflict: OnConflict = "warn",
) -> list[Edit]:
    """Return the edits that an adapter was trained on: the shipped ones, or those of a file, verified by sha256.

    Args:
        adapter: a local adapter folder.
        trained_edits: anything `read_edits` reads, for an adapter that ships no edits. It must begin with the edits
            that the adapter was trained on; more edits may follow.
        on_conflict: the same value as in the training.

    Raises:
        ValueError: if `check_adapter` refuses the folder; if it ships no edits and `trained_edits` is None; if
            `trained_edits` does not begin with the trained edits.
    """
    if trained_edits is None:
        shipped = shipped_edits(adapter)
        if shipped is None:
            raise ValueError(
                f"{adapter} ships no edits, so its edits are unknown. Pass the edits that it was trained on: "
                "trained_edits=… in Python, `locft train --trained_edits FILE`, `locft inspect ADAPTER --edits FILE`. "
                "To ship them in future, use describe_adapter(…, edits=…) or --ship_edits."
            )
        return shipped
    run = check_adapter(adapter, method=None).provenance.run
    if run is None:
        raise ValueError(
            f"{adapter} does not record which edits it was trained on, so trained_edits cannot be verified. Train a "
            "new adapter on all edits."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* prompts have several targets")
        read = read_edits(trained_edits, on_conflict=on_conflict)
    first = read[: run.edits.count]
    if edits_sha256(first) != run.edits.sha256:
        raise ValueError(
            f"trained_edits: found {len(read)} edits, the first {len(first)} with the sha256 "
            f"{edits_sha256(first)[:16]}…; expected the {run.edits.count} edits that {adapter} was trained on, with "
            f"the sha256 {run.edits.sha256[:16]}…. Give the unchanged file of its training."
        )
    return first
