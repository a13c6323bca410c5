"""Reports of evaluations: the table, the rows, and what is saved and read again."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from example_reports import example_report, result, row

from peft_locft import save_report
from peft_locft.evaluation.intervals import Estimate
from peft_locft.evaluation.metric_result import MetricResult
from peft_locft.evaluation.report import EvaluationReport
from peft_locft.evaluation.summary import deciding_score
from peft_locft.reporting import page as report_page

FILES = [
    "answers.csv",
    "citations.bib",
    "evaluation.html",
    "evaluation.json",
    "evaluation.md",
    "evaluation.tex",
    "metrics.csv",
]


def test_a_metric_is_had_by_its_name() -> None:
    assert example_report()["edit_score"] == result(0.75, 0.5)


def test_a_metric_that_was_not_measured_says_why() -> None:
    report = example_report()
    with pytest.raises(KeyError, match="portability_exact_match was not measured: no edit has portability probes"):
        report["portability_exact_match"]
    with pytest.raises(KeyError, match="rewrite was not measured: expected one of reliability_exact_match, gen"):
        report["rewrite"]


def test_the_table_has_every_metric_what_is_missing_and_the_notes() -> None:
    text = str(example_report())
    lines = text.splitlines()
    assert lines[0] == "| metric | before | after | change | measured on |"
    assert "| locality_unchanged | - | 0.375 [0.275, 0.475] | - | 2 edits |" in lines
    assert "| perplexity | 20.25 [20.15, 20.35] | 31.5 [31.4, 31.6] | 11.25 [11.15, 11.35] | 2 windows |" in lines
    assert "In brackets: the 95% confidence interval (bootstrap)." in lines
    assert "Not measured: portability_exact_match: no edit has portability probes." in lines
    assert lines[-1] == "Note: 1 edits have the prompt of another."


@pytest.mark.parametrize(("confidence", "shown"), [(0.95, "95%"), (0.975, "97.5%"), (0.999, "99.9%"), (0.29, "29%")])
def test_confidence_is_not_rounded(confidence: float, shown: str) -> None:
    assert example_report(settings={"confidence": confidence}).confidence == shown


def test_reasons_have_the_metrics_that_they_are_of() -> None:
    missing = {"a": "no probes", "b": "no base", "c": "no probes"}
    assert example_report(missing=missing).missing_by_reason() == {"no probes": ["a", "c"], "no base": ["b"]}


def test_failures_are_what_was_not_learned_and_what_changed() -> None:
    assert [(each["edit"], each["kind"]) for each in example_report().failures()] == [
        (1, "generalization"),
        (1, "locality"),
    ]


@pytest.mark.parametrize(
    ("kind", "scores", "deciding"),
    [
        ("reliability", {"exact_match": 1.0, "token_accuracy": 0.5}, ("exact_match", 1.0)),
        ("reliability", {"exact_match": None, "token_accuracy": 0.5}, ("token_accuracy", 0.5)),
        ("portability", {"more_probable": 0.0}, ("more_probable", 0.0)),
        ("locality", {"exact_match": 0.0, "unchanged": 1.0}, ("unchanged", 1.0)),
        ("locality", {"exact_match": None, "tokens_unchanged": 0.5, "token_accuracy": 1.0}, ("tokens_unchanged", 0.5)),
        ("locality", {"exact_match": 0.0, "unchanged": None}, ("exact_match", 0.0)),
        ("locality", {"exact_match": None}, None),
        ("reliability", {"unchanged": 0.0}, None),
    ],
)
def test_a_row_is_judged_by_the_best_measure_it_has(
    kind: str, scores: dict[str, float | None], deciding: tuple[str, float] | None
) -> None:
    judged: dict[str, Any] = {"kind": kind} | {f"{name}_after": score for name, score in scores.items()}
    assert deciding_score(judged) == deciding


def test_rows_come_back_from_csv() -> None:
    hostile = 'one, "two"\r\nthree\rfour\nfive;\t=1+1 é 日本'
    rows = [row(0, "reliability", hostile, answer_before=None), row(1, "locality", expected=None, unchanged_after=0.5)]
    read = list(csv.DictReader(io.StringIO(example_report(rows=rows).to_csv(), newline="")))
    assert read == [{name: "" if value is None else str(value) for name, value in each.items()} for each in rows]
    assert read[0]["prompt"] == hostile


def test_no_rows_are_an_empty_csv() -> None:
    assert example_report(rows=[]).to_csv() == ""


def test_a_saved_report_comes_back(tmp_path: Path) -> None:
    report = example_report()
    save_report(report, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == FILES
    assert EvaluationReport.load(tmp_path / "new" / "folder") == report
    saved = (tmp_path / "new" / "folder" / "answers.csv").read_bytes()
    assert saved == report.to_csv().encode()


def test_what_is_not_finite_comes_back_from_json_that_others_can_read(tmp_path: Path) -> None:
    broken = MetricResult(
        "p", Estimate(math.inf, 3.0, math.inf), result(2.0).after, Estimate(math.nan, 1, 2), 3, "windows"
    )
    report = example_report(results={"perplexity": broken}, curves=[{"epoch": 1, "loss": math.nan}])
    save_report(report, tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=refuse)
    loaded = EvaluationReport.load(tmp_path)
    assert loaded["perplexity"].after == broken.after
    assert loaded["perplexity"].change is not None and math.isnan(loaded["perplexity"].change.value)
    assert math.isnan(loaded.curves[0]["loss"])


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    save_report(example_report(), tmp_path)
    later = example_report(notes=["later"])
    save_report(later, tmp_path)
    assert EvaluationReport.load(tmp_path) == later
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_a_page_that_cannot_be_made_costs_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(report: EvaluationReport) -> str:
        raise RuntimeError("no pencil")

    monkeypatch.setattr(report_page, "render_report", fail)
    with pytest.raises(RuntimeError, match="no pencil"):
        save_report(example_report(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in FILES if not name.endswith("html")]
    assert EvaluationReport.load(tmp_path) == example_report()


def test_what_is_no_json_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_report(example_report(settings={"confidence": 0.95, "model": object()}), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=r"Cannot save .*file is a file\. Choose another folder\."):
            save_report(example_report(), place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_a_report_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json: found no such file; expected a folder that"):
        EvaluationReport.load(tmp_path)


def changed(**parts: Any) -> str:
    return json.dumps(example_report().to_dict() | parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"evaluation\.json: Expecting property name"),
        ("\xff", r"evaluation\.json: .*decode"),
        ("[]", r"evaluation\.json: found format None; expected 1: is it a report of evaluate_edits\?"),
        (changed(format=2), "found format 2; expected 1: update peft-locft, which has written it"),
        (changed(rows={}), "rows: found dict; expected list"),
        (changed(settings={}), "settings: found confidence None; expected a number"),
        (changed(rows=[{"edit": 1}]), r"rows\[0\]: expected a row with edit, kind and prompt"),
        (changed(curves=[{"loss": 1.0}]), r"curves\[0\]: expected figures by name: it has no epoch"),
        (changed(curves=[[]]), r"curves\[0\]: expected figures by name"),
        (changed(results={"x": {"after": None}}), "results.x: expected a metric's result: it has no figure after"),
        (changed(results={"x": {"after": {"value": 1}}}), "results.x: expected a metric's result: 'low'"),
        (changed(results={"x": 1}), "results.x: expected a metric's result"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        EvaluationReport.load(tmp_path)


# ---------------------------------------------------------------------- for a reader in a hurry, and in a notebook


def test_the_summary_says_it_in_sentences() -> None:
    assert example_report().summary().splitlines() == [
        "2 of 2 edits learned (0 before).",
        "1 of 2 prompts in other words are answered with the target.",
        "1 of 2 other answers changed.",
        "Perplexity of ordinary text: 20.25 before, 31.5 after.",
    ]


def test_the_summary_names_an_edit_that_was_not_learned() -> None:
    rows = [row(0, "reliability"), row(1, "reliability", "Where?", answer_after=" Paris ", exact_match_after=0.0)]
    rows.append(row(1, "portability", "And then?"))
    assert example_report(rows=rows, results={}).summary().splitlines() == [
        "1 of 2 edits learned (0 before).",
        "Not learned, for example: 'Where?' is answered with 'Paris'.",
        "1 of 1 questions that follow from the edits are answered right.",
    ]


def test_a_target_with_a_full_stop_is_learned_if_the_answer_contains_it() -> None:
    edited = row(0, "reliability", expected="St. Ives", exact_match_after=0.0, contains_before=0.0)
    for contained, said in ((1.0, "1 of 1 edits learned (0 before)."), (0.0, "0 of 1 edits learned (0 before).")):
        summary = example_report(rows=[edited | {"contains_after": contained}], results={}).summary()
        assert summary.splitlines()[0] == said


def test_without_a_base_the_summary_compares_with_nothing() -> None:
    rows = [row(0, "reliability"), row(0, "locality"), row(1, "locality", exact_match_after=0.0)]
    unknown = {"answer_before": None, "exact_match_before": None}
    assert example_report(rows=[each | unknown for each in rows], results={}).summary().splitlines() == [
        "1 of 1 edits learned.",
        "1 of 2 other questions are answered right.",
    ]


def test_the_summary_of_a_report_without_rows_has_its_metrics() -> None:
    report = EvaluationReport.from_dict(example_report(results={"a": result(0.5)}).summary_to_dict(), summary=True)
    assert report.summary() == "a: 0.500 [0.400, 0.600]"


def test_a_data_frame_has_a_row_for_each_answer() -> None:
    frame = example_report().to_pandas()
    assert list(frame["answer_after"]) == [each["answer_after"] for each in example_report().rows]
    assert frame.groupby("kind")["exact_match_after"].mean()["generalization"] == 0.5


def test_a_notebook_shows_summary_metrics_and_failures_without_markup_from_answers() -> None:
    rows = [row(0, "reliability", "<b>Where?</b>", answer_after="<script>", exact_match_after=0.0)] * 21
    html = example_report(rows=rows)._repr_html_()
    assert html.startswith("<p>0 of 21 edits learned (0 before).<br>Not learned, for example: &#x27;&lt;b&gt;Where")
    assert "<tr><td>perplexity</td><td>20.25 [20.15, 20.35]</td>" in html
    assert "<p>21 failed answers, the first 20</p>" in html and html.count("&lt;script&gt;") == 21
    assert "<script>" not in html and "<b>" not in html
    assert "failed answers" not in example_report(rows=[row(0, "reliability")])._repr_html_()


# ---------------------------------------------------------------------- for a paper


def test_the_metrics_as_latex_and_csv() -> None:
    latex = example_report().to_latex(["locality_unchanged", "perplexity"])
    assert latex.splitlines() == [
        "% tiny, 2 edits, protocols generation, 95% intervals (bootstrap)",
        "\\begin{tabular}{lrrrr}",
        "\\toprule",
        "metric & before & after & change & measured on \\\\",
        "\\midrule",
        "locality unchanged & -- & 0.375 {\\scriptsize [0.275, 0.475]} & -- & 2 edits \\\\",
        "perplexity & 20.25 {\\scriptsize [20.15, 20.35]} & 31.5 {\\scriptsize [31.4, 31.6]} & 11.25 {\\scriptsize "
        "[11.15, 11.35]} & 2 windows \\\\",
        "\\bottomrule",
        "\\end{tabular}",
    ]
    with pytest.raises(KeyError, match="portability_exact_match was not measured: no edit has portability probes"):
        example_report().to_latex(["portability_exact_match"])
    read = list(csv.DictReader(io.StringIO(example_report().metrics_to_csv(), newline="")))
    assert [each["metric"] for each in read] == list(example_report().results)
    assert (read[2]["before"], read[2]["after"], read[2]["after_low"], read[2]["unit"]) == (
        "",
        "0.375",
        "0.275",
        "edits",
    )


def test_it_cites_the_method_the_data_and_the_protocols() -> None:
    usual = example_report()
    assert usual.papers() == ["yang2025finetuning"]  # of the protocol
    rows = [row(0, "reliability", source="data/MzsRE_zh.json:1"), row(1, "reliability", source="zsre_3k.json:2")]
    settings = usual.settings | {"methods": ["LORA", "OTHER"], "protocols": ["probability", "fluency", "generation"]}
    report = example_report(rows=rows, settings=settings)
    assert report.papers() == [
        "hu2022lora",
        "wang2023retrieval",
        "levy2017zeroshot",
        "mitchell2022fast",
        "meng2022locating",
        "yang2025finetuning",
    ]
    entries = report.citations().split("\n\n")
    assert [entry.partition("{")[2].partition(",")[0] for entry in entries] == report.papers()
    assert all(entry.count("{") == entry.count("}") and "eprint" in entry for entry in entries)
    assert example_report(rows=[], settings={"confidence": 0.95}).citations() == ""
