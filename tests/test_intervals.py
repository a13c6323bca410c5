"""Intervals: what they cover, and where they come from."""

from __future__ import annotations

import numpy as np
import pytest

from peft_locft.evaluation.intervals import Bootstrap, Estimate


def test_the_interval_of_a_share_is_that_of_its_binomial() -> None:
    values = np.array([1.0] * 60 + [0.0] * 140)[:, None]
    estimate = Bootstrap(values, num_resamples=4000).mean(0)
    assert estimate is not None
    assert estimate.value == pytest.approx(0.3)
    # 1.96 * sqrt(0.3 * 0.7 / 200)
    assert (estimate.low, estimate.high) == (pytest.approx(0.3 - 0.0635, abs=0.01), pytest.approx(0.3635, abs=0.01))


def test_it_covers_the_true_share_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    hits = 0
    for run in range(200):
        estimate = Bootstrap((random.random((100, 1)) < 0.6).astype(float), 400, seed=run).mean(0)
        assert estimate is not None
        hits += estimate.low <= 0.6 <= estimate.high
    assert 180 <= hits <= 199


@pytest.mark.parametrize(("value", "low", "high"), [(1.0, 0.025 ** (1 / 50), 1.0), (0.0, 0.0, 1 - 0.025 ** (1 / 50))])
def test_where_all_agree_the_bound_is_that_of_clopper_and_pearson(value: float, low: float, high: float) -> None:
    assert Bootstrap(np.full((50, 1), value)).mean(0) == pytest.approx((value, low, high))


def test_a_column_is_averaged_over_the_units_that_it_has() -> None:
    table = np.array([[1.0, np.nan], [0.0, np.nan], [np.nan, np.nan], [1.0, np.nan]])
    bootstrap = Bootstrap(table)
    estimate = bootstrap.mean(0)
    assert estimate is not None and estimate.value == pytest.approx(2 / 3)
    assert bootstrap.mean(1) is None


def test_a_difference_is_paired() -> None:
    random = np.random.default_rng(0)
    before = random.random(100)
    bootstrap = Bootstrap(np.stack([before + 0.1, before], axis=1))
    change = bootstrap.difference(0, 1)
    assert change is not None
    assert (change.low, change.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_the_same_seed_gives_the_same_interval_and_another_does_not() -> None:
    table = np.random.default_rng(0).random((30, 1))
    assert Bootstrap(table, seed=1).mean(0) == Bootstrap(table, seed=1).mean(0)
    assert Bootstrap(table, seed=1).mean(0) != Bootstrap(table, seed=2).mean(0)


def test_many_units_are_resampled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(0).random((30, 1))
    whole = Bootstrap(table, num_resamples=100)
    monkeypatch.setattr("peft_locft.evaluation.intervals.MAX_COUNTS", 70)
    pieces = Bootstrap(table, num_resamples=100)
    assert np.allclose(whole.means, pieces.means, rtol=1e-12)


@pytest.mark.parametrize("arguments", [{"num_resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_what_gives_no_interval_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected at least 1, and a number between 0 and 1"):
        Bootstrap(np.zeros((2, 1)), **arguments)  # type: ignore[arg-type]


def test_an_estimate_is_printed_with_its_interval() -> None:
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert str(Estimate(29.61, 26.0, 33.25)) == "29.61 [26, 33.25]"
