"""A report by relation, and the rows to look at first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from example_reports import row

from peft_locft import Edit
from peft_locft.evaluation.groups import edit_groups
from peft_locft.evaluation.relation_labels import relation_label
from peft_locft.evaluation.worst import least_learned, most_damaged

SETTINGS = {"confidence": 0.95, "num_resamples": 100, "edits": {"count": 20}}


def test_a_relation_is_that_of_the_data_set_or_the_prompt_without_its_subject() -> None:
    prompt = "The capital of France, in France, is"
    assert relation_label(Edit(prompt, "Lyon", subject="France", relation="P36")) == "P36"
    assert relation_label(Edit(prompt, "Lyon", subject="France")) == "The capital of {}, in {}, is"
    assert relation_label(Edit(prompt, "Lyon", subject="Spain")) is None
    assert relation_label(Edit(prompt, "Lyon")) is None


def rows_of(relations: Sequence[str | None]) -> list[dict[str, Any]]:
    """Return an own prompt and a probe for each edit; the edits of "capital" are learned."""
    return [
        each | {"relation": relation}
        for number, relation in enumerate(relations)
        for each in (
            row(number, "reliability", exact_match_after=float(relation == "capital")),
            row(number, "locality", unchanged_after=float(number % 2)),
        )
    ]


def test_groups_have_counts_and_intervals_and_small_ones_stand_together() -> None:
    rows = rows_of([*["mayor"] * 5, *["capital"] * 8, "a", "b", "c", None])
    large, smaller, others = edit_groups(rows, SETTINGS)
    assert [(each.name, each.num_edits, each.num_groups) for each in (large, smaller, others)] == [
        ("capital", 8, 1),
        ("mayor", 5, 1),
        (None, 3, 3),
    ]
    assert list(large.results) == ["reliability_exact_match", "locality_unchanged"]
    capital, mayor = (each.results["reliability_exact_match"] for each in (large, smaller))
    assert (capital.count, capital.after.value, capital.after.high) == (8, 1.0, 1.0)
    # Clopper and Pearson's bound of 8 of 8, and of 0 of 5
    assert capital.after.low == pytest.approx(0.025 ** (1 / 8))
    assert (mayor.after.low, mayor.after.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 5)))
    assert capital.before is not None and capital.before.value == 0.0
    assert large.results["locality_unchanged"].after.value == 0.5
    assert large.results["locality_unchanged"].before is None


@pytest.mark.parametrize("relations", [["a"] * 9, [None] * 9, ["a", "b", "c", "d"], []])
def test_without_two_groups_or_a_large_one_there_is_nothing_to_compare(relations: list[str | None]) -> None:
    assert edit_groups(rows_of(relations), SETTINGS) == []


def test_rows_of_an_older_report_have_no_groups() -> None:
    assert edit_groups([row(0, "reliability"), row(1, "reliability")], SETTINGS) == []


def test_another_column_may_name_the_groups() -> None:
    rows = [each | {"language": "zh" if each["edit"] < 5 else "en"} for each in rows_of(["a"] * 10)]
    assert [group.name for group in edit_groups(rows, SETTINGS, "language")] == ["zh", "en"]


def test_the_least_learned_begin_with_own_prompts_and_few_right_tokens() -> None:
    rows = [
        row(0, "generalization", exact_match_after=0.0, token_accuracy_after=0.0),
        row(1, "reliability", exact_match_after=0.0, token_accuracy_after=0.5),
        row(2, "reliability", exact_match_after=0.0, token_accuracy_after=0.25),
        row(3, "reliability", exact_match_after=1.0, token_accuracy_after=0.0),
        row(4, "reliability", exact_match_after=0.0),
        row(5, "locality", unchanged_after=0.0),
    ]
    assert [each["edit"] for each in least_learned(rows)] == [2, 1, 4, 0]
    assert [each["edit"] for each in least_learned(rows, 2)] == [2, 1]


def test_the_most_damaged_begin_with_what_was_right() -> None:
    rows = [
        row(0, "locality", unchanged_after=0.0, tokens_unchanged_after=0.0, exact_match_after=0.0),
        row(1, "locality", unchanged_after=0.0, exact_match_before=1.0, exact_match_after=0.0),
        row(2, "locality", unchanged_after=0.0, tokens_unchanged_after=0.5, exact_match_after=0.0),
        row(3, "locality", unchanged_after=1.0),
        row(4, "locality", unchanged_after=0.0, contains_before=1.0, contains_after=0.0, tokens_unchanged_after=0.9),
        row(5, "locality", unchanged_after=0.0, contains_before=1.0, contains_after=1.0, tokens_unchanged_after=0.2),
        row(6, "reliability", exact_match_after=0.0),
    ]
    assert [each["edit"] for each in most_damaged(rows)] == [4, 1, 0, 5, 2]
