"""Judge the answers of a report by a language model, which reads them as data."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from ..data.edits import Edit, EditSource, edits_sha256, read_edits
from ..io.untrusted_json import shortened
from .judge_prompt import PROMPT, PROMPT_SHA256, JudgeQuestion, verdict_of
from .judges import JudgeConfig, ReplyCache, judge_of
from .metric_result import Column, MetricResult
from .report import EvaluationReport
from .row_values import bootstrap_settings, mean_by_edit, num_edits_of
from .tabulation import metric_results

logger = logging.getLogger(__name__)

MEANING = "a language model says that the greedy answer is right"
Row = dict[str, Any]
Place = tuple[int, str]  # of an answer: number of its row, and "before" or "after"


def judge_report(
    report: EvaluationReport, edits: EditSource, args: JudgeConfig, *, progress: bool = True
) -> EvaluationReport:
    """Return a report with the verdicts of a judge: metrics such as `reliability_judged`, before and after.

    Every answer to a prompt with a known right answer is judged once, at temperature 0, by the fixed prompt of
    [`JudgeQuestion`][peft_locft.evaluation.JudgeQuestion]. A judge at an address gets for each the question, its right
    answers, the old answer and the model's answer; a model on this machine sends nothing. An empty answer is wrong
    without being asked. A reply that is no verdict counts as unknown, never as wrong.

    Args:
        report: from `evaluate_edits`, or loaded; it needs answers, so the protocol `"generation"`.
        edits: the edits of that report.
        args: the judge.
        progress: show a progress bar.

    Returns:
        The report with `judged_before` and `judged_after` in its rows, the metrics, and `settings["judge"]`: the
        judge, its prompt and its sha256, and how many answers it has judged.

    Raises:
        ValueError: if the report is of other edits, or has no answers; if the judge refuses a request, such as for a
            wrong key.
        ConnectionError: if an address gives no reply, after all retries. What is in the cache is not asked again.
        ImportError: if the judge is at an address, and httpx is not installed.

    Example:
        >>> report = judge_report(EvaluationReport.load("evaluation"), edits, JudgeConfig("judge_model"))
        >>> report["generalization_judged"].after
        Estimate(value=0.62, low=0.55, high=0.69)
    """
    questions = dict(_questions(report, _checked_edits(report, edits)))
    if not questions:
        raise ValueError(
            "judge_report: found no answer to a question with a known right answer; expected a report of the protocol "
            "'generation'."
        )
    texts = {place: question.text() for place, question in questions.items() if question.answer.strip()}
    replies = _replies(list(dict.fromkeys(texts.values())), args, progress)
    verdicts = {place: verdict_of(replies[texts[place]]) if place in texts else 0.0 for place in questions}
    rows = [row | _verdicts_of_row(number, verdicts) for number, row in enumerate(report.rows)]
    unreadable = [replies[texts[place]] for place, verdict in verdicts.items() if verdict is None]
    first = f", the first: {shortened(unreadable[0])}." if unreadable else "."
    num_judged = len(verdicts) - len(unreadable)
    counts = f"{num_judged} of {len(verdicts)} answers judged, {len(unreadable)} replies unreadable{first}"
    judge = {
        "label": args.label,
        "prompt": PROMPT,
        "prompt_sha256": PROMPT_SHA256,
        "request": args.request,
        "num_answers": len(verdicts),
        "num_unreadable": len(unreadable),
        "counts": counts,
    }
    results, missing = _metrics(rows, report.settings)
    return replace(
        report,
        results=report.results | results,
        missing=report.missing | missing,
        rows=rows,
        settings=report.settings | {"judge": judge},
    )


def _checked_edits(report: EvaluationReport, edits: EditSource) -> list[Edit]:
    read = read_edits(edits)
    recorded = report.settings.get("edits")
    if isinstance(recorded, Mapping) and recorded.get("sha256") != edits_sha256(read):
        raise ValueError(
            f"judge_report: found {len(read)} edits that differ from the {recorded.get('count')} edits of the report; "
            "expected the same, in the same order."
        )
    if any(row["edit"] >= len(read) for row in report.rows):
        raise ValueError(f"judge_report: found {len(read)} edits; the report has more.")
    return read


def _questions(report: EvaluationReport, edits: Sequence[Edit]) -> Iterator[tuple[Place, JudgeQuestion]]:
    for number, row in enumerate(report.rows):
        edit, expected = edits[row["edit"]], row.get("expected")
        if expected is None:
            continue
        # an edit's own prompts have an old answer; a probe's old answer is not known
        old = edit.ground_truth if expected == edit.target else None
        conversation = tuple((message.role, message.content) for message in edit.history or ())
        for when in ("before", "after"):
            answer = row.get(f"long_answer_{when}") or row.get(f"answer_{when}")
            if answer is not None:
                rights = _right_answers(edit, row)
                yield (number, when), JudgeQuestion(row["prompt"], rights, old, answer, conversation)


def _right_answers(edit: Edit, row: Row) -> tuple[str, ...]:
    """Return the expected answer of a row, and its aliases."""
    expected = row["expected"]
    probes = [*edit.locality, *edit.portability, *edit.belief, *edit.cross_lingual, *edit.sub_questions]
    same = [each.right_answers for each in probes if each.prompt == row["prompt"] and expected in each.right_answers]
    of_edit = [edit.right_answers] if expected == edit.target else []
    return tuple(dict.fromkeys([expected, *(answer for answers in same + of_edit for answer in answers)]))


def _verdicts_of_row(number: int, verdicts: Mapping[Place, float | None]) -> dict[str, float | None]:
    return {f"judged_{when}": verdicts.get((number, when)) for when in ("before", "after")}


def _replies(texts: Sequence[str], args: JudgeConfig, progress: bool) -> dict[str, str]:
    """Return the reply to every text, from the cache or from the judge; readable ones go into the cache at once."""
    cache = ReplyCache(args.cache, args)
    replies = {text: cache[text] for text in texts if text in cache}
    new = [text for text in texts if text not in replies]
    known = f"; {len(replies)} more are known from {args.cache}" if replies else ""
    if args.is_address:
        what = "the question, its right answers, the old answer and the model's answer"
        # a warning, so that it is seen: this is the only place that sends a user's data anywhere
        logger.warning("Sending %d answers to %s, each with %s%s.", len(new), args.label, what, known)
    if not new:
        return replies
    bar = tqdm(total=len(new), desc="judging", unit="answer", disable=not progress)
    with bar:
        for place, reply in judge_of(args).replies(new):
            replies[new[place]] = reply
            if verdict_of(reply) is not None:
                cache.add({new[place]: reply})
            bar.update()
    return replies


def _metrics(rows: Sequence[Row], settings: Mapping[str, Any]) -> tuple[dict[str, MetricResult], dict[str, str]]:
    columns, missing = {}, {}
    num_edits = num_edits_of(rows, settings)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        after, before = (mean_by_edit(own, f"judged_{when}", num_edits) for when in ("after", "before"))
        if all(row["judged_after"] is None for row in own):
            known = any(row.get("expected") is not None for row in own)
            missing[f"{kind}_judged"] = (
                "no reply of the judge was a verdict" if known else f"no {kind} probe has an answer"
            )
            continue
        has_before = any(row["judged_before"] is not None for row in own)
        columns[f"{kind}_judged"] = Column(MEANING, after, before if has_before else None)
    return metric_results(columns, *bootstrap_settings(settings)), missing
