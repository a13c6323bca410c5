"""Prompts that are trained on and asked in an evaluation too: found, and refused or left out."""

from __future__ import annotations

from collections.abc import Sequence

from .edits import Edit


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


def _place(edit: Edit) -> str:
    return edit.source or repr(edit.prompt)
