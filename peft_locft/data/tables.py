"""Tables of text: CSV with any of the usual delimiters, as spreadsheets write it."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .column_names import SHAPE, column_name, vocabularies

# a place ("zsre.json:12", "row 12") and its content, or the ValueError that says why it cannot be read
Row = tuple[str, object]

DELIMITERS = (",", ";", "\t", "|")
EXCEL_HINT = re.compile(r"sep=(.)\r?\n")  # the first line of some files that Excel writes


def table_rows(text: str, name: str) -> Iterator[Row]:
    """Yield the rows of a table whose first line names its columns, each with its place.

    The delimiter is that of `, ; tab |` which gives known column names. Blank rows, and the empty cells that
    spreadsheets add at the end of a row, are left out.

    Args:
        text: the table.
        name: of the file, for messages.

    Raises:
        ValueError: if two columns have the same name, or quotes are not in pairs.
    """
    hint = EXCEL_HINT.match(text)
    skipped = 0 if hint is None else 1
    text = text if hint is None else text[hint.end() :]
    reader = _reader(text, _delimiter(text) if hint is None else hint[1])
    columns: list[str] = []
    line, is_empty = 1, True
    try:
        for cells in reader:
            place, line = f"{name}:{line + skipped}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = _columns(cells, place)
            else:
                is_empty = False
                yield place, _record(columns, cells, reader.dialect.delimiter)
        if is_empty and columns and not vocabularies(set(columns)):
            yield f"{name}:1", dict.fromkeys(columns)  # its only line may be an edit, so its columns must be named
    except csv.Error as error:
        found = f"found broken CSV ({error})"
        raise ValueError(
            f"{name}:{line + skipped}: {found}; expected quotes in pairs: fix the line. {SHAPE}"
        ) from None


def _reader(text: str, delimiter: str) -> Any:
    # without skipinitialspace, the quotes of `a, "b"` would become part of the text
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)


def _delimiter(text: str) -> str:
    """Return the delimiter that gives known columns, or else the most columns."""
    headers = {}
    for delimiter in DELIMITERS:
        try:
            header: list[str] = next((cells for cells in _reader(text, delimiter) if any(map(str.strip, cells))), [])
        except csv.Error:
            continue  # a quoted cell before another delimiter
        headers[delimiter] = list(map(column_name, header))
    known = [delimiter for delimiter, header in headers.items() if vocabularies(set(header))]
    return known[0] if known else max(headers, key=lambda delimiter: len(headers[delimiter]), default=",")


def _columns(cells: Sequence[str], place: str) -> list[str]:
    while not cells[-1].strip():
        cells = cells[:-1]
    # an index without a name is the first column of many exports
    names = [column_name(cell) or f"column {number}" for number, cell in enumerate(cells, start=1)]
    if len(set(names)) < len(names):
        raise ValueError(f"{place}: found {', '.join(cells)}; expected different column names: rename one")
    return names


def _record(columns: Sequence[str], cells: list[str], delimiter: str) -> dict[str, object] | ValueError:
    while len(cells) > len(columns) and not cells[-1].strip():
        cells.pop()
    if len(cells) != len(columns):
        shown = {"\t": "tab"}.get(delimiter, delimiter)
        found = f"found {len(cells)} cells; expected {len(columns)}, as in the first line"
        return ValueError(f'{found}: put text with the delimiter ({shown}) into "quotes"')
    return {name: cell for name, cell in zip(columns, cells, strict=True)}
