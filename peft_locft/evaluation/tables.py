"""Tables as Markdown and HTML, and how their cells show a number."""

from __future__ import annotations

import html
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
