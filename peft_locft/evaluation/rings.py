"""Locality in three rings: the same subject with another relation, another subject with the same one, the rest."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np

from ..data.augmentation import swapped_subjects
from ..data.edits import Edit
from ..data.leaks import is_trained
from ..data.relations import BLANK, is_english, template_of
from .items import EvalItem

PER_RING = 2  # prompts of each ring for an edit, at most
NUM_NAMES = 48  # sampled for the ring of other subjects
NUM_TOKENS = 8  # of an answer: its first word, or the edit's target
BEGINNINGS = (
    "The weather this morning was",
    "She opened the window and",
    "My favourite book is about",
    "To boil an egg, you need",
    "The train arrived at the station and",
    "On the table there was a",
    "After dinner they went to",
    "The children in the garden were",
    "He looked at his watch and",
    "A triangle has three",
    "In winter the lake is covered with",
    "The dog ran across the street because",
)


def same_relation(
    edits: Sequence[Edit], names: Sequence[str], trained: Set[str], seed: int, num: int = PER_RING
) -> list[list[str]]:
    """Return, for each edit, its prompt with other subjects, none of which an adapter was trained on.

    Args:
        edits: the edits.
        names: other subjects, such as `generated_text.generate_subjects`.
        trained: hashes of trained prompts, from `leaks.trained_prompts`; a name in any of them is left out.
        seed: as in `augmentation.swapped_subjects`.
        num: number of prompts for an edit, at most.
    """
    templates = {template for edit in edits if (template := template_of(edit))}
    fresh = [
        name
        for name in names
        if not any(is_trained(template.replace(BLANK, name), trained) for template in templates if trained)
    ]
    return swapped_subjects(edits, num * len(edits), seed=seed, subjects=fresh) if fresh else [[] for _ in edits]


def unrelated(edits: Sequence[Edit], seed: int, num: int = PER_RING) -> list[list[str]]:
    """Return, for each edit in English, some beginnings of everyday sentences."""
    places = (np.random.default_rng((seed, number)).permutation(len(BEGINNINGS))[:num] for number in range(len(edits)))
    return [
        [BEGINNINGS[place] for place in own] if is_english(edit) else []
        for edit, own in zip(edits, places, strict=True)
    ]


def ring_items(edits: Sequence[Edit], rings: dict[str, list[list[str]]], *, in_chat: bool) -> list[EvalItem]:
    """Return the items of rings: the prompts made of each edit, and the locality probes that the data set names so.

    Args:
        edits: the edits.
        rings: by the ring's name, the prompts for each edit.
        in_chat: ask in the chat template.
    """
    items = []
    for number, edit in enumerate(edits):
        history = edit.history if edit.history is not None else () if in_chat else None
        for ring, prompts in rings.items():
            own = [probe.prompt for probe in edit.locality if probe.kind == ring]
            for prompt in dict.fromkeys([*own, *prompts[number]]):
                items.append(
                    EvalItem(number, f"locality_{ring}", prompt, None, edit.target, history, max_new_tokens=NUM_TOKENS)
                )
    return items
