"""Lists of edits over the life of an adapter: what adding, replacing and withdrawing make of those that it holds."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .edits import Edit, read_edits

ID_DIGITS = 12
MOST_NAMED = 5  # lines in a message


@dataclass(frozen=True, slots=True)
class EditPlan:
    """What becomes of the edits that an adapter holds.

    Attributes:
        kept: edits that it holds and that stay, in their order.
        added: new edits, of prompts that it does not know.
        replaced: new edits, with another target for a prompt that it knows.
        withdrawn: edits that it holds and that were taken back by the user.
    """

    kept: list[Edit]
    added: list[Edit]
    replaced: list[Edit]
    withdrawn: list[Edit]

    @property
    def edits(self) -> list[Edit]:
        """All that the new adapter holds, in its order."""
        return [*self.kept, *self.replaced, *self.added]

    @property
    def restored_prompts(self) -> list[str]:
        """Prompts of withdrawn edits that no other edit has, each once: those that the base is to answer again."""
        edited = {_spaced(edit.prompt) for edit in self.edits}
        return list(dict.fromkeys(edit.prompt for edit in self.withdrawn if _spaced(edit.prompt) not in edited))

    def __str__(self) -> str:
        counts = ("kept", "added", "replaced", "withdrawn")
        return ", ".join(f"{len(getattr(self, name))} {name}" for name in counts)


def edit_id(edit: Edit) -> str:
    """Return what an edit is called by: 12 hexadecimal digits that follow from its prompt and target.

    They are the first of the sha256 of `[prompt, target]` as ASCII JSON.

    Example:
        >>> edit_id(Edit(prompt="The capital of Norway is", target="Bergen"))
        '9e3f2a5427e0'
    """
    return hashlib.sha256(json.dumps([edit.prompt, edit.target]).encode()).hexdigest()[:ID_DIGITS]


def describe_edits(edits: Iterable[Edit]) -> str:
    """Return a line for each edit: its id, prompt and target. `merge_edit_lists` takes such lines in `forget`."""
    return "\n".join(f"{edit_id(edit)}  {edit.prompt!r} -> {edit.target!r}" for edit in edits)


def merge_edit_lists(known: Sequence[Edit], new: Sequence[Edit] = (), forget: Iterable[str] = ()) -> EditPlan:
    """Say what becomes of known edits when others come and some are withdrawn.

    Prompts are compared with spaces run together. A new edit with the prompt and target of a known one is that one,
    with the rephrasings and probes of both; one with another target replaces all that are known of its prompt.

    Args:
        known: the edits that an adapter holds.
        new: edits to add, or to put in the place of known ones.
        forget: lines that say which known edits to withdraw: a prompt, for all its edits, or an id (see `edit_id`),
            which may be followed by anything. Empty lines are left out.

    Raises:
        ValueError: if a line of `forget` means no known edit, if a withdrawn prompt is in `new`, or if nothing is
            left.

    Example:
        >>> print(merge_edit_lists([oslo, bern], forget=["The capital of Norway is"]))
        1 kept, 0 added, 0 replaced, 1 withdrawn
    """
    withdrawn = _named(known, forget)
    going = set(map(id, withdrawn))
    both = [edit.prompt for edit in new if _spaced(edit.prompt) in {_spaced(edit.prompt) for edit in withdrawn}]
    if both:
        raise ValueError(
            f"forget: the prompt {reprlib.repr(both[0])} is withdrawn, and among the new edits too. Leave it out of "
            "one: a new target for a known prompt replaces the old one."
        )
    known_prompts = {_spaced(edit.prompt) for edit in known}
    targets: dict[str, dict[str, Edit]] = {}
    for edit in new:
        targets.setdefault(_spaced(edit.prompt), {})[edit.target] = edit
    kept = []
    for edit in known:
        newer = targets.get(_spaced(edit.prompt), {edit.target: edit})
        if id(edit) not in going and edit.target in newer:
            same = newer[edit.target]
            kept.append(edit if same.prompt != edit.prompt else read_edits([edit, same])[0])
    same_again = {(_spaced(edit.prompt), edit.target) for edit in kept}
    changing = [edit for edit in new if (_spaced(edit.prompt), edit.target) not in same_again]
    plan = EditPlan(
        kept,
        added=[edit for edit in changing if _spaced(edit.prompt) not in known_prompts],
        replaced=[edit for edit in changing if _spaced(edit.prompt) in known_prompts],
        withdrawn=withdrawn,
    )
    if not plan.edits:
        raise ValueError(
            f"forget: it withdraws all {len(known)} edits. Nothing would be left: use the base without the adapter."
        )
    return plan


def read_lines_to_forget(source: str | os.PathLike[str] | Iterable[str]) -> list[str]:
    """Return the lines of a text file, or of an iterable, that are not empty.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, or no line is left.
    """
    try:
        is_file = isinstance(source, (str, os.PathLike))
        lines = Path(source).read_text(encoding="utf-8-sig").split("\n") if is_file else list(source)  # type: ignore[arg-type]
    except UnicodeDecodeError as error:
        raise ValueError(f"forget: {source} is not UTF-8 ({error}). Write it anew.") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"forget: {source} names no edit. Expected a prompt or an id on each line.")
    return found


def _named(known: Sequence[Edit], lines: Iterable[str]) -> list[Edit]:
    by_prompt: dict[str, list[Edit]] = {}
    for edit in known:
        by_prompt.setdefault(_spaced(edit.prompt), []).append(edit)
    by_id = {edit_id(edit): edit for edit in known}
    found: dict[int, Edit] = {}
    unknown = []
    for line in filter(None, map(_spaced, lines)):
        one = by_id.get(line.split()[0])
        meant = by_prompt.get(line) or ([] if one is None else [one])
        found |= {id(edit): edit for edit in meant}
        if not meant:
            unknown.append(line)
    if unknown:
        raise ValueError(_unknown(unknown, by_prompt))
    return [edit for edit in known if id(edit) in found]


def _unknown(lines: Sequence[str], by_prompt: dict[str, list[Edit]]) -> str:
    described = [f"forget: {len(lines)} lines mean none of the edits that the adapter holds. The nearest to them:"]
    ids = {edit_id(edit): edit for edits in by_prompt.values() for edit in edits}
    for line in lines[:MOST_NAMED]:
        near = [ids[name] for name in difflib.get_close_matches(line.split()[0], ids, n=1, cutoff=0.7)]
        near += [by_prompt[prompt][0] for prompt in difflib.get_close_matches(line, by_prompt, n=2, cutoff=0.5)]
        shown = [f"{edit_id(edit)}  {edit.prompt!r}" for edit in dict.fromkeys(near)]
        described.append(f"  {line!r}: {'; '.join(shown) or 'nothing near'}")
    return "\n".join([*described, "Give ids, as `locft inspect ADAPTER --edits` lists them, or prompts."])


def _spaced(prompt: str) -> str:
    return " ".join(prompt.split())
