"""What an evaluation found: every figure beside its before, with its interval, and every answer behind it."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bootstrap import Estimate
from .files import write_whole

logger = logging.getLogger(__name__)

DASH = "-"


@dataclass(frozen=True, slots=True)
class Result:
    """One metric.

    Attributes:
        meaning: what it tells, in words.
        after: of the edited model.
        before: of the base; `None` where it has none, or where there is no base.
        change: `after` less `before`, its interval from the same resamples of both.
        count: how many edits, or windows of text, it is the mean of.
        unit: what is counted.
    """

    meaning: str
    after: Estimate
    before: Estimate | None
    change: Estimate | None
    count: int
    unit: str = "edits"


@dataclass(frozen=True)
class EvaluationReport:
    """What [`evaluate_edits`] returns.

    Attributes:
        results: by the metric's name.
        missing: metrics that could not be measured, each with the reason. None of them is a zero.
        rows: a dictionary a prompt: edit, source, kind, prompt, expected answer, answers and scores before and after.
        settings: what was measured, and how.
        notes: what a reader of the figures should know.
        curves: figures by epoch, each with an `epoch`, where the training run has left any.

    Example:
        >>> report = evaluate_edits(peft_model, tokenizer, edits)
        >>> report["reliability_exact_match"].after
        Estimate(value=0.995, low=0.985, high=1.0)
        >>> report.save("evaluation")
    """

    results: dict[str, Result]
    missing: dict[str, str]
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    curves: list[dict[str, float]] = field(default_factory=list)

    def __getitem__(self, name: str) -> Result:
        """Return one metric's result.

        Raises:
            KeyError: if it was not measured; the message says why.
        """
        if name not in self.results:
            why = self.missing.get(name, f"expected one of {', '.join(self.results)}")
            raise KeyError(f"{name} was not measured: {why}")
        return self.results[name]

    def __str__(self) -> str:
        return self.to_markdown()

    @property
    def has_before(self) -> bool:
        return any(result.before is not None for result in self.results.values())

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of edits not learned, rephrasings not answered, and locality probes that changed."""
        for row in self.rows:
            wanted = ("unchanged", "exact_match") if row["kind"] == "locality" else ("exact_match", "token_accuracy")
            score = next((row[f"{name}_after"] for name in wanted if row.get(f"{name}_after") is not None), None)
            if score is not None and score < 1:
                yield row

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, for JSON."""

        def plain(estimate: Estimate | None) -> dict[str, float] | None:
            return None if estimate is None else estimate._asdict()

        results = {
            name: {
                "meaning": result.meaning,
                "before": plain(result.before),
                "after": plain(result.after),
                "change": plain(result.change),
                "count": result.count,
                "unit": result.unit,
            }
            for name, result in self.results.items()
        }
        return {
            "format": 1,
            "settings": self.settings,
            "results": results,
            "missing": self.missing,
            "notes": self.notes,
            "curves": self.curves,
            "rows": self.rows,
        }

    def to_markdown(self) -> str:
        """Return the metrics as one Markdown table, and what could not be measured."""
        lines = ["| metric | before | after | change | of |", "| --- | --- | --- | --- | --- |"]
        for name, result in self.results.items():
            figures = (str(each) if each else DASH for each in (result.before, result.after, result.change))
            lines.append(f"| {name} | {' | '.join(figures)} | {result.count} {result.unit} |")
        confidence = self.settings["confidence"]
        lines += ["", f"In brackets, the interval of {confidence:.0%} confidence (bootstrap)."]
        lines += [f"Not measured: {', '.join(names)}: {why}." for why, names in self.missing_by_reason().items()]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def missing_by_reason(self) -> dict[str, list[str]]:
        reasons: dict[str, list[str]] = {}
        for name, why in self.missing.items():
            reasons.setdefault(why, []).append(name)
        return reasons

    def to_csv(self) -> str:
        """Return the rows as CSV."""
        text = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        return text.getvalue()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `evaluation.json`, `evaluation.md`, `evaluation.html` and `answers.csv`, each whole or not at all.

        The page has its pictures in it; without matplotlib (the extra `plot`) it has none, and says so.

        Args:
            folder: made if it is not there.

        Raises:
            NotADirectoryError: if it is a file.
        """
        from .report_page import page  # here, so that figures can be had without pictures

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "answers.csv", self.to_csv())
        write_whole(folder / "evaluation.md", self.to_markdown() + "\n")
        write_whole(folder / "evaluation.html", page(self))
        # the last, so that where it is the others are, too
        write_whole(folder / "evaluation.json", json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
