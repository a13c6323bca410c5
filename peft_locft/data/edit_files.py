"""Rows of files and datasets, each with its place."""

import difflib
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.untrusted_json import unique_pairs
from .column_names import SHAPE, SHAPE_OF_JSON, column_name, is_known, vocabularies, with_column_names
from .field_values import as_text
from .languages import language_code
from .tables import Row, table_rows
from .text_files import read_text

if TYPE_CHECKING:
    import datasets

READ_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_rows(source: Any, split: str) -> Iterator[Row]:
    """Yield the records of a source with their places and with the names of `column_name`."""
    return ((place, with_column_names(row)) for place, row in _rows(source, split))


def _rows(source: Any, split: str) -> Iterable[Row]:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        hub_name = isinstance(source, str) and not _suffix(path) and HUB_NAME.fullmatch(source)
        if _exists(path) or not hub_name:
            return _file_rows(path, split)
        source = _load_from_hub(str(source), split)
    if hasattr(source, "iterrows"):  # a DataFrame
        source = _records_of_table(source)
    if isinstance(source, Mapping):
        source = _records_of_mapping(source, split, "source")
    if hasattr(source, "with_format"):  # a dataset: read its rows as plain Python objects
        source = source.with_format(None)
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        expected = "expected a path, a dataset, a DataFrame, a list of edits, or a dictionary from prompts to targets"
        raise ValueError(f"source: found {reprlib.repr(source)}; {expected}")
    return ((f"row {index}", row) for index, row in enumerate(source))


def _records_of_table(table: Any) -> list[Any]:
    names = list(map(column_name, table.columns))
    if len(set(names)) < len(names):
        raise ValueError(f"source: found the columns {', '.join(names)}; expected different names: rename one")
    return list(table.to_dict("records"))


def _records_of_mapping(mapping: Mapping[Any, Any], split: str, place: str) -> Any:
    """Return the records in a split, in one record, in columns, in a dictionary from prompts to targets, or in a list.

    Raises:
        ValueError: if it is none of these.
    """
    if split in mapping and not isinstance(mapping[split], str):
        return mapping[split]
    columns = with_column_names(mapping)
    if isinstance(columns, dict) and (found := vocabularies(columns.keys())):
        held = [columns[name] for name in found[0]]
        if all(isinstance(each, Mapping) for each in held) and len(held) > 1:  # as pandas writes JSON
            columns, held = {name: list(each.values()) for name, each in columns.items()}, [*map(list, held)]
        if not all(isinstance(each, (list, tuple)) and all(isinstance(text, str) for text in each) for each in held):
            return [mapping]
        if len({len(each) for each in columns.values()}) > 1:
            raise ValueError(f"{place}: found columns of different lengths; expected a value of each in every record")
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if any(is_known(column_name(name)) for name in mapping) and not all(map(_has_edit, mapping.values())):
        return [mapping]  # a record that lacks its target, say, and no dictionary from prompts to targets
    if all(isinstance(as_text(target), str) for target in mapping.values()):
        return list(mapping.items())
    if mapping and all(map(_has_edit, mapping.values())):
        # one fact in several languages, or records by their ids
        return [mapping] if all(map(language_code, mapping)) else list(mapping.values())
    if (rows := _rows_by_language(mapping)) is not None:
        return rows
    lists = [name for name, value in mapping.items() if isinstance(value, (list, tuple))]
    splits = [name for name, value in mapping.items() if hasattr(value, "features")]
    if len(lists) == 1 and not splits and not any(isinstance(value, Mapping) for value in mapping.values()):
        return mapping[lists[0]]
    if splits or lists:
        raise ValueError(f"{place}: found no split {split!r}, but {', '.join(map(str, splits + lists))}; pass split=")
    expected = 'expected one record, a dictionary from prompts to targets, or {"data": [records]}'
    raise ValueError(f"{place}: found the keys {reprlib.repr(list(mapping))}; {expected}\n{SHAPE}")


def _has_edit(value: Any) -> bool:
    named = with_column_names(value)
    return isinstance(named, dict) and bool(vocabularies(named.keys()))


def _rows_by_language(mapping: Mapping[Any, Any]) -> list[Any] | None:
    """Return the facts of equally long lists of records by language, one record per fact."""
    lists = [value for value in mapping.values() if isinstance(value, (list, tuple)) and all(map(_has_edit, value))]
    if not lists or len(lists) < len(mapping) or len(set(map(len, lists))) > 1 or not all(map(language_code, mapping)):
        return None
    return [dict(zip(mapping, records, strict=True)) for records in zip(*lists, strict=True)]


def _load_from_hub(name: str, split: str) -> "datasets.Dataset":
    import datasets  # here, because it takes seconds, and a local file does not need it

    try:
        return datasets.load_dataset(name, split=split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: found neither a file nor a dataset on the Hub: {error}") from error


def _file_rows(path: Path, split: str) -> Iterable[Row]:
    if not _is_file(path):
        raise FileNotFoundError(_not_a_file(path))
    suffix = _suffix(path)
    if suffix == ".parquet":
        return _parquet_rows(path)
    if not suffix:
        raise ValueError(_other_kind(path))
    text = read_text(path, newline="")
    if suffix.startswith((".csv", ".tsv")) or (suffix.startswith(".txt") and text.lstrip()[:1] not in ("[", "{")):
        return table_rows(text, path.name)
    return _json_rows(text, path.name, split)


def _suffix(path: Path) -> str:
    """Return what a file's name says of its content, such as `.csv` or `.csv.gz`; nothing for what cannot be read."""
    suffix = "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()
    return suffix if suffix.removesuffix(".gz") in READ_SUFFIXES and suffix != ".parquet.gz" else ""


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or with a zero in it
        return False


def _is_file(path: Path) -> bool:
    return _exists(path) and path.is_file()


def _not_a_file(path: Path) -> str:
    shown = str(path) if len(str(path)) < 300 and "\n" not in str(path) else reprlib.repr(str(path))
    expected = "expected a file of edits, or 'owner/name' of a Hub dataset"
    if _exists(path):
        if (path / "adapter_config.json").is_file():
            return f"{shown}: found the folder of an adapter; {expected}. Give the edits that it was trained on."
        if (path / "config.json").is_file():
            return f"{shown}: found the folder of a model; {expected}. Are the model and the edits swapped?"
        within = sorted(each.name for each in path.iterdir() if _suffix(each))
        hint = f". In it: {', '.join(within[:5])}" if within else ""
        return f"{shown}: found a folder; {expected}{hint}"
    near: list[str] = []
    if _exists(path.parent) and path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
    hint = f". Did you mean {path.parent / near[0]}?" if near else ""
    return f"{shown}: found no such file; {expected}{hint}"


def _other_kind(path: Path) -> str:
    found = f"{path}: found {path.suffix!r}" if path.suffix else f"{path}: found a name without an ending"
    if path.suffix.lower() in SPREADSHEETS:
        advice = 'save the sheet as "CSV UTF-8", or in Python: read_edits(pandas.read_excel(path))'
    else:
        advice = "unpack, convert or rename the file"
    return f"{found}; expected one of {', '.join(READ_SUFFIXES)}, or one with .gz behind it: {advice}"


def _json_rows(text: str, name: str, split: str) -> Iterable[Row]:
    """Return the records of JSON: one value in the file, or one in each line."""
    if not text.strip():
        return []
    is_lines = name.lower().endswith((".jsonl", ".jsonl.gz"))
    try:
        content = json.loads(text, object_pairs_hook=unique_pairs)
    except json.JSONDecodeError as error:
        first = next((line for line in text.split("\n") if line.strip()), "")
        if is_lines or _is_record(first):
            return _lines_of_json(text, name)
        found = f"found broken JSON at column {error.colno} ({error.msg})"
        expected = "expected a list of records, or one record per line: fix it there"
        raise ValueError(f"{name}:{error.lineno}: {found}; {expected}\n{SHAPE_OF_JSON}") from None
    except ValueError as error:
        if is_lines:
            return _lines_of_json(text, name)
        raise ValueError(f"{name}: found {error}; expected each name once in a record: rename or remove one") from None
    if isinstance(content, list):
        return _places_in_list(content, text, name)
    if not isinstance(content, dict):
        raise ValueError(f"{name}:1: found a {type(content).__name__}; expected a list of records")
    in_one_line = is_lines and len(text.split("\n", 1)[0].strip()) == len(text.strip())
    records = [content] if in_one_line else _records_of_mapping(content, split, name)
    if records == [content]:
        return _places_in_list(records, text, name)
    return ((f"{name}: record {number}", record) for number, record in enumerate(records, start=1))


def _places_in_list(records: Iterable[Any], text: str, name: str) -> Iterator[Row]:
    # json.loads has no line numbers: decode again, record by record, and count the lines between
    decode, line, counted, end = json.JSONDecoder().raw_decode, 1, 0, 0
    end = text.find("[") + 1 if text.lstrip().startswith("[") else 0
    for record in records:
        while text[end] in ", \t\r\n":
            end += 1
        line += text.count("\n", counted, end)
        counted, (_, end) = end, decode(text, end)
        yield f"{name}:{line}", record


def _lines_of_json(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            # a comma at the end is what is left of a list
            record = json.loads(line.strip().removesuffix(","), object_pairs_hook=unique_pairs)
        except json.JSONDecodeError as error:
            found = f"found broken JSON at column {error.colno} ({error.msg})"
            record = ValueError(f"{found}; expected one record per line: fix it there")
        except ValueError as error:
            record = ValueError(f"found {error}; expected each name once in a record: rename or remove one")
        yield f"{name}:{number}", record


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line.strip().removesuffix(",")), dict)
    except ValueError:
        return False


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path.name}: found broken Parquet ({error}); expected a complete file: download or export it again"
        ) from error
    return ((f"{path.name}: row {index}", record) for index, record in enumerate(records))
