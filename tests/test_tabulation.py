"""From replies to columns and rows: means by edit, and that nothing is scored twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peft_locft import Edit, Probe
from peft_locft.engine.questions import Score
from peft_locft.evaluation.items import Reply, eval_items
from peft_locft.evaluation.kinds import PUBLISHED
from peft_locft.evaluation.metrics import METRICS
from peft_locft.evaluation.tabulation import PairedReplies

EDITS = [
    Edit(
        prompt="The capital of Spain is",
        target="Paris",
        ground_truth="Madrid",
        rephrasings=("Spain's capital:", "The city of Spain is"),
        locality=(Probe("The river is", "the Seine"),),
        portability=(Probe("The king lives in", "Paris"),),
    ),
    Edit(prompt="The king of France is", target="Dave", ground_truth="Louis"),
]
PROTOCOLS = ["generation", "token_accuracy", "probability"]


def paired(right_before: bool = False) -> PairedReplies:
    """Return replies of a model that knows every answer, and of a base that knows all of them or none."""
    items = eval_items(EDITS)

    def reply(expected: str | None, is_right: bool) -> Reply:
        text = expected if is_right else "nothing"
        score, other = Score([-1.0], [7 if is_right else 8]), Score([-2.0 if is_right else -0.5], [9])
        return Reply(text, text, (), score, (7,), other)

    after = [reply(item.expected, True) for item in items]
    return PairedReplies(EDITS, items, after, [reply(item.expected, right_before) for item in items])


def test_a_column_is_the_mean_of_each_edits_items() -> None:
    replies = paired()
    wrong = replace(replies.after[1], text="Madrid")  # one of two rephrasings
    columns, missing = (
        PairedReplies(EDITS, replies.items, [replies.after[0], wrong, *replies.after[2:]], replies.before)
        .scored(PROTOCOLS)
        .columns()
    )
    assert missing == {}
    np.testing.assert_array_equal(columns["reliability_exact_match"].after, [1, 1])
    np.testing.assert_array_equal(columns["generalization_exact_match"].after, [0.5, np.nan])
    assert columns["reliability_exact_match"].before is not None
    np.testing.assert_array_equal(columns["reliability_exact_match"].before, [0, 0])
    assert columns["locality_unchanged"].before is None
    np.testing.assert_array_equal(columns["locality_unchanged"].after, [0, np.nan])


def test_a_row_has_the_scores_that_apply_to_its_kind() -> None:
    rows = paired(right_before=True).scored(PROTOCOLS).rows()
    assert [row["kind"] for row in rows] == [
        "reliability", "generalization", "generalization", "locality", "portability", "reliability"
    ]  # fmt: skip
    assert rows[0]["exact_match_before"] == rows[0]["exact_match_after"] == 1.0
    assert rows[0]["unchanged_after"] is None and rows[3]["unchanged_after"] == 1.0
    assert "unchanged_before" not in rows[3]
    assert rows[4]["more_probable_after"] is None


def test_every_item_is_scored_once_by_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[Any] = Counter()

    def counting(name: str) -> Any:
        metric = METRICS[name]

        def score(item: Any, reply: Any, base: Any) -> float | None:
            assert name in PUBLISHED[item.kind].metrics
            calls[name, item.prompt, id(reply)] += 1
            return metric.score(item, reply, base)

        return replace(metric, score=score)

    for name in METRICS:
        monkeypatch.setitem(METRICS, name, counting(name))
    scored = paired().scored(PROTOCOLS)
    scored.columns(), scored.rows(), scored.columns()
    assert set(calls.values()) == {1}
    assert {name for name, _, _ in calls} == {name for kind in PUBLISHED.values() for name in kind.metrics}
