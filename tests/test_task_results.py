"""What becomes of the harness' own results: rows, table, files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from peft_locft.evaluation.task_results import TaskResults, TaskRow, task_rows

DOCUMENTS = {
    "before": {"acc": [1.0, 1.0, 0.0, 0.0], "exact_match": [0.0, 0.0, 1.0, 0.0]},
    "after": {"acc": [1.0, 0.0, 0.0, 1.0], "exact_match": [1.0, 1.0, 1.0, 0.0]},
}


def found(whose: str, perplexity: float) -> dict[str, Any]:
    """Return what `lm_eval.simple_evaluate` does, without what is not read of it."""
    acc, match = DOCUMENTS[whose]["acc"], DOCUMENTS[whose]["exact_match"]
    logs = [math.log(perplexity)] * 4
    figures = {
        "name": "facts",
        "alias": "facts",
        "sample_len": 4,
        "acc,none": sum(acc) / 4,
        "acc_stderr,none": 0.25,
        "perplexity,none": perplexity,
        "perplexity_stderr,none": "N/A",
        "exact_match,first word": sum(match) / 4,
        "exact_match_stderr,first word": 0.2,
    }
    samples: list[dict[str, Any]] = [
        {"doc_id": number, "filter": "none", "acc": acc[number], "perplexity": -logs[number]} for number in range(4)
    ]
    samples += [{"doc_id": number, "filter": "first word", "exact_match": match[number]} for number in range(4)]
    directions = {"acc": True, "perplexity": False}
    return {
        "results": {"facts": figures, "all": {"name": "all", "alias": "all", "acc,none": figures["acc,none"]}},
        "samples": {"facts": samples},
        "n-shot": {"facts": 5},
        "higher_is_better": {"facts": directions, "all": directions},
    }


def rows() -> list[TaskRow]:
    return list(task_rows(found("before", 20.0), found("after", 25.0)))


def test_each_figure_stands_beside_its_before() -> None:
    acc, perplexity, match, group = rows()
    assert (acc.task, acc.metric, acc.filter, acc.count, acc.num_fewshot) == ("facts", "acc", "none", 4, 5)
    assert (acc.before, acc.after, acc.change, acc.before_stderr) == (0.5, 0.5, 0.0, 0.25)
    assert (match.metric, match.filter, match.before, match.after) == ("exact_match", "first word", 0.25, 0.75)
    assert (perplexity.before, perplexity.after, perplexity.change) == (20.0, 25.0, 5.0)
    assert (acc.higher_is_better, perplexity.higher_is_better, match.higher_is_better) == (True, False, None)
    assert (group.task, group.count, group.num_fewshot, group.change) == ("all", None, None, 0.0)


def test_a_change_has_the_error_of_the_differences_by_document() -> None:
    acc, _, match, _ = rows()
    # differences 0, -1, 0, 1: variance 2 / 3; and 1, 1, 0, 0: variance 1 / 3
    assert acc.change_stderr == pytest.approx(math.sqrt(2 / 3 / 4))
    assert match.change_stderr == pytest.approx(math.sqrt(1 / 3 / 4))


def test_what_is_no_mean_of_documents_has_no_error_of_one() -> None:
    _, perplexity, _, group = rows()
    assert (perplexity.before_stderr, perplexity.change_stderr, group.change_stderr) == (None, None, None)
    before, after = found("before", 20.0), found("after", 25.0)
    del after["samples"]["facts"][0]["acc"]
    assert next(task_rows(before, after)).change_stderr is None
    one = [{"doc_id": 0, "filter": "none", "acc": 0.5}]
    before["samples"]["facts"] = after["samples"]["facts"] = one
    assert next(task_rows(before, after)).change_stderr is None


def test_without_a_base_there_is_no_before() -> None:
    for row in task_rows(None, found("after", 25.0)):
        assert row.after is not None
        assert [row.before, row.before_stderr, row.change, row.change_stderr] == [None] * 4


def test_a_figure_that_is_no_number_is_none() -> None:
    after = found("after", 25.0)
    after["results"]["facts"] |= {"perplexity,none": math.nan, "acc,none": "N/A"}
    acc, perplexity, *_ = task_rows(found("before", 20.0), after)
    assert [acc.after, acc.change, perplexity.after, perplexity.change] == [None] * 4
    assert (acc.before, perplexity.before) == (0.5, 20.0)


def test_the_table_says_it_all() -> None:
    table = str(TaskResults(rows(), {})).splitlines()
    assert table[2] == "| facts | acc | 0.500 ± 0.250 | 0.500 ± 0.250 | 0.000 ± 0.408 | 4 |"
    assert table[3] == "| facts | perplexity (lower is better) | 20 | 25 | 5.000 | 4 |"
    assert table[4] == "| facts | exact_match (first word) | 0.250 ± 0.200 | 0.750 ± 0.200 | 0.500 ± 0.289 | 4 |"
    assert table[5] == "| all | acc | 0.500 | 0.500 | 0.000 | - |"
    alone = str(TaskResults(list(task_rows(None, found("after", 25.0))), {})).splitlines()
    assert alone[2] == "| facts | acc | - | 0.500 ± 0.250 | - | 4 |"


def test_what_is_saved_is_what_was_found(tmp_path: Path) -> None:
    results = TaskResults(rows(), {"limit": None, "options": {"gen_kwargs": Path("x")}})
    results.save(tmp_path / "new" / "folder")
    saved = json.loads((tmp_path / "new" / "folder" / "tasks.json").read_text())
    assert [TaskRow(**row) for row in saved["rows"]] == results.rows
    assert saved["settings"] == {"limit": None, "options": {"gen_kwargs": "x"}}
    assert (tmp_path / "new" / "folder" / "tasks.md").read_text() == f"{results}\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        results.save(tmp_path / "file")
