"""Which edits a model has learned: those whose targets are its own greedy answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.edits import Edit, Prompt, prompt_identity, same_text

MAX_NAMED = 3  # edits in a message
ENOUGH = 0.99  # share of learned edits below which a summary says what to change


@dataclass(frozen=True, slots=True)
class LearnedEdits:
    """Which edits a model has learned, measured on its weights after training.

    Attributes:
        num_edits: number of trained edits.
        unlearned: edits whose target is not the greedy answer to their prompt.
        num_contradicted: edits that cannot all be learned: each prompt with N targets counts N - 1.
        median_probability: of the whole targets, over all edits.
    """

    num_edits: int
    unlearned: tuple[Edit, ...]
    num_contradicted: int
    median_probability: float

    @classmethod
    def of(cls, edits: Sequence[Edit], is_learned: Sequence[bool], log_probabilities: Sequence[float]) -> LearnedEdits:
        """Return the summary of some edits.

        Args:
            edits: the trained edits.
            is_learned: of each, whether its target is the greedy answer.
            log_probabilities: of each, of the whole target.
        """
        targets: dict[Prompt, set[str]] = {}
        for edit in edits:
            targets.setdefault(prompt_identity(edit), set()).add(same_text(edit.target))
        probabilities = [math.exp(value) for value in log_probabilities]
        return cls(
            len(edits),
            tuple(edit for edit, learned in zip(edits, is_learned, strict=True) if not learned),
            sum(len(own) - 1 for own in targets.values()),
            statistics.median(probabilities),
        )

    @property
    def num_learned(self) -> int:
        return self.num_edits - len(self.unlearned)

    @property
    def reliability(self) -> float:
        """Share of learned edits."""
        return self.num_learned / self.num_edits

    @property
    def is_enough(self) -> bool:
        """Whether 99 % are learned, or all that do not contradict each other."""
        possible = self.num_edits - self.num_contradicted
        return self.num_learned >= min(ENOUGH * self.num_edits, possible)

    @property
    def metrics(self) -> dict[str, float]:
        return {"reliability": self.reliability, "median_probability": self.median_probability}

    def record(self) -> dict[str, Any]:
        """Return the entry in `locft_provenance.json`, which names no edit."""
        return {
            "num_learned": self.num_learned,
            "num_edits": self.num_edits,
            "median_probability": self.median_probability,
        }

    def __str__(self) -> str:
        text = f"learned {self.num_learned:,} of {self.num_edits:,} edits"
        if self.unlearned:
            named = ", ".join(f'"{edit.prompt}" → "{edit.target}"' for edit in self.unlearned[:MAX_NAMED])
            more = len(self.unlearned) - MAX_NAMED
            text += f" ({len(self.unlearned):,} not: {named}{f' and {more:,} more' if more > 0 else ''})"
        text += f"; median probability of a target: {self.median_probability:.3f}"
        if self.num_contradicted:
            text += (
                f"\n{self.num_contradicted:,} edits contradict others: their prompt has several targets, of which the "
                "model can learn one"
            )
        return text
