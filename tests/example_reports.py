"""Evaluation reports made by hand, for what is written of them."""

from __future__ import annotations

from typing import Any

from peft_locft.evaluation.intervals import Estimate
from peft_locft.evaluation.metric_result import MetricResult
from peft_locft.evaluation.report import EvaluationReport


def row(edit: int, kind: str, prompt: str = "The capital of France is", **fields: Any) -> dict[str, Any]:
    """Return a row as `evaluate_edits` makes it of generation."""
    empty: dict[str, Any] = {
        "edit": edit,
        "source": f"edits.json:{edit + 1}",
        "kind": kind,
        "prompt": prompt,
        "expected": "Lyon",
        "answer_before": "Paris",
        "answer_after": "Lyon",
        "exact_match_before": 0.0,
        "exact_match_after": 1.0,
        "unchanged_after": None,
    }
    return empty | fields


def result(after: float, before: float | None = None, unit: str = "edits") -> MetricResult:
    """Return a result with an interval of 0.1 on both sides."""

    def around(value: float) -> Estimate:
        return Estimate(value, value - 0.1, value + 0.1)

    if before is None:
        return MetricResult("what it tells", around(after), None, None, 2, unit)
    return MetricResult("what it tells", around(after), around(before), around(after - before), 2, unit)


def example_report(**changes: Any) -> EvaluationReport:
    """Return a report on two edits, the second without its rephrasing learned, with some of its parts changed."""
    parts: dict[str, Any] = {
        "results": {
            "reliability_exact_match": result(0.875, 0.125),
            "generalization_exact_match": result(0.5, 0.25),
            "locality_unchanged": result(0.375),
            "edit_score": result(0.75, 0.5),
            "perplexity": result(31.5, 20.25, "windows"),
        },
        "missing": {"portability_exact_match": "no edit has portability probes"},
        "rows": [
            row(0, "reliability"),
            row(0, "generalization", "France has the capital"),
            row(0, "locality", "The capital of Spain is", expected="Madrid", unchanged_after=1.0),
            row(1, "reliability"),
            row(1, "generalization", "France's capital?", answer_after="Paris", exact_match_after=0.0),
            row(1, "locality", "The Seine is in", expected="Paris", answer_after="Lyon", unchanged_after=0.0),
        ],
        "settings": {
            "model": "models/tiny",
            "dtype": "bfloat16",
            "adapters": ["default"],
            "edits": {"count": 2, "sha256": "0123456789abcdef" * 4},
            "protocols": ["generation"],
            "num_resamples": 1000,
            "confidence": 0.95,
            "versions": {"peft-locft": "0.1.0"},
        },
        "notes": ["1 edits have the prompt of another."],
        "curves": [
            {"epoch": 2, "reliability_exact_match": 0.875, "loss": 0.0625},
            {"epoch": 1, "reliability_exact_match": 0.5, "locality_unchanged": 0.75, "loss": 2.5},
        ],
    }
    return EvaluationReport(**parts | changes)
