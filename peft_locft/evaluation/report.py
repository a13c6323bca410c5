"""The report of an evaluation: every metric before and after, with its interval, and every answer."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..io.files import check_folder, write_atomically
from ..io.json_checks import dict_of, has_fields, is_count, is_metric_value, is_number, is_prose, is_sha256, is_text
from ..io.untrusted_json import shortened
from .agreement import judge_to_markdown
from .by_language import HEADER as LANGUAGE_HEADER
from .by_language import language_rows, what_is_left_out
from .citations import METHODS, PROTOCOLS, bibtex, papers_of_data
from .intervals import Estimate, format_number
from .kinds import AS_IT_IS, OF_TEXT_ONLY
from .metric_result import MetricResult
from .summary import deciding_score, sentences
from .tables import DASH, csv_table, estimate_cell, html_table, latex_table, markdown_table

if TYPE_CHECKING:
    import pandas

FORMAT = 1
FIGURES_NAME = "evaluation.json"
# without the prompts, the answers and the course of training
SUMMARY = {"settings": dict, "results": dict, "missing": dict, "notes": list}
PARTS = SUMMARY | {"curves": list, "rows": list}
BY_LANGUAGE = "by_language"  # a part of reports in several languages
# figures of ordinary text in the summary
OF_TEXT = {"perplexity": "Perplexity of ordinary text", "kl_from_base": "KL from the base on ordinary text"}
MAX_SHOWN = 20  # failed rows on a page of a notebook


@dataclass(frozen=True)
class EvaluationReport:
    """What [`evaluate_edits`] returns.

    Attributes:
        results: the metrics, by name.
        missing: why a metric could not be measured, by name; such a metric is not 0.
        rows: a dictionary for each prompt: edit, source, kind, prompt, expected answer, answers and scores before and
            after.
        settings: what was measured, and how.
        notes: what a reader of the metrics should know.
        curves: values by epoch, each with an `epoch`, if the training run recorded any.
        by_language: the metrics of each language, by its code; empty if edits and probes are in one language.

    Example:
        >>> report = evaluate_edits(peft_model, tokenizer, edits)
        >>> report["reliability_exact_match"].after
        Estimate(value=0.995, low=0.985, high=1.0)
        >>> print(report.summary())
        >>> report.save("evaluation")
    """

    results: dict[str, MetricResult]
    missing: dict[str, str]
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    curves: list[dict[str, float]] = field(default_factory=list)
    by_language: dict[str, dict[str, MetricResult]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> MetricResult:
        """Return one metric.

        Raises:
            KeyError: if it was not measured; the message says why.
        """
        if name not in self.results:
            why = self.missing.get(name, f"expected one of {', '.join(self.results)}")
            raise KeyError(f"{name} was not measured: {why}")
        return self.results[name]

    def __str__(self) -> str:
        return self.to_markdown()

    @property
    def has_before(self) -> bool:
        return any(result.before is not None for result in self.results.values())

    @property
    def has_chance(self) -> bool:
        return any(result.chance is not None for result in self.results.values())

    @property
    def confidence(self) -> str:
        """The confidence of the intervals, such as "95%"."""
        return f"{100 * self.settings['confidence']:g}%"

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that failed: a wrong answer or, for a locality probe with a base, a changed one."""
        for row in self.rows:
            deciding = deciding_score(row)
            if deciding is not None and deciding[1] < 1:
                yield row

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON; infinity and NaN, which JSON lacks, are "inf" and "nan"."""
        languages = {language: _plain_results(results) for language, results in self.by_language.items()}
        return {
            "format": FORMAT,
            "settings": self.settings,
            "results": _plain_results(self.results),
            "missing": self.missing,
            "notes": self.notes,
            "curves": curves_to_json(self.curves),
            "rows": self.rows,
            # a report in one language is written as before there were several
            **({BY_LANGUAGE: languages} if languages else {}),
        }

    def summary_to_dict(self) -> dict[str, Any]:
        """Return what an adapter's provenance records of it: no format, no prompts, no answers, no curves."""
        found = self.to_dict()
        return {name: found[name] for name in SUMMARY}

    @classmethod
    def from_dict(cls, data: Any, *, summary: bool = False) -> EvaluationReport:
        """Return the report that `data` describes.

        Args:
            data: from [`EvaluationReport.to_dict`].
            summary: whether it is from [`EvaluationReport.summary_to_dict`]; the report then has no rows and curves.

        Raises:
            ValueError: if `data` is not a report, or is of a later format.
        """
        _check_parts(data, summary)
        curves = curves_from_json(data.get("curves", []))
        return cls(
            _results(data["results"]),
            data["missing"],
            data.get("rows", []),
            data["settings"],
            data["notes"],
            curves,
            {language: _results(results) for language, results in data.get(BY_LANGUAGE, {}).items()},
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> EvaluationReport:
        """Read a report that [`EvaluationReport.save`] wrote, to draw it again or to compare it.

        Args:
            folder: the one it was saved to.

        Raises:
            FileNotFoundError: if there is no `evaluation.json` in it.
            ValueError: if that file is not one of ours.

        Example:
            >>> save_report(EvaluationReport.load("evaluation"), "evaluation")  # once matplotlib is there
        """
        path = Path(folder) / FIGURES_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path}: found no such file; expected a folder that EvaluationReport.save wrote")
        try:
            return cls.from_dict(json.loads(path.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def summary(self) -> str:
        """Return what happened in a few sentences, a line for each.

        Example:
            >>> print(report.summary())
            78 of 78 edits learned (0 before).
            48 of 78 prompts in other words are answered with the target.
            59 of 78 other answers changed.
        """
        found = {label: self.results[name] for name, label in OF_TEXT.items() if name in self.results}
        texts = {
            label: (None if result.before is None else result.before.value, result.after.value)
            for label, result in found.items()
        }
        return "\n".join(
            sentences(self.rows, texts) or [f"{name}: {each.after}" for name, each in self.results.items()]
        )

    def to_markdown(self) -> str:
        """Return the metrics as a Markdown table, then what could not be measured, and the notes."""
        table = markdown_table(*self._table())
        lines = [table, "", f"In brackets: the {self.confidence} confidence interval (bootstrap)."]
        lines += ["Chance: what choosing at random among the offered answers would give."] if self.has_chance else []
        if self.by_language:
            languages = markdown_table(LANGUAGE_HEADER, language_rows(self.by_language))
            lines += ["", "By language:", "", languages, *what_is_left_out(self.by_language), ""]
        lines += [f"Not measured: {', '.join(names)}: {why}." for why, names in self.missing_by_reason().items()]
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join([*lines, *judge_to_markdown(self.rows, self.settings)])

    def _table(self) -> tuple[list[str], list[list[str]]]:
        asked = {result.protocol.partition(";")[0] for result in self.results.values()}
        more = {"chance": self.has_chance, "protocol": bool(asked - {AS_IT_IS, OF_TEXT_ONLY, ""})}
        rows = []
        for name, result in self.results.items():
            cells = [name, *map(estimate_cell, (result.before, result.after, result.change))]
            cells += [DASH if result.chance is None else format_number(result.chance)] if more["chance"] else []
            cells += [f"{result.count} {result.unit}"] + ([result.protocol or DASH] if more["protocol"] else [])
            rows.append(cells)
        names = ["metric", "before", "after", "change", "chance", "measured on", "protocol"]
        return [name for name in names if more.get(name, True)], rows

    def _repr_html_(self) -> str:
        """Return the summary, the metrics and the first failed answers, as a notebook shows them."""
        parts = [f"<p>{'<br>'.join(map(html.escape, self.summary().splitlines()))}</p>", html_table(*self._table())]
        if self.by_language:
            parts += ["<p>By language</p>", html_table(LANGUAGE_HEADER, language_rows(self.by_language))]
        failed = list(self.failures())
        if failed:
            names = ["kind", "prompt", "expected", "answer_before", "answer_after"]
            shown = [[row.get(name) for name in names] for row in failed[:MAX_SHOWN]]
            title = f"{len(failed)} failed answers" + (f", the first {MAX_SHOWN}" if len(failed) > MAX_SHOWN else "")
            parts += [f"<p>{title}</p>", html_table([name.replace("_", " ") for name in names], shown)]
        return "\n".join([*parts, *(f"<p>Note: {html.escape(note)}</p>" for note in self.notes)])

    def missing_by_reason(self) -> dict[str, list[str]]:
        """Return the names in `missing` by reason."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.missing.items():
            reasons.setdefault(why, []).append(name)
        return reasons

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a DataFrame, one answer a row: its prompt, the answers and scores before and after.

        Example:
            >>> report.to_pandas().groupby("kind")["exact_match_after"].mean()
        """
        import pandas  # here, because it takes a second, and a report does not need it otherwise

        return pandas.DataFrame(self.rows)

    def to_csv(self) -> str:
        """Return the rows as CSV; an unknown value is empty."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        return csv_table(names, ([row.get(name) for name in names] for row in self.rows)) if names else ""

    def metrics_to_csv(self) -> str:
        """Return the metrics as CSV: their values before and after, the change, and the ends of each interval."""
        whens = ("before", "after", "change")
        names = [name for when in whens for name in (when, f"{when}_low", f"{when}_high")]
        rows = [
            [
                name,
                *(each for when in whens for each in getattr(result, when) or (None,) * 3),
                result.count,
                result.unit,
            ]
            for name, result in self.results.items()
        ]
        return csv_table(["metric", *names, "count", "unit"], rows)

    def to_latex(self, metrics: Sequence[str] | None = None) -> str:
        r"""Return the metrics as a LaTeX table in the style of booktabs, for a paper.

        Args:
            metrics: their names, in order; `None`: all.

        Raises:
            KeyError: if one was not measured; the message says why.

        Example:
            >>> print(report.to_latex(["reliability_exact_match", "perplexity"]))
            % SmolLM2-135M, 200 edits, protocols generation, 95% intervals (bootstrap)
            \begin{tabular}{lrrrr}
        """
        chosen = {name: self[name] for name in (self.results if metrics is None else metrics)}
        rows = [
            [name.replace("_", " "), each.before, each.after, each.change, f"{each.count} {each.unit}"]
            for name, each in chosen.items()
        ]
        return latex_table(["metric", "before", "after", "change", "measured on"], rows, comment=self.description)

    @property
    def description(self) -> str:
        """What was measured, in one line: model, edits, protocols, intervals."""
        edits, protocols = self.settings.get("edits") or {}, self.settings.get("protocols") or []
        parts = [
            PurePath(str(self.settings.get("model"))).name,
            f"{edits.get('count')} edits",
            f"protocols {' '.join(map(str, protocols))}",
            f"{self.confidence} intervals (bootstrap)",
        ]
        return " ".join(", ".join(parts).split())

    def papers(self) -> list[str]:
        """Return the keys of the papers in [`EvaluationReport.citations`]."""
        methods = [str(each).lower() for each in self.settings.get("methods") or []]
        protocols = self.settings.get("protocols") or []
        keys = [METHODS[name] for name in methods if name in METHODS]
        keys += papers_of_data(str(row.get("source") or "") for row in self.rows)
        return list(dict.fromkeys([*keys, *(PROTOCOLS[name] for name in protocols if name in PROTOCOLS)]))

    def citations(self) -> str:
        """Return BibTeX of what the report names: the editing method, the data set (by its file's name), protocols.

        Example:
            >>> Path("citations.bib").write_text(report.citations())
        """
        return bibtex(self.papers())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the data, the answers, and the tables for a paper, each file atomically.

        `evaluation.json` holds everything, `evaluation.md`, `evaluation.tex` and `metrics.csv` the metrics,
        `answers.csv` a row for each answer, `citations.bib` what to cite.

        `peft_locft.save_report` also writes a page with pictures.

        Args:
            folder: created if it does not exist.

        Raises:
            NotADirectoryError: if the folder, or one above it, is a file.
        """
        folder = Path(folder)
        check_folder(folder, "an evaluation")
        data = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        texts = {
            FIGURES_NAME: data,
            "evaluation.md": self.to_markdown() + "\n",
            "evaluation.tex": self.to_latex() + "\n",
            "metrics.csv": self.metrics_to_csv(),
            "answers.csv": self.to_csv(),
            "citations.bib": self.citations() + "\n",
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in texts.items():
            write_atomically(folder / name, content)


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def curves_to_json(curves: list[dict[str, float]]) -> list[dict[str, float | str]]:
    """Return curves as plain data for JSON, as [`EvaluationReport.to_dict`] does."""
    return [{name: _finite(value) for name, value in point.items()} for point in curves]


def curves_from_json(data: list[Any]) -> list[dict[str, float]]:
    """Return the curves that [`curves_to_json`] wrote.

    Raises:
        ValueError: if a point has no epoch, or a value is not a number.
    """
    for number, point in enumerate(data):
        if not dict_of(is_metric_value)(point):
            raise ValueError(f"curves[{number}]: expected figures by name; found {shortened(point)}")
        if "epoch" not in point:
            raise ValueError(f"curves[{number}]: expected figures by name: it has no epoch")
    return [{name: float(value) for name, value in point.items()} for point in data]


def _check_parts(data: Any, summary: bool) -> None:
    parts = SUMMARY if summary else PARTS
    if not isinstance(data, dict):
        data = {}
    found = data.get("format")
    if not summary and found != FORMAT:
        later = isinstance(found, int) and found > FORMAT
        advice = "update peft-locft, which has written it" if later else "is it a report of evaluate_edits?"
        raise ValueError(f"found format {shortened(found)}; expected {FORMAT}: {advice}")
    unknown = sorted(data.keys() - parts.keys() - ({"format", BY_LANGUAGE} if not summary else set()))
    if unknown:
        raise ValueError(f"found the unknown fields {shortened(unknown)}; expected {', '.join(parts)}")
    for name, kind in parts.items():
        if not isinstance(data.get(name), kind):
            raise ValueError(f"{name}: found {type(data.get(name)).__name__}; expected {kind.__name__}")
    settings = data["settings"]
    if not is_number(settings.get("confidence")):
        raise ValueError(f"settings: found confidence {shortened(settings.get('confidence'))}; expected a number")
    if "edits" in settings and not has_fields(count=is_count, sha256=is_sha256)(settings["edits"]):
        raise ValueError(f"settings: found edits {shortened(settings['edits'])}; expected their count and sha256")
    if not dict_of(lambda results: isinstance(results, dict))(data.get(BY_LANGUAGE, {})):
        raise ValueError(f"{BY_LANGUAGE}: found {shortened(data[BY_LANGUAGE])}; expected metrics for each language")
    if not dict_of(is_prose)(data["missing"]):
        raise ValueError(f"missing: found {shortened(data['missing'])}; expected a reason for each metric")
    if not all(map(is_prose, data["notes"])):
        raise ValueError(f"notes: found {shortened(data['notes'])}; expected texts")
    for number, row in enumerate(data.get("rows", [])):
        if not isinstance(row, dict) or not {"edit", "kind", "prompt"} <= set(row):
            raise ValueError(f"rows[{number}]: expected a row with edit, kind and prompt")


def _plain_results(results: dict[str, MetricResult]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            each.name: _plain(value) if isinstance(value := getattr(result, each.name), Estimate) else value
            for each in fields(MetricResult)
        }
        for name, result in results.items()
    }


def _plain(estimate: Estimate) -> dict[str, float | str]:
    return {name: _finite(each) for name, each in estimate._asdict().items()}


def _results(data: Any) -> dict[str, MetricResult]:
    return {name: _result(name, result) for name, result in data.items()}


def _result(name: str, data: Any) -> MetricResult:
    if not is_text(name):
        raise ValueError(f"results: found a metric named {shortened(name)}; expected a printable name")
    try:
        after = _estimate(data["after"])
        if after is None:
            raise ValueError("it has no figure after the edit")
        before, change = _estimate(data["before"]), _estimate(data["change"])
        meaning, count, unit = data["meaning"], data["count"], data["unit"]
        unknown = sorted(data.keys() - {each.name for each in fields(MetricResult)})
        if unknown:
            raise ValueError(f"found the unknown fields {shortened(unknown)}")
        if not (is_prose(meaning) and is_count(count) and is_text(unit)):
            raise ValueError(f"found {shortened([meaning, count, unit])} as its meaning, count and unit")
        # reports of earlier versions have none of these
        protocol, in_papers, chance = data.get("protocol", ""), data.get("in_papers", ""), data.get("chance")
        if not (is_prose(protocol) and is_prose(in_papers) and (chance is None or is_number(chance))):
            raise ValueError(f"found {shortened([protocol, in_papers, chance])} as its protocol, papers and chance")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"results.{name}: expected a metric's result: {error}") from error
    return MetricResult(meaning, after, before, change, count, unit, protocol, in_papers, chance)


def _estimate(data: Any) -> Estimate | None:
    if data is None:
        return None
    values = [data[name] for name in Estimate._fields]
    if len(data) != len(values) or not all(map(is_metric_value, values)):
        raise ValueError(f"found {shortened(data)}; expected the numbers {', '.join(Estimate._fields)}")
    return Estimate(*map(float, values))
