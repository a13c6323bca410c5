"""How far a judge agrees with exact match: the share, Cohen's kappa, and the answers on which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .intervals import format_number
from .tables import markdown_table

Row = Mapping[str, Any]
MAX_DISAGREEMENTS = 20  # in Markdown and on a page
MAX_CHARACTERS = 80  # of a text in Markdown


@dataclass(frozen=True)
class Agreement:
    """Two verdicts on the same answers, counted.

    Attributes:
        both_right: answers that the judge and exact match call right.
        only_judge: answers that only the judge calls right.
        only_match: answers that only exact match calls right.
        both_wrong: answers that both call wrong.
    """

    both_right: int
    only_judge: int
    only_match: int
    both_wrong: int

    @property
    def count(self) -> int:
        """Number of answers."""
        return self.both_right + self.only_judge + self.only_match + self.both_wrong

    @property
    def share(self) -> float:
        """Share of answers on which both agree."""
        return (self.both_right + self.both_wrong) / self.count

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa: agreement beyond chance, 1 at most; `None` if both always say the same, which is no test."""
        judged, matched = (
            (self.both_right + self.only_judge) / self.count,
            (self.both_right + self.only_match) / self.count,
        )
        chance = judged * matched + (1 - judged) * (1 - matched)
        return None if chance == 1 else (self.share - chance) / (1 - chance)

    def __str__(self) -> str:
        kappa = "not defined, as both say the same of all" if self.kappa is None else format_number(self.kappa)
        return (
            f"The judge agrees with exact match on {format_number(self.share)} of {self.count} answers (Cohen's kappa "
            f"{kappa}): both right {self.both_right}, only the judge says right {self.only_judge}, only exact match "
            f"says right {self.only_match}, both wrong {self.both_wrong}."
        )


def judged_answers(rows: Sequence[Row]) -> Iterator[tuple[Row, str, float, float]]:
    """Yield the answers with both verdicts: the row, "before" or "after", the judge's and exact match's."""
    for row in rows:
        for when in ("before", "after"):
            judged, matched = row.get(f"judged_{when}"), row.get(f"exact_match_{when}")
            if judged is not None and matched is not None:
                yield row, when, judged, matched


def agreement_of(rows: Sequence[Row]) -> Agreement | None:
    """Return the agreement over all judged answers of a report's rows; `None` if there are none."""
    counts = Counter((judged, matched) for _, _, judged, matched in judged_answers(rows))
    if not counts:
        return None
    return Agreement(counts[1.0, 1.0], counts[1.0, 0.0], counts[0.0, 1.0], counts[0.0, 0.0])


def disagreements(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the answers on which judge and exact match differ, those that only exact match calls right first."""
    found = [
        {
            "edit": row["edit"],
            "kind": row["kind"],
            "prompt": row["prompt"],
            "expected": row.get("expected"),
            "when": when,
            "answer": row.get(f"long_answer_{when}") or row.get(f"answer_{when}"),
            "judge": "right" if judged else "wrong",
            "exact_match": "right" if matched else "wrong",
        }
        for row, when, judged, matched in judged_answers(rows)
        if judged != matched
    ]
    return sorted(found, key=lambda each: each["judge"] == "right")


def judge_to_markdown(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """Return what a report says of its judge, as lines of Markdown; none without a judge."""
    judge = settings.get("judge")
    if not isinstance(judge, Mapping):
        return []
    lines = ["", f"Judge: {judge.get('label')}. {judge.get('counts')}"]
    agreement, differing = agreement_of(rows), disagreements(rows)
    if agreement is not None:
        lines.append(str(agreement))
    if differing:
        first = differing[:MAX_DISAGREEMENTS]
        names = ("kind", "when", "prompt", "expected", "answer", "judge", "exact_match")
        cells = [[_shown(each[name]) for name in names] for each in first]
        of_all = "" if len(first) == len(differing) else f", {len(first)} of {len(differing)}"
        lines += ["", f"Where they differ{of_all}:", "", markdown_table(names, cells)]
    lines += ["", f"The judge's prompt, sha256 {judge.get('prompt_sha256')}:", "", "```text"]
    return [*lines, str(judge.get("prompt")), "```"]


def _shown(text: object) -> str:
    shown = " ".join(str(text).split())
    return shown if len(shown) <= MAX_CHARACTERS else f"{shown[:MAX_CHARACTERS]}…"
