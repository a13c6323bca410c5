"""Tables as Markdown, HTML, CSV and LaTeX, and how their cells show a number."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence

from .intervals import Estimate, format_number

DASH = "-"  # a cell without a value


def markdown_table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table.

    Args:
        names: of the columns.
        rows: their cells.
    """
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("|" + "".join(_cell(cell) for cell in cells) for cells in lines)


def _cell(content: object) -> str:
    text = str(content).replace("|", "\\|")
    return f" {text} |" if text else " |"


def html_table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a plain HTML table for a notebook, its texts escaped; arguments as in [`markdown_table`]."""

    def line(tag: str, cells: Iterable[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [line("th", names), *(line("td", cells) for cells in rows)]
    return "\n".join(['<table style="text-align: left">', *lines, "</table>"])


def _text(content: object) -> str:
    return "" if content is None else html.escape(str(content))


def estimate_cell(estimate: Estimate | Mapping[str, float] | None) -> str:
    """Return the text of an estimate, given as such or as its `_asdict`; a dash for `None`."""
    if estimate is None:
        return DASH
    return str(estimate if isinstance(estimate, Estimate) else Estimate(**estimate))


def error_cell(value: float | None, stderr: float | None) -> str:
    """Return a value with its standard error, if it has one; a dash for `None`."""
    if value is None:
        return DASH
    return format_number(value) if stderr is None else f"{format_number(value)} ± {format_number(stderr)}"


def csv_table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV; an unknown value (`None`) is empty. Arguments as in [`markdown_table`]."""
    text = io.StringIO()
    # with "\n" as line end, csv does not quote a "\r" in a text, and readers end the row there
    csv.writer(text, lineterminator="\r\n").writerows([names, *rows])
    return text.getvalue()


LATEX_LETTERS = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': '{"}',  # alone, some languages of babel read it as a command
    # at the beginning of a row, it would be an argument of the command before
    "[": "{[}",
    "]": "{]}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
}


def latex_text(text: object) -> str:
    """Return a text for LaTeX, with its special letters escaped and its white space as single blanks.

    Example:
        >>> print(latex_text("50 % of A_1 & B"))
        50 \\% of A\\_1 \\& B
    """
    shown = " ".join("".join(each if each.isprintable() else " " for each in str(text)).split())
    # a minus before a digit is a sign, and a hyphen anywhere else
    signed = re.sub(r"(?<![\w-])-(?=\d)", "\0", shown)
    return "".join(LATEX_LETTERS.get(letter, letter) for letter in signed).replace("\0", "$-$")


def latex_table(
    names: Sequence[str], rows: Iterable[Sequence[object]], *, comment: str = "", num_left: int = 1
) -> str:
    r"""Return a LaTeX `tabular` in the style of the package booktabs: `\usepackage{booktabs}`.

    Args:
        names: of the columns.
        rows: their cells, which are escaped; an [`Estimate`] is its value, and its interval in small digits.
        comment: lines that LaTeX does not print, before the table.
        num_left: number of first columns that are aligned left; the others are aligned right.
    """

    def line(cells: Sequence[object]) -> str:
        return " & ".join(map(_latex_cell, cells)) + r" \\"

    return "\n".join(
        [
            *(f"% {each}" for each in comment.splitlines()),
            rf"\begin{{tabular}}{{{'l' * num_left}{'r' * (len(names) - num_left)}}}",
            r"\toprule",
            line(names),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _latex_cell(content: object) -> str:
    if content is None:
        return "--"
    if not isinstance(content, Estimate):
        return latex_text(content)
    value, low, high = (latex_text(format_number(each)) for each in content)
    # in braces: a cell that begins with [ would be an argument of the line's end before it
    return rf"{value} {{\scriptsize [{low}, {high}]}}"
