"""Prompts that are trained on and asked in an evaluation too: found, and refused or left out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from .edits import Edit

OnLeak = Literal["error", "drop"]
HASH_LENGTH = 16  # hexadecimal digits: two of a million prompts are taken for one another once in 10^7 times
MARK = "locft_trained_prompts"


def normalised(prompt: str) -> str:
    """Return what prompts are compared by: the text without regard to case, and with single spaces."""
    return " ".join(prompt.casefold().split())


def check_paraphrases(edits: Sequence[Edit]) -> None:
    """Check that no training paraphrase is a rephrasing that generalization is measured on, be it of another edit.

    Prompts are compared by [`normalised`].

    Raises:
        ValueError: if one is; the first ones are named, with the places of both.
    """
    asked = {normalised(text): edit for edit in reversed(edits) for text in edit.rephrasings}
    leaks = [
        f"  {paraphrase!r}: a paraphrase at {_place(edit)}, a rephrasing at {_place(asked[normalised(paraphrase)])}"
        for edit in edits
        for paraphrase in edit.paraphrases
        if normalised(paraphrase) in asked
    ]
    if leaks:
        raise ValueError(
            "\n".join(
                [
                    f"{len(leaks)} training paraphrases are also rephrasings, which generalization is measured on: it "
                    "would be measured on what was trained. The first:",
                    *leaks[:10],
                    "Take each out of `paraphrases` or out of `rephrasings`.",
                ]
            )
        )


def trained_prompts_record(prompts: Iterable[str]) -> dict[str, Any]:
    """Return what is recorded beside an adapter of the prompts that it was trained on beyond those of its edits.

    They are recorded as hashes: enough to find a prompt that is at hand, and no text of it is handed on. (Who guesses
    a prompt can still find that it was there.)

    Args:
        prompts: paraphrases, facts to keep, and so on. Those of the edits with a prefix before them need not be there.

    Returns:
        `count`, and `sha256`: the first 16 hexadecimal digits of the sha256 of each, [`normalised`], sorted.
    """
    hashes = sorted({_hash(prompt) for prompt in prompts})
    return {"count": len(hashes), "sha256": hashes}


def mark_trained(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Let a model know what it was trained on, for evaluations in this process.

    Args:
        model: gets an attribute that is no part of its state.
        record: from [`trained_prompts_record`]; a second one adds to the first.
    """
    setattr(model, MARK, trained_prompts(model) | set(record["sha256"]))


def trained_prompts(model: nn.Module) -> frozenset[str]:
    """Return the hashes of the prompts that [`mark_trained`] has told a model."""
    return getattr(model, MARK, frozenset())


def without_leaks(edits: Sequence[Edit], trained: Set[str], on_leak: OnLeak) -> tuple[list[Edit], int]:
    """Find the questions of an evaluation that were trained on.

    Args:
        edits: those that are evaluated; their rephrasings and probes are looked for, not their own prompts.
        trained: hashes, from [`trained_prompts`].
        on_leak: `"error"`, or `"drop"` to leave these questions out.

    Returns:
        The edits with the questions that are left, and how many were left out.

    Raises:
        ValueError: if there are such questions and `on_leak` is `"error"`; the first ones are named.
    """
    if not trained:
        return list(edits), 0
    leaks = [
        f"  {_place(edit)}: the {kind} {prompt!r}"
        for edit in edits
        for kind, prompt in _questions(edit)
        if _hash(prompt) in trained
    ]
    if leaks and on_leak == "error":
        raise ValueError(
            "\n".join(
                [
                    f"{len(leaks)} questions of this evaluation were trained on, so that they would measure what was "
                    "memorised. The first:",
                    *leaks[:10],
                    'Evaluate edits with other questions, or pass on_leak="drop" to leave these out.',
                ]
            )
        )
    return [_asking(edit, lambda prompt: _hash(prompt) not in trained) for edit in edits], len(leaks)


def _questions(edit: Edit) -> Iterator[tuple[str, str]]:
    yield from (("rephrasing", prompt) for prompt in edit.rephrasings)
    yield from (("locality probe", probe.prompt) for probe in edit.locality)
    yield from (("portability probe", probe.prompt) for probe in edit.portability)


def _asking(edit: Edit, is_asked: Callable[[str], bool]) -> Edit:
    return replace(
        edit,
        rephrasings=tuple(prompt for prompt in edit.rephrasings if is_asked(prompt)),
        locality=tuple(probe for probe in edit.locality if is_asked(probe.prompt)),
        portability=tuple(probe for probe in edit.portability if is_asked(probe.prompt)),
    )


def _hash(prompt: str) -> str:
    return hashlib.sha256(normalised(prompt).encode()).hexdigest()[:HASH_LENGTH]


def _place(edit: Edit) -> str:
    return edit.source or repr(edit.prompt)
