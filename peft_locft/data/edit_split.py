"""Edits in two parts, of which one is trained on and the other is not, without questions that are in both."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from .edit_types import Edit, fold_case, prompts_of


def split_edits(edits: Sequence[Edit], size: float, *, seed: int = 0) -> tuple[list[Edit], list[Edit]]:
    """Split edits into a part to train on and a part that is held out.

    No prompt or paraphrase of an edit to train on is a question of a held-out edit, and none about the other's
    subject: edits that share one of these stay together, and so do the edits of one record.

    Args:
        edits: at least two.
        size: how many edits to train on: a share below 1, or a whole number. As many are taken as come nearest
            without being more, since some edits stay together.
        seed: of the random choice.

    Returns:
        The edits to train on and the held-out ones, both in the order in which they were given.

    Raises:
        ValueError: if `size` is neither; if it leaves a part empty.

    Example:
        >>> train, held_out = split_edits(read_edits("edits.csv"), 0.8)
    """
    wanted = round(size * len(edits)) if 0 < size < 1 else int(size) if size % 1 == 0 else 0
    if not 1 <= wanted < len(edits):
        expected = f"expected a share between 0 and 1, or a whole number from 1 to {len(edits) - 1}"
        raise ValueError(f"split: found {size:g} for {len(edits)} edits; {expected}")
    groups = _groups(edits)
    chosen: set[int] = set()
    for number in np.random.default_rng(seed).permutation(len(groups)).tolist():
        if len(chosen) + len(groups[number]) <= wanted:
            chosen |= set(groups[number])
    if not chosen:
        smallest = min(map(len, groups))
        raise ValueError(
            f"split: found {wanted} edits to train on, but at least {smallest} edits stay together, since they share "
            "a subject or a question; expected that many or more"
        )
    return [edits[n] for n in sorted(chosen)], [edit for n, edit in enumerate(edits) if n not in chosen]


def _groups(edits: Sequence[Edit]) -> list[list[int]]:
    """Return the places of edits that must stay together."""
    parents = list(range(len(edits)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    trained: dict[Hashable, int] = {}
    for number, edit in enumerate(edits):
        subject = [] if edit.subject is None else [("subject", fold_case(edit.subject))]
        record = [("record", edit.source)] if edit.source else []
        for key in [*map(fold_case, (edit.prompt, *edit.paraphrases)), *subject, *record]:
            parents[root(number)] = root(trained.setdefault(key, number))
    for number, edit in enumerate(edits):
        for prompt in prompts_of(edit):
            owner = trained.get(fold_case(prompt))
            if owner is not None:
                parents[root(number)] = root(owner)
    groups: dict[int, list[int]] = {}
    for number in range(len(edits)):
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())
