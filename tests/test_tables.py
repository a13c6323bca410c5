"""Tables for papers and for other programs: any text in a cell stays that text."""

from __future__ import annotations

import csv
import io
import math

import pytest

from peft_locft.evaluation.intervals import Estimate
from peft_locft.evaluation.tables import csv_table, latex_table, latex_text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("reliability_exact_match", r"reliability\_exact\_match"),
        ("50 % of $5 & #1", r"50 \% of \$5 \& \#1"),
        (r"\input{x}", r"\textbackslash{}input\{x\}"),
        ("a~b^c", r"a\textasciitilde{}b\textasciicircum{}c"),
        ("two\nlines\t\x07", "two lines"),
        ("-0.5 to pre-2020", "$-$0.5 to pre-2020"),
        ("[a] & <b>", r"{[}a{]} \& \textless{}b\textgreater{}"),
        ("Zürich 東京", "Zürich 東京"),
    ],
)
def test_letters_that_latex_reads_as_commands_are_escaped(text: str, written: str) -> None:
    assert latex_text(text) == written


def test_a_table_of_booktabs_has_values_with_their_intervals() -> None:
    rows: list[list[object]] = [["reliability", Estimate(0.5, -0.25, 1.0), None], ["[b]", Estimate(math.inf, 1, 2), 3]]
    assert latex_table(["metric", "after", "n"], rows, comment="model_1, 95%\nsecond") == (
        "% model_1, 95%\n"
        "% second\n"
        "\\begin{tabular}{lrr}\n"
        "\\toprule\n"
        "metric & after & n \\\\\n"
        "\\midrule\n"
        "reliability & 0.500 {\\scriptsize [$-$0.250, 1.000]} & -- \\\\\n"
        "{[}b{]} & inf {\\scriptsize [1.000, 2.000]} & 3 \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}"
    )


def test_csv_gives_back_what_was_written() -> None:
    hostile = 'one, "two"\r\nthree\rfour\nfive;\t=1+1'
    read = list(csv.reader(io.StringIO(csv_table(["a", "b"], [[hostile, None], [0.5, True]]), newline="")))
    assert read == [["a", "b"], [hostile, ""], ["0.5", "True"]]
