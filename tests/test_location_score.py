"""The score: a weighted harmonic mean of what an evaluation found."""

from __future__ import annotations

import math

import pytest
from example_reports import result

from peft_locft.evaluation.metric_result import MetricResult
from peft_locft.evaluation.report import EvaluationReport
from peft_locft.locating.score import LocationScore


def report(**figures: MetricResult) -> EvaluationReport:
    return EvaluationReport(figures, {"locality_unchanged": "no edit has locality probes"}, [], {"confidence": 0.95})


def test_it_is_the_weighted_harmonic_mean() -> None:
    found = report(reliability_exact_match=result(1.0), generalization_exact_match=result(0.5))
    assert LocationScore({"reliability_exact_match": 1, "generalization_exact_match": 1}).of(found) == 2 / 3
    assert LocationScore({"reliability_exact_match": 1, "generalization_exact_match": 3}).of(found) == 4 / 7


def test_a_metric_at_0_does_not_hide_the_others() -> None:
    score = LocationScore({"reliability_exact_match": 1, "locality_unchanged": 1})
    low, high = (report(reliability_exact_match=result(value), locality_unchanged=result(0.0)) for value in (0.5, 1.0))
    assert 0 < score.of(low) < score.of(high) < 0.02


def test_harm_to_the_model_is_a_share_of_what_it_was() -> None:
    assert LocationScore({"perplexity": 1}).of(report(perplexity=result(40.0, 30.0))) == 0.75
    assert LocationScore({"perplexity": 1}).of(report(perplexity=result(20.0, 30.0))) == 1
    assert LocationScore({"kl_from_base": 1}).of(report(kl_from_base=result(0.5))) == pytest.approx(math.exp(-0.5))


def test_the_default_takes_what_can_be_told() -> None:
    score = LocationScore.default(["reliability", "locality"], has_text=True)
    assert list(score.weights) == ["reliability_token_accuracy", "locality_tokens_unchanged", "kl_from_base"]
    assert str(score) == f"harmonic mean of {', '.join(score.weights)}"
    assert score.protocols == ["token_accuracy"] and score.needs_text


def test_it_says_what_must_be_asked() -> None:
    assert LocationScore({"locality_unchanged": 1, "edit_score": 2}).protocols == ["generation", "probability"]
    assert LocationScore({"perplexity": 1}).protocols == ["token_accuracy"]
    assert str(LocationScore({"edit_score": 2})) == "harmonic mean of 2 x edit_score"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "score: found no metric; expected one or more of reliability_exact_match"),
        ({"locality": 1.0}, "score: found locality; expected one or more of"),
        ({"perplexity": 0.0}, r"score: found perplexity=0.0; expected a weight above 0"),
        ({"perplexity": math.nan}, "score: found perplexity=nan"),
    ],
)
def test_a_score_that_cannot_be(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocationScore(weights)


def test_a_score_of_nothing_measured_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"none of locality_unchanged could be measured: .*no edit has locality probes"
    ):
        LocationScore({"locality_unchanged": 1}).of(report())
