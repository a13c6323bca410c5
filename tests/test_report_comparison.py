"""Several reports side by side: values, paired differences, differing questions, the page and the files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_reports import example_report, result, row
from test_page import Reader

from peft_locft.evaluation import EvaluationReport, compare_reports
from peft_locft.evaluation.intervals import Bootstrap, Estimate
from peft_locft.reporting import draw_comparison, load_comparison, render_comparison, save_comparison


def report_of(scores: Sequence[float], *, sha256: str = "ab" * 32, **changes: Any) -> EvaluationReport:
    """Return a report of edits with these scores of the own prompt."""
    rows = [
        row(number, "reliability", f"prompt {number}", answer_after=f"answer {score}", exact_match_after=score)
        for number, score in enumerate(scores)
    ]
    table = np.array([scores], dtype=float).T
    after = Bootstrap(table, 1000, 0.95, 0).mean(0)
    assert after is not None
    settings = example_report().settings | {"edits": {"count": len(scores), "sha256": sha256}}
    results = {"reliability_exact_match": result(0.5, 0.25), "perplexity": result(30.0, 20.0, "windows")}
    results["reliability_exact_match"] = type(results["perplexity"])("", after, result(0.0).after, None, len(scores))
    return example_report(**({"rows": rows, "settings": settings, "results": results, "curves": []} | changes))


FIRST, SECOND = [1.0, 1.0, 0.0, 0.0] * 5, [1.0, 1.0, 1.0, 0.0] * 5


def test_metrics_stand_side_by_side_with_paired_differences() -> None:
    comparison = compare_reports({"one": report_of(FIRST), "two": report_of(SECOND)})
    assert comparison.metrics == ["reliability_exact_match", "perplexity"]
    assert [each and each.value for each in comparison.after("reliability_exact_match")] == [0.5, 0.75]
    difference = comparison.differences["reliability_exact_match"]["two"]
    table = np.array([SECOND, FIRST]).T
    assert difference == Bootstrap(table, 1000, 0.95, 0).difference(0, 1)
    assert difference.value == 0.25 and difference.low > 0
    # the intervals of the values overlap; their difference is paired, and is sure
    one, two = comparison.after("reliability_exact_match")
    assert one is not None and two is not None and one.high > two.low
    # windows of text are not among the rows
    assert "perplexity" not in comparison.differences


def test_a_question_without_a_score_in_one_report_is_left_out_of_the_pairs() -> None:
    unknown = report_of(SECOND)
    unknown.rows[2]["exact_match_after"] = None
    comparison = compare_reports({"one": report_of(FIRST), "two": unknown})
    kept = [number for number in range(20) if number != 2]
    table = np.array([np.array(SECOND)[kept], np.array(FIRST)[kept]]).T
    expected = Bootstrap(table, 1000, 0.95, 0).difference(0, 1)
    assert comparison.differences["reliability_exact_match"]["two"] == expected
    assert comparison.num_questions == 19


def test_the_questions_on_which_they_differ_are_listed() -> None:
    comparison = compare_reports({"one": report_of(FIRST), "two": report_of(SECOND)})
    assert [question.edit for question in comparison.differing_questions] == [2, 6, 10, 14, 18]
    question = comparison.differing_questions[0]
    assert (question.answers, question.passed) == (("answer 0.0", "answer 1.0"), (False, True))
    assert "5 of 20 questions are answered as they should be by one model and not by another." in str(comparison)


def test_equal_prompts_of_an_edit_are_told_apart() -> None:
    doubled = [report_of([0.0]), report_of([0.0])]
    for report, scores in zip(doubled, ((1.0, 0.0), (1.0, 1.0)), strict=True):
        report.rows[:] = [row(0, "locality", "same", unchanged_after=score) for score in scores]
    comparison = compare_reports({"one": doubled[0], "two": doubled[1]})
    assert (len(comparison.differing_questions), comparison.num_questions) == (1, 2)


def test_different_edits_have_no_paired_differences() -> None:
    comparison = compare_reports({"one": report_of(FIRST), "two": report_of(SECOND, sha256="cd" * 32)})
    assert comparison.differences == {} and comparison.differing_questions == []
    assert "No paired differences: the reports are of different edits." in str(comparison)
    assert "No paired differences: there is only one report." in str(compare_reports({"one": report_of(FIRST)}))
    assert "the reports are of different edits" in Reader(render_comparison(comparison)).text()


def test_a_value_before_is_shown_only_if_all_have_the_same_base() -> None:
    comparison = compare_reports({"one": report_of(FIRST), "two": report_of(SECOND)})
    assert comparison.before("reliability_exact_match") == result(0.0).after
    other = report_of(SECOND, results={"reliability_exact_match": result(0.5, 0.125)})
    assert compare_reports({"one": report_of(FIRST), "two": other}).before("reliability_exact_match") is None


def test_what_was_measured_in_another_way_is_said() -> None:
    other = report_of(SECOND)
    other.settings["chat_template"] = "on"
    other.settings["judge"] = {"label": "judge at http://host"}
    comparison = compare_reports({"one": report_of(FIRST), "two": other})
    assert comparison.differing_settings == {
        "chat_template": ["none", "on"],
        "judge": ["none", "judge at http://host"],
    }
    assert "Measured differently: chat_template (one: none, two: on)." in str(comparison)
    assert "Measured differently by chat template: one: none; two: on." in Reader(render_comparison(comparison)).text()


def test_reports_on_growing_lists_of_edits_are_a_curve() -> None:
    reports = {"all": report_of(SECOND), "few": report_of(SECOND[:4], sha256="cd" * 32)}
    comparison = compare_reports(reports)
    assert comparison.is_growing
    assert [point["num_edits"] for point in comparison.curve] == [4, 20]
    assert [point["reliability_exact_match"] for point in comparison.curve] == [0.75, 0.75]
    page = Reader(render_comparison(comparison))
    assert "After more and more edits" in page.text()
    same = compare_reports({"one": report_of(FIRST), "two": report_of(SECOND)})
    assert not same.is_growing and same.curve == []
    assert "After more and more edits" not in Reader(render_comparison(same)).text()


def test_no_report_is_refused() -> None:
    with pytest.raises(ValueError, match="found no report; expected at least one"):
        compare_reports({})


# ---------------------------------------------------------------------- files


def test_the_files_of_a_comparison(tmp_path: Path) -> None:
    for name, scores in (("one", FIRST), ("two", SECOND)):
        report_of(scores).save(tmp_path / "runs" / name / "evaluation")
    comparison = load_comparison([tmp_path / "runs" / name / "evaluation" for name in ("one", "two")])
    assert comparison.names == ["one", "two"]
    save_comparison(comparison, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "citations.bib",
        "comparison.csv",
        "comparison.html",
        "comparison.md",
        "comparison.tex",
    ]
    content = (tmp_path / "out" / "comparison.csv").read_text()
    read = list(csv.DictReader(io.StringIO(content, newline="")))
    assert [(each["metric"], each["report"], each["value"], each["difference"]) for each in read] == [
        ("reliability_exact_match", "one", "0.5", ""),
        ("reliability_exact_match", "two", "0.75", "0.25"),
        ("perplexity", "one", "30.0", ""),
        ("perplexity", "two", "30.0", ""),
    ]
    latex = (tmp_path / "out" / "comparison.tex").read_text()
    assert "metric & before & one & two \\\\" in latex and "% one: tiny, 20 edits" in latex
    assert comparison.to_latex(["perplexity"]).count("\\\\") == 2
    with pytest.raises(
        KeyError, match="rewrite: no report has it; expected one of reliability_exact_match, perplexity"
    ):
        comparison.to_latex(["rewrite"])


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a/evaluation", "b/evaluation"], ["a", "b"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["a/x/evaluation", "b/y/evaluation"], ["a/x", "b/y"]),
        (["out", "out/evaluation"], ["out", "evaluation"]),
        (["only"], ["only"]),
    ],
)
def test_reports_are_named_by_what_distinguishes_their_folders(
    folders: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        report_of(FIRST).save(folder)
    assert load_comparison(folders).names == names


def test_a_folder_given_twice_is_refused(tmp_path: Path) -> None:
    report_of(FIRST).save(tmp_path)
    with pytest.raises(ValueError, match="found a folder twice"):
        load_comparison([tmp_path, f"{tmp_path}/"])


# ---------------------------------------------------------------------- the page


def test_the_page_has_values_differences_and_answers() -> None:
    comparison = compare_reports({"one": report_of(FIRST), "two": report_of(SECOND)})
    page = render_comparison(comparison)
    text = Reader(page).text()
    assert text.startswith("2 models, compared Each value is from after the edit. Differences are from one , paired")
    assert "one tiny, 20 edits, protocols generation, 95% intervals (bootstrap)" in text
    assert '<span class="good">+0.250</span>' in page
    assert "5 of 20 questions are answered as they should be by one model and not by another" in text
    assert "2 edit prompt 2 Lyon ✗ answer 0.0 ✓ answer 1.0" in text
    assert Reader(page).tags.count("svg") == 1


def test_the_page_loads_and_runs_nothing_and_hostile_texts_stay_texts() -> None:
    attack = (
        "</td></table><script>alert(1)</script><img src=x onerror=alert(2)>\"'><style>*{display:none}</style>&amp;"
    )
    reports = {"one": report_of(FIRST), attack: report_of(SECOND)}
    for report in reports.values():
        report.rows[2] |= {"prompt": attack, "expected": attack, "kind": "reliability"}
        report.rows[2]["answer_after"] = attack
        report.settings["model"] = attack
    reports[attack].settings["chat_template"] = attack
    reader = Reader(render_comparison(compare_reports(reports)))
    usual = Reader(render_comparison(compare_reports({"one": report_of(FIRST), "two": report_of(SECOND)})))
    assert set(reader.tags) <= set(usual.tags) | {"span", "small"}
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert sum(text.count("<script>alert(1)</script>") for _, text in reader.texts) > 5


def test_the_picture_shows_every_report(tmp_path: Path) -> None:
    comparison = compare_reports({"one": report_of(FIRST), "$two_2$": report_of(SECOND)})
    draw_comparison(comparison, tmp_path / "comparison.svg")
    svg = (tmp_path / "comparison.svg").read_text()
    assert all(label in svg for label in ("one", "$two_2$", "before"))
    assert "reliability:" in svg
    nothing = compare_reports({"one": report_of(FIRST, results={"perplexity": result(2.0)})})
    with pytest.raises(ValueError, match="found no share to draw"):
        draw_comparison(nothing, tmp_path / "comparison.svg")


def test_estimates_of_other_kinds_of_metrics_are_compared_too() -> None:
    reports = {"one": report_of(FIRST), "two": report_of(SECOND)}
    for report in reports.values():
        report.results["task_accuracy"] = result(0.5)
    comparison = compare_reports(reports)
    assert comparison.after("task_accuracy") == [Estimate(0.5, 0.4, 0.6)] * 2
    assert "task accuracy" in Reader(render_comparison(comparison)).text()
