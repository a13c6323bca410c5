"""The page of a report: what is in it, that it needs nothing else, and that texts stay texts."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from example_reports import example_report, result, row
from jinja2 import UndefinedError
from markupsafe import Markup

from peft_locft.evaluation.intervals import Estimate
from peft_locft.evaluation.kinds import ALL_KINDS
from peft_locft.evaluation.metric_result import MetricResult
from peft_locft.evaluation.metrics import EDIT_SCORE, Protocol, metric_names
from peft_locft.evaluation.perplexity import TextMeasurement
from peft_locft.evaluation.report import EvaluationReport
from peft_locft.reporting import page as report_page
from peft_locft.reporting.page import MAX_CHARACTERS, MAX_FAILURES, page_templates, render_report
from peft_locft.reporting.words import GROUPS, group_of, headline, higher_is_better, label_of, words_of

VOID = {"meta"}


class Reader(HTMLParser):
    """Reads a page: its tags, their attributes, the texts in them; and checks that each is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def text(self) -> str:
        """Return what a reader sees, its white space as one blank."""
        seen = " ".join(text for tag, text in self.texts if tag not in ("style", "title"))
        return re.sub(r"\s+", " ", seen)


@pytest.fixture(autouse=True)
def _not_warned() -> Iterator[None]:
    report_page.warn_without_pictures.cache_clear()
    yield
    report_page.warn_without_pictures.cache_clear()


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)


def seen(report: EvaluationReport) -> str:
    return Reader(render_report(report)).text()


def test_it_says_what_was_measured() -> None:
    text = seen(example_report())
    assert text.startswith("What 2 edits did to tiny Before: the model without the edits")
    for fact in (
        "Model models/tiny",
        "Adapter default",
        "Edits 2, sha256 0123456789abcdef…",
        "Protocols generation",
        "Data type bfloat16",
        "Intervals 95% confidence, bootstrap with 1000 resamples",
        "Versions peft-locft 0.1.0",
    ):
        assert fact in text


def test_it_has_every_metric_with_its_meaning_and_intervals() -> None:
    text = seen(example_report())
    assert (
        "exact match reliability_exact_match The answer is exactly the right one. what it tells "
        "0.125 0.025 to 0.225 0.875 0.775 to 0.975 +0.750 +0.650 to +0.850 2 edits"
    ) in text
    assert "unchanged locality_unchanged The answer is the same as before the edit, right or wrong." in text
    assert "- 0.375 0.275 to 0.475 - 2 edits" in text
    assert "Reliability 0.875 Does the model answer" in text
    assert "Locality 0.375 Does it" in text
    assert (
        "General ability 31.5 Did the edits harm the model as a whole? perplexity (lower is better): before 20.25"
        in text
    )


def test_a_change_is_judged_only_where_it_is_no_chance() -> None:
    def colours(name: str, change: Estimate) -> list[str]:
        report = example_report(results={name: MetricResult("", result(0.5).after, result(0.5).after, change, 2)})
        return re.findall(r'class="(good|bad)"', render_report(report))

    up, down, unclear = Estimate(0.2, 0.1, 0.3), Estimate(-0.2, -0.3, -0.1), Estimate(0.2, 0.0, 0.4)
    assert colours("reliability_exact_match", up) == ["good"]
    assert colours("reliability_exact_match", down) == ["bad"]
    assert colours("perplexity", up) == ["bad"]
    assert colours("perplexity", down) == ["good"]
    assert colours("reliability_exact_match", unclear) == []
    assert colours("task_accuracy", up) == []


def test_it_has_what_is_missing_the_notes_and_all_settings() -> None:
    text = seen(example_report())
    assert "Not measured These metrics have no value. That is not a value of 0." in text
    assert "No edit has portability probes: portability_exact_match" in text
    assert "1 edits have the prompt of another." in text
    assert 'All settings model "models/tiny" dtype "bfloat16"' in text
    assert '"0123456789abcdef0123456789abcdef' in text
    assert "Not measured" not in seen(example_report(missing={}))


def test_it_has_the_pictures_inside() -> None:
    reader = Reader(render_report(example_report()))
    assert reader.tags.count("svg") == 6
    assert reader.tags.count("figure") == 6
    assert "before the edit after the edit" in reader.text()


def test_it_loads_and_runs_nothing() -> None:
    text = render_report(example_report())
    reader = Reader(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert not [value for name, value in reader.attributes if "href" in name and not (value or "").startswith("#")]
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_hostile_texts_stay_texts() -> None:
    attack = (
        "</td></table><script>alert(1)</script><img src=x onerror=alert(2)>\"'><style>*{display:none}</style>&amp;"
    )
    failed = {"expected": attack, "answer_before": attack, "answer_after": attack, "exact_match_after": 0.0}
    usual = example_report()
    report = example_report(
        results={
            attack: result(0.5),
            "reliability_exact_match": MetricResult(attack, result(0.5).after, None, None, 2, attack),
        },
        missing={attack: attack},
        rows=[row(0, attack, attack, source=attack, **failed)],
        settings={
            **usual.settings,
            "model": attack,
            attack: attack,
            "adapters": [attack],
            "versions": {attack: attack},
        },
        notes=[attack],
        curves=[{"epoch": 1.0, attack: 0.5}],
    )
    reader = Reader(render_report(report))
    assert set(reader.tags) <= set(Reader(render_report(usual)).tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    # prompt, expected, before, after, kind and source of the failure, and more around it
    assert sum(text.count("<script>alert(1)</script>") for _, text in reader.texts) > 10


def test_failures_are_counted_and_shown() -> None:
    text = seen(example_report())
    assert (
        "0 of 2 edits (by exact match), 1 of 2 rephrasings (by exact match), 1 of 2 locality probes (by unchanged). "
        "This table lists all 2 failures; answers.csv lists every answer"
    ) in text
    assert "fails if its answer changed, whether or not the answer before was right" in text
    assert "1 edits.json:2 rephrasing France's capital? Lyon Paris Paris" in text
    assert "1 edits.json:2 locality probe The Seine is in Paris Paris Lyon" in text
    assert "The capital of Spain is" not in text


def test_no_more_than_the_first_failures_are_shown() -> None:
    rows = [
        row(number, "reliability", f"prompt {number}.", exact_match_after=0.0) for number in range(MAX_FAILURES + 5)
    ]
    text = seen(example_report(rows=rows))
    assert "205 of 205 edits (by exact match). This table lists the first 200 of 205 failures; answers.csv" in text
    assert "prompt 199." in text and "prompt 200." not in text
    assert "locality probe" not in text


def test_no_failure_and_no_rows() -> None:
    assert "Failures None: every answer is as it should be." in seen(example_report(rows=[row(0, "reliability")]))
    assert "Failures" not in seen(example_report(rows=[]))


def test_a_long_answer_is_cut_and_an_empty_one_is_seen() -> None:
    rows = [row(0, "reliability", "p" * 1000, answer_before=" \n", answer_after="q" * 400, exact_match_after=0.0)]
    text = seen(example_report(rows=rows))
    assert f"{'p' * MAX_CHARACTERS} … 700 more characters" in text
    assert f"{'q' * MAX_CHARACTERS} … 100 more characters" in text
    assert "p" * (MAX_CHARACTERS + 1) not in text
    assert "(empty)" in text


def test_a_failure_without_an_answer_has_its_score() -> None:
    unasked: dict[str, Any] = {
        "answer_before": None,
        "answer_after": None,
        "exact_match_after": None,
        "token_accuracy_after": 0.25,
    }
    text = seen(example_report(rows=[row(0, "portability", **unasked)]))
    assert "1 of 1 portability probe (by token accuracy)" in text
    assert "Lyon - token accuracy 0.250" in text


def test_without_a_base_there_is_no_before() -> None:
    report = example_report(results={"reliability_exact_match": result(0.875)}, curves=[])
    text = seen(report)
    assert "There was no model without the edits to compare with" in text
    assert "before the edit" not in text.partition("Before and after")[2]
    assert "Generalization" not in text
    assert Reader(render_report(report)).tags.count("svg") == 1


def test_without_any_figure_there_is_still_a_page() -> None:
    text = seen(example_report(results={}, rows=[], curves=[], missing={"fluency": "no prompts"}))
    assert "No prompts: fluency" in text
    assert "Before and after" not in text and "Training, epoch by epoch" not in text


@pytest.mark.parametrize("curves", [[], [{"epoch": 1.0}]])
def test_without_curves_there_is_nothing_of_epochs(curves: list[dict[str, float]]) -> None:
    assert "Training, epoch by epoch" not in seen(example_report(curves=curves))


def test_curves_are_figures_too() -> None:
    text = seen(example_report())
    assert "Epoch reliability exact match locality unchanged loss 1 0.500 0.750 2.500 2 0.875 - 0.062" in text


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_page_says_how_to_get_pictures(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="peft_locft"):
        reader = Reader(render_report(example_report()))
        render_report(example_report())
    assert "svg" not in reader.tags
    assert (
        "pip install 'peft-locft[plot]' , then in Python save_report(EvaluationReport.load(folder), folder)"
        in reader.text()
    )
    assert "Epoch reliability exact match" in reader.text()
    assert [record.getMessage() for record in caplog.records] == [
        "The evaluation page has no pictures. Pictures need matplotlib: pip install 'peft-locft[plot]'"
    ]


def test_little_is_recorded_of_a_report_that_came_from_elsewhere() -> None:
    text = seen(example_report(settings={"confidence": 0.9}))
    assert "Model not recorded" in text and "Adapter none" in text and "90% confidence" in text


def test_every_metric_of_ours_has_plain_words() -> None:
    every: tuple[Protocol, ...] = ("generation", "token_accuracy", "probability", "fluency")
    of_text = TextMeasurement(losses=np.ones((3, 2)), divergences=np.ones(3)).metric_results(10, 0.9, 0)
    names = [*metric_names(every, ALL_KINDS), EDIT_SCORE, "fluency_n_gram_entropy", *of_text]
    assert [name for name in names if words_of(name) is None] == []
    assert [name for name in names if group_of(name) == "other"] == []
    assert {group_of(name) for name in names} == set(GROUPS) - {"other"}
    for group in {group_of(name) for name in names}:
        assert headline(group, {name: result(0.5) for name in names if group_of(name) == group}) is not None


def test_words_for_what_is_not_ours_are_not_made_up() -> None:
    for name in ("exact_match", "arc_exact_match", "general_unchanged", "reliability"):
        expected = "reliability" if name == "reliability" else "other"
        assert group_of(name) == expected
    assert words_of("arc_exact_match") is None
    assert higher_is_better("arc_exact_match") is None
    assert label_of("arc_exact_match") == "arc exact match"
    assert headline("other", {"arc_exact_match": result(0.5)}) is None


def test_templates_escape_what_is_not_html_and_refuse_unknown_names() -> None:
    page = page_templates().from_string('<p class="{{ name }}">{{ text }}{{ html }}</p>')
    assert page.render(name='a"b', text="1 < 2 &", html=Markup("<b>&amp;</b>")) == (
        '<p class="a&#34;b">1 &lt; 2 &amp;<b>&amp;</b></p>'
    )
    with pytest.raises(UndefinedError, match="'html' is undefined"):
        page.render(name="a", text="b")


def test_on_a_phone_every_text_of_a_failure_has_its_name() -> None:
    no_answer = {"edit": 2, "kind": "portability", "prompt": "Lyon is", "token_accuracy_after": 0.25}
    rows = [*example_report().rows, row(1, "reliability", "", answer_after=" ", exact_match_after=0.0), no_answer]
    _, _, table = render_report(example_report(rows=rows)).partition('<table class="failures">')
    table, _, _ = table.partition("</table>")
    names = re.findall(r'<th scope="col">(\w+)</th>', table)
    assert re.findall(r'data-label="(\w+)"', table) == names * 4
    assert table.count("<td") == len(names) * 4


# ---------------------------------------------------------------------- groups, the worst, and a judge


def many_rows(count: int = 30) -> list[dict[str, Any]]:
    """Return rows of two relations, of which only the first is learned and nothing is unchanged."""
    return [
        each | {"relation": "capital" if number < 20 else "mayor"}
        for number in range(count)
        for each in (
            row(number, "reliability", f"prompt {number}.", exact_match_after=float(number < 20)),
            row(number, "locality", f"probe {number}.", unchanged_after=0.0),
        )
    ]


def test_relations_stand_below_each_other_with_counts_and_intervals() -> None:
    text = seen(example_report(rows=many_rows()))
    assert "Relation Edits reliability exact match locality unchanged" in text
    assert "capital 20 1.000 0.832 to 1.000 0.000 0.000 to 0.168" in text
    assert "mayor 10 0.000 0.000 to 0.308 0.000 0.000 to 0.308" in text
    assert "By relation" not in seen(example_report())


def test_the_worst_stand_before_all_failures_with_their_rule() -> None:
    text = seen(example_report(rows=many_rows()))
    worst = text.partition("The worst")[2].partition("Failures")[0]
    assert "an edit's own prompt before rephrasings" in worst and "right before and are wrong now" in worst
    assert worst.count(" edit prompt ") == 10 and worst.count(" locality probe probe ") == 20
    # a few failures are all shown anyway
    assert "The worst" not in seen(example_report())


def test_a_judge_is_named_with_its_prompt_and_where_it_differs() -> None:
    attack = "<script>alert(1)</script>"
    judge = {"label": attack, "counts": "2 of 2 answers judged, 0 replies unreadable.", "prompt": f"Say {attack}"}
    rows = [
        row(0, "reliability", "first.", judged_before=0.0, judged_after=1.0),
        row(1, "reliability", "second.", answer_after=attack, judged_before=0.0, judged_after=0.0),
    ]
    settings = example_report().settings | {"judge": judge | {"prompt_sha256": "12" * 32}}
    reader = Reader(render_report(example_report(rows=rows, settings=settings)))
    text = reader.text()
    assert (
        f"Judge {attack}. 2 of 2 answers judged, 0 replies unreadable. The judge agrees with exact match on 0.750"
        in text
    )
    assert f"1 after edit second. Lyon {attack} wrong exact match: right" in text
    assert "The judge's prompt, sha256 1212121212121212…" in text and f"Say {attack}" in text
    assert "script" not in reader.tags
    assert "Judge" not in seen(example_report())
