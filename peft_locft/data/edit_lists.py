"""Changes of an adapter's edits over its life: which stay, and which are added, replaced or withdrawn."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .edits import Edit, Prompt, prompt_identity, prompt_of, read_edits, same_text
from .text_files import read_lines

ID_DIGITS = 12
MAX_NAMED = 5  # lines in a message


@dataclass(frozen=True, slots=True)
class EditPlan:
    """The edits of an updated adapter, and those that it loses.

    Attributes:
        kept: known edits that stay, in order.
        added: new edits with new prompts.
        replaced: new edits with another target for a known prompt.
        withdrawn: known edits that the user withdrew.
    """

    kept: list[Edit]
    added: list[Edit]
    replaced: list[Edit]
    withdrawn: list[Edit]

    @property
    def edits(self) -> list[Edit]:
        """All edits of the updated adapter, in order."""
        return [*self.kept, *self.replaced, *self.added]

    @property
    def restored(self) -> list[Prompt]:
        """Prompts of withdrawn edits that no other edit has, each once; the model answers them as the base again."""
        edited = {prompt_identity(edit) for edit in self.edits}
        return list(dict.fromkeys(prompt_of(edit) for edit in self.withdrawn if prompt_identity(edit) not in edited))

    @property
    def restored_prompts(self) -> list[str]:
        """The texts of `restored`."""
        return [prompt.text for prompt in self.restored]

    def __str__(self) -> str:
        counts = ("kept", "added", "replaced", "withdrawn")
        return ", ".join(f"{len(getattr(self, name))} {name}" for name in counts)


def edit_id(edit: Edit) -> str:
    """Return the id of an edit: the first 12 hexadecimal digits of the sha256 of `[prompt, target]` as ASCII JSON.

    The messages before the prompt follow in this list, each as `[role, content]`, if the edit is a conversation.

    Example:
        >>> edit_id(Edit(prompt="The capital of Norway is", target="Bergen"))
        '9e3f2a5427e0'
    """
    history = [] if edit.history is None else [[[message.role, message.content] for message in edit.history]]
    return hashlib.sha256(json.dumps([edit.prompt, edit.target, *history]).encode()).hexdigest()[:ID_DIGITS]


def describe_edits(edits: Iterable[Edit]) -> str:
    """Return a line per edit: id, prompt and target. `merge_edit_lists` accepts these lines in `forget`."""
    return "\n".join(f"{edit_id(edit)}  {edit.prompt!r} -> {edit.target!r}" for edit in edits)


def merge_edit_lists(known: Sequence[Edit], new: Sequence[Edit] = (), forget: Iterable[str] = ()) -> EditPlan:
    """Return which known edits stay, which new ones are added or replace others, and which are withdrawn.

    Prompts and targets are compared by `edits.same_text`, with the messages before them. A new edit with the prompt
    and target of a known one is merged with it, with the rephrasings and probes of both. A new edit with another
    target replaces all known edits of its prompt.

    Args:
        known: the edits of an adapter.
        new: edits to add, or to replace known ones.
        forget: lines that name known edits to withdraw: a prompt (all its edits) or an id (see `edit_id`), which any
            text may follow. Empty lines are ignored.

    Raises:
        ValueError: if a line of `forget` names no known edit, a withdrawn prompt is in `new`, or no edit is left.

    Example:
        >>> print(merge_edit_lists([oslo, bern], forget=["The capital of Norway is"]))
        1 kept, 0 added, 0 replaced, 1 withdrawn
    """
    withdrawn = _named(known, forget)
    going = set(map(id, withdrawn))
    both = [edit.prompt for edit in new if prompt_identity(edit) in {prompt_identity(edit) for edit in withdrawn}]
    if both:
        raise ValueError(
            f"forget: the prompt {reprlib.repr(both[0])} is withdrawn and also among the new edits. Remove it from "
            "one of them. (A new target for a known prompt replaces the old one without `forget`.)"
        )
    known_prompts = {prompt_identity(edit) for edit in known}
    targets: dict[Prompt, dict[str, Edit]] = {}
    for edit in new:
        targets.setdefault(prompt_identity(edit), {})[same_text(edit.target)] = edit
    kept = []
    for edit in known:
        target = same_text(edit.target)
        newer = targets.get(prompt_identity(edit), {target: edit})
        if id(edit) not in going and target in newer:
            kept.append(read_edits([edit, newer[target]])[0])
    same_again = {(prompt_identity(edit), same_text(edit.target)) for edit in kept}
    changing = [edit for edit in new if (prompt_identity(edit), same_text(edit.target)) not in same_again]
    plan = EditPlan(
        kept,
        added=[edit for edit in changing if prompt_identity(edit) not in known_prompts],
        replaced=[edit for edit in changing if prompt_identity(edit) in known_prompts],
        withdrawn=withdrawn,
    )
    if not plan.edits:
        raise ValueError(
            f"forget: it withdraws all {len(known)} edits, so none would be left. Use the base without the adapter."
        )
    return plan


def read_lines_to_forget(source: str | os.PathLike[str] | Iterable[str]) -> list[str]:
    """Return the lines of a text file or an iterable that are not empty.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, or all lines are empty.
    """
    if isinstance(source, (str, os.PathLike)):
        found = read_lines(source)
    else:
        found = [line.strip() for line in source if line.strip()]
    if not found:
        raise ValueError(f"forget: {source} names no edit; expected a prompt or an id on each line.")
    return found


def _named(known: Sequence[Edit], lines: Iterable[str]) -> list[Edit]:
    by_prompt: dict[str, list[Edit]] = {}
    for edit in known:
        by_prompt.setdefault(same_text(edit.prompt), []).append(edit)
    by_id = {edit_id(edit): edit for edit in known}
    found: dict[int, Edit] = {}
    unknown = []
    for line in filter(None, map(same_text, lines)):
        one = by_id.get(line.split()[0])
        meant = by_prompt.get(line) or ([] if one is None else [one])
        found |= {id(edit): edit for edit in meant}
        if not meant:
            unknown.append(line)
    if unknown:
        raise ValueError(_unknown(unknown, by_prompt))
    return [edit for edit in known if id(edit) in found]


def _unknown(lines: Sequence[str], by_prompt: dict[str, list[Edit]]) -> str:
    described = [f"forget: {len(lines)} lines name no edit of the adapter. The nearest ones:"]
    ids = {edit_id(edit): edit for edits in by_prompt.values() for edit in edits}
    for line in lines[:MAX_NAMED]:
        near = [ids[name] for name in difflib.get_close_matches(line.split()[0], ids, n=1, cutoff=0.7)]
        near += [by_prompt[prompt][0] for prompt in difflib.get_close_matches(line, by_prompt, n=2, cutoff=0.5)]
        shown = [f"{edit_id(edit)}  {edit.prompt!r}" for edit in dict.fromkeys(near)]
        described.append(f"  {line!r}: {'; '.join(shown) or 'nothing near'}")
    return "\n".join([*described, "Use prompts, or ids from `locft inspect ADAPTER --edits`."])
