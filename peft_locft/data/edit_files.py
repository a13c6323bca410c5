"""Rows of files and datasets, each with its place."""

import csv
import io
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .text_files import read_text

if TYPE_CHECKING:
    import datasets

# a place ("zsre.json:12", "row 12") and its content, or the ValueError that says why it cannot be read
Row = tuple[str, object]

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_rows(source: Any, split: str) -> Iterable[Row]:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        hub_name = isinstance(source, str) and path.suffix.lower() not in READERS and HUB_NAME.fullmatch(source)
        if path.exists() or not hub_name:
            return _file_rows(path)
        source = _load_from_hub(str(source), split)
    if isinstance(source, Mapping):
        if split not in source:
            found = f"found no split {split!r}, but {', '.join(map(str, source))}"
            raise ValueError(f"source: {found}; pass split=, or put a single record into a list")
        source = source[split]
    if hasattr(source, "with_format"):  # a dataset: read its rows as plain Python objects
        source = source.with_format(None)
    if not isinstance(source, Iterable):
        raise ValueError(f"source: found {reprlib.repr(source)}; expected a path, a dataset, or a list of edits")
    return ((f"row {index}", row) for index, row in enumerate(source))


def _load_from_hub(name: str, split: str) -> "datasets.Dataset":
    import datasets  # here, because it takes seconds, and a local file does not need it

    try:
        return datasets.load_dataset(name, split=split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: found neither a file nor a dataset on the Hub: {error}") from error


def _file_rows(path: Path) -> Iterable[Row]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: found {found}; expected a file of edits, or 'owner/name' of a Hub dataset")
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"{path}: found {suffix!r}; expected one of {', '.join(READERS)}: unpack or convert the file")
    return READERS[suffix](path)


def _json_rows(path: Path) -> Iterator[Row]:
    text = read_text(path, newline="")
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        found = f"found broken JSON at column {error.colno} ({error.msg})"
        advice = "fix it there, or rename a file with one record per line to .jsonl"
        raise ValueError(f"{path.name}:{error.lineno}: {found}; expected a list of records: {advice}") from None
    if not isinstance(records, list):
        raise ValueError(
            f"{path.name}:1: found a {type(records).__name__}; expected a list: put [ ] around the records"
        )
    # json.loads has no line numbers: decode again, record by record, and count the lines between
    decode, line, counted, end = json.JSONDecoder().raw_decode, 1, 0, text.find("[") + 1
    for record in records:
        while text[end] in ", \t\r\n":
            end += 1
        line += text.count("\n", counted, end)
        counted, (_, end) = end, decode(text, end)
        yield f"{path.name}:{line}", record


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for line, text in enumerate(read_text(path, newline="").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            found = f"found broken JSON at column {error.colno} ({error.msg})"
            record = ValueError(f"{found}; expected one record per line: fix it there")
        yield f"{path.name}:{line}", record


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(read_text(path, newline=""), newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path.name}:1: found {', '.join(header)}; expected different column names: rename one")
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield f"{path.name}:{line}", dict(zip(header, cells, strict=True))
            elif cells:
                found = f"found {len(cells)} cells; expected {len(header)}, as in the first line"
                yield f"{path.name}:{line}", ValueError(f'{found}: put text with commas into "quotes"')
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path.name}:{line}: found broken CSV ({error}); expected quotes in pairs: fix the line"
        ) from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path.name}: found broken Parquet ({error}); expected a complete file: download or export it again"
        ) from error
    return ((f"{path.name}: row {index}", record) for index, record in enumerate(records))


READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
