"""Leaks: prompts that are both trained on and evaluated. They are refused, or dropped from the evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from .edit_types import PROBE_FIELDS, Edit, fold_case, place_of, probes_of

OnLeak = Literal["error", "drop"]
HASH_LENGTH = 16  # hexadecimal digits: among a million prompts, a collision has a probability of 3e-8
MARK = "locft_trained_prompts"


def check_paraphrases(edits: Sequence[Edit]) -> None:
    """Check that no training paraphrase is also a rephrasing of any edit, which would measure what was trained.

    Prompts are compared by `edits.fold_case`.

    Raises:
        ValueError: if one is; it lists the first ten, with both places.
    """
    rephrased = {fold_case(text): edit for edit in reversed(edits) for text in edit.rephrasings}
    leaks = [
        f"  {paraphrase!r}: a paraphrase at {place_of(edit)}, a rephrasing at {place_of(other)}"
        for edit in edits
        for paraphrase in edit.paraphrases
        if (other := rephrased.get(fold_case(paraphrase))) is not None
    ]
    if leaks:
        raise ValueError(
            "\n".join(
                [
                    f"{len(leaks)} training paraphrases are also rephrasings, so generalization would be measured on "
                    "trained prompts. The first:",
                    *leaks[:10],
                    "Remove each from `paraphrases` or from `rephrasings`.",
                ]
            )
        )


def trained_prompts_record(prompts: Iterable[str]) -> dict[str, Any]:
    """Return the provenance of trained prompts other than those of the edits, as hashes.

    A hash finds a prompt without storing its text. (A guessed prompt can still be confirmed.)

    Args:
        prompts: paraphrases, retained facts and so on; not the prefixed prompts of the edits.

    Returns:
        `count`, and `sha256`: the first 16 hexadecimal digits of the sha256 of each prompt in the form of
        `edits.fold_case`, sorted.
    """
    hashes = sorted({_hash(prompt) for prompt in prompts})
    return {"count": len(hashes), "sha256": hashes}


def mark_trained(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Store on a model which prompts it was trained on, for evaluations in this process.

    Args:
        model: gets an attribute, which is not saved.
        record: from [`trained_prompts_record`]; a second call adds to the first.
    """
    setattr(model, MARK, trained_prompts(model) | set(record["sha256"]))


def trained_prompts(model: nn.Module) -> frozenset[str]:
    """Return the hashes of prompts that [`mark_trained`] has stored on a model."""
    return getattr(model, MARK, frozenset())


def is_trained(prompt: str, trained: Set[str]) -> bool:
    """Return whether a prompt is among trained ones, given as hashes from [`trained_prompts`]."""
    return _hash(prompt) in trained


def without_leaks(edits: Sequence[Edit], trained: Set[str], on_leak: OnLeak) -> tuple[list[Edit], int]:
    """Return edits without the rephrasings and probes that were trained on, and the number of those.

    Args:
        edits: edits to evaluate; their own prompts may be trained on.
        trained: hashes, from [`trained_prompts`].
        on_leak: `"error"`: refuse leaks. `"drop"`: leave them out.

    Raises:
        ValueError: if there are leaks and `on_leak` is `"error"`; it lists the first ten.
    """
    if not trained:
        return list(edits), 0
    leaks = [
        f"  {place_of(edit)}: the {kind} {prompt!r}"
        for edit in edits
        for kind, prompt in _questions(edit)
        if _hash(prompt) in trained
    ]
    if leaks and on_leak == "error":
        raise ValueError(
            "\n".join(
                [
                    f"{len(leaks)} questions of this evaluation were trained on, so they would measure memorization. "
                    "The first:",
                    *leaks[:10],
                    'Evaluate edits with other questions, or pass on_leak="drop" to leave these out.',
                ]
            )
        )
    return [_with_questions(edit, lambda prompt: _hash(prompt) not in trained) for edit in edits], len(leaks)


def _questions(edit: Edit) -> Iterator[tuple[str, str]]:
    yield from (("rephrasing", prompt) for prompt in edit.rephrasings)
    yield from ((f"{name} probe", probe.prompt) for name, probe in probes_of(edit))


def _with_questions(edit: Edit, is_chosen: Callable[[str], bool]) -> Edit:
    probes: dict[str, Any] = {
        name: tuple(probe for probe in getattr(edit, name) if is_chosen(probe.prompt)) for name in PROBE_FIELDS
    }
    return replace(edit, rephrasings=tuple(prompt for prompt in edit.rephrasings if is_chosen(prompt)), **probes)


def _hash(prompt: str) -> str:
    return hashlib.sha256(fold_case(prompt).encode()).hexdigest()[:HASH_LENGTH]
