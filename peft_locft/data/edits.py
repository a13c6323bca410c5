"""Edits: `read_edits`, which checks all of a source and settles its conflicts."""

import logging
import os
import reprlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, TypeAlias, get_args

from .column_names import SHAPE
from .edit_files import Row, read_rows
from .edit_records import EditReader
from .edit_types import (
    PROBE_FIELDS,
    TEXT_FIELDS,
    Edit,
    Message,
    Probe,
    Prompt,
    edits_sha256,
    fold_case,
    place_of,
    prompt_identity,
    prompt_of,
    prompts_of,
    same_text,
)
from .field_values import as_text, text
from .scripts import is_spaceless

__all__ = [
    "Edit",
    "EditSource",
    "Message",
    "OnConflict",
    "Probe",
    "Prompt",
    "edits_sha256",
    "first_edits",
    "fold_case",
    "place_of",
    "prompt_identity",
    "prompt_of",
    "prompts_of",
    "read_edits",
    "same_text",
]

logger = logging.getLogger(__name__)

OnConflict = Literal["warn", "error", "last"]
QUESTION_MARKS = ("?", "\uff1f", "\u061f", "\u055e", "\u1367")  # of Latin, Chinese, Arabic, Armenian, Ethiopic


# what `read_edits` reads; datasets and DataFrames are iterables
EditSource: TypeAlias = str | os.PathLike[str] | Edit | Mapping[str, Any] | Iterable[Any]


def read_edits(
    source: EditSource, *, split: str = "train", on_conflict: OnConflict = "warn", language: str | None = None
) -> list[Edit]:
    """Read edits, check all of them, and merge those that have the same prompt and target.

    Records have the columns `prompt` and `target`, `prompt` and `target_new` (EasyEdit), `src` and `alt` (ZsRE),
    `prompt` and `completion` (TRL), `messages` (a conversation that ends with the target), `requested_rewrite`
    (CounterFact, MQuAKE, AKEW) or `edit` (RippleEdits, UniEdit); or else one of `prompt`, `question`, `instruction`,
    `input`, `query`, `fact` and one of `target`, `answer`, `output`, `response`, `new`, `new_target`, `new_answer`. A
    prompt, and a completion, may also be a list of messages; a target may be a list of its right forms. Case, spaces
    and dashes in names do not matter. The columns of the known data sets for rephrasings, probes, subject, relation
    and the answer before the edit are read too, and `paraphrases`, to train on. Numbers and dates are read as text,
    and a list that a program has written into a cell is read as a list. A logged warning names other columns that
    look like a part of an edit. The page "Your edits" lists the data sets and their columns.

    Args:
        source: a file; a dataset, or its "owner/name" on the Hub; a pandas DataFrame; an iterable of edits, records or
            (prompt, target) pairs; a dictionary from prompts to targets; or one of these: an edit, a record, a pair.
            A file is `.json`, `.jsonl`, `.csv`, `.tsv`, `.txt` (JSON or a table) or `.parquet`, also with `.gz` behind
            it. JSON is a list of records or pairs, a dictionary from prompts to targets, or `{"data": [...]}`; or one
            record per line. A table has any of `, ; tab |` between its cells, and the names in its first line.
        split: split of a `DatasetDict`, of a dictionary of lists, or of a dataset on the Hub.
        on_conflict: if a prompt has several targets: "warn" and keep all, raise an "error", or keep the "last".
            Prompts and targets are compared by [`same_text`][peft_locft.data.same_text].
        language: code of the language to edit, where one record is in several; the other languages are then probes
            (`cross_lingual`). `None`: English, or else the first.

    Returns:
        The edits in order, at least one. `Edit.source` is "file:line", or "row 12" for `dataset[12]`.

    Raises:
        FileNotFoundError: if there is no such file or dataset.
        ValueError: if an argument, the file type or the encoding is wrong; the columns are not recognized; there are
            no records; a record cannot be read (the first ten are listed); `on_conflict` is "error" and a prompt has
            several targets.

    Example:
        >>> edits = read_edits("zsre.json", on_conflict="last")
        >>> edits[0].source
        'zsre.json:2'
        >>> read_edits({"The capital of Norway is": "Bergen"})[0].target
        'Bergen'
    """
    if on_conflict not in get_args(OnConflict):
        raise ValueError(f"on_conflict: found {on_conflict!r}; expected one of {', '.join(get_args(OnConflict))}")
    edits, left_out = read_with_left_out(source, split, language)
    _name_left_out(edits, left_out)
    if _look_swapped(edits):
        logger.warning(
            "%s: are prompt and target swapped? The first edit would answer %r with %r.",
            edits[0].source,
            edits[0].prompt,
            edits[0].target,
        )
    return settle_conflicts(edits, on_conflict, stacklevel=3)


def _name_left_out(edits: list[Edit], left_out: Counter[str]) -> None:
    if left_out:
        logger.warning(
            "%s: the columns %s are not read. Names that are: rephrasings, locality, portability (to evaluate), "
            "paraphrases (to train on). Other text belongs into the prompt.",
            edits[0].source.rpartition(":")[0] or "edits",
            ", ".join(left_out),
        )


def read_with_left_out(source: EditSource, split: str, language: str | None) -> tuple[list[Edit], Counter[str]]:
    """Return the edits of a source as they are, and how many records have a field that is not read, by its name."""
    is_one = isinstance(source, Edit) or (isinstance(source, tuple) and _is_pair(source))
    rows = list(read_rows([source] if is_one else source, split))
    if not rows:
        raise ValueError(f"{reprlib.repr(source)}: found no records; expected at least one edit. {SHAPE}")
    return _edits(rows, language)


def first_edits(source: Any, num_edits: int | None, on_conflict: OnConflict = "warn") -> list[Edit]:
    """Return the first `num_edits` edits of a source; `None`: all.

    Raises:
        ValueError: if `num_edits` is below 1, or as in `read_edits`.
    """
    if num_edits is not None and num_edits < 1:
        raise ValueError(f"num_edits={num_edits}: expected 1 or more; leave it out to use all edits")
    return read_edits(source, on_conflict=on_conflict)[:num_edits]


def _look_swapped(edits: list[Edit]) -> bool:
    """Return whether only the targets are questions, or the prompts are names and the targets sentences."""
    if all(_asks(edit.target) and not _asks(edit.prompt) for edit in edits):
        return True
    # a Chinese question has no space either
    has_words = not any(is_spaceless(edit.prompt) for edit in edits)
    return has_words and all(len(edit.prompt.split()) <= 2 and len(edit.target.split()) >= 4 for edit in edits)


def _asks(text: str) -> bool:
    return text.rstrip().endswith(QUESTION_MARKS)


def settle_conflicts(edits: list[Edit], on_conflict: OnConflict | Literal["keep"], stacklevel: int = 2) -> list[Edit]:
    """Merge the edits with the same prompt and target, and settle those with the same prompt alone.

    Args:
        edits: the edits.
        on_conflict: as in `read_edits`; `"keep"`: keep all, without a warning.
        stacklevel: of the warning.
    """
    groups: dict[tuple[Prompt, str], list[Edit]] = {}
    for edit in edits:
        groups.setdefault((prompt_identity(edit), same_text(edit.target)), []).append(edit)
    merged = [group[0] if len(group) == 1 else _merge(group) for group in groups.values()]
    logger.info("Read %d edits; merged them to %d with different prompt and target.", len(edits), len(merged))
    last_targets = {prompt_identity(edit): same_text(edit.target) for edit in edits}
    if on_conflict == "last":
        return [edit for edit in merged if same_text(edit.target) == last_targets[prompt_identity(edit)]]
    if len(last_targets) < len(merged) and on_conflict != "keep":
        if on_conflict == "error":
            raise ValueError(_describe_conflicts(merged))
        warnings.warn(_describe_conflicts(merged), stacklevel=stacklevel)
    return merged


def _merge(group: list[Edit]) -> Edit:
    """Return one edit of several with the same prompt and target: the first, with the probes of all."""
    together: dict[str, Any] = {
        name: _unique(getattr(edit, name) for edit in group) for name in (*TEXT_FIELDS, *PROBE_FIELDS)
    }
    firsts: dict[str, Any] = {
        name: next((value for edit in group if (value := getattr(edit, name))), None)
        for name in ("subject", "relation", "ground_truth", "language")
    }
    return replace(group[0], **together, **firsts)


def _unique(parts: Iterable[Iterable[Any]]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(parts)))


def _describe_conflicts(edits: list[Edit]) -> str:
    by_prompt: dict[Prompt, list[Edit]] = {}
    for edit in edits:
        by_prompt.setdefault(prompt_identity(edit), []).append(edit)
    conflicts = [group for group in by_prompt.values() if len(group) > 1]
    lines = [f"{len(conflicts)} of {len(by_prompt)} prompts have several targets; a model can learn one. The first:"]
    for group in conflicts[:5]:
        targets = ", ".join(f"{edit.target!r} ({edit.source})" for edit in group)
        lines.append(f"  {group[0].prompt!r}: {targets}")
    return "\n".join([*lines, 'Remove the wrong ones, or pass on_conflict="last" to use the last target of each.'])


def _edits(rows: list[Row], language: str | None) -> tuple[list[Edit], Counter[str]]:
    """Return the edits of rows, and what was left out, as `EditReader` says it."""
    reader = EditReader(rows, language)
    edits: list[Edit] = []
    problems = []
    for place, row in rows:
        try:
            edits += _edits_of_row(reader, row, place)
        except ValueError as error:
            problems.append(f"  {place}: {error}")
    if problems:
        head = f"{len(problems)} of {len(rows)} records cannot be read. The first:"
        raise ValueError("\n".join([head, *problems[:10]]))
    return edits, reader.left_out


def _is_pair(row: Any) -> bool:
    return isinstance(row, (list, tuple)) and len(row) == 2 and all(isinstance(as_text(each), str) for each in row)


def _edits_of_row(reader: EditReader, row: Any, place: str) -> list[Edit]:
    if isinstance(row, Edit):
        return [row if row.source else replace(row, source=place)]
    if isinstance(row, ValueError):
        raise row
    if _is_pair(row):
        return [Edit(text(row[0], "prompt"), str(as_text(row[1])), source=place)]
    if not isinstance(row, Mapping):
        expected = "expected a record with named fields, or a pair (prompt, target)"
        raise ValueError(f"found {reprlib.repr(row)} ({type(row).__name__}); {expected}")
    return reader.edits(row, place)
