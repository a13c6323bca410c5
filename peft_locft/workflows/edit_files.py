"""Edits of any data set, looked at and written in our own form."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..data.edit_split import split_edits
from ..data.edit_summary import EditSummary, summarize_edits
from ..data.edit_types import Edit, edit_lines
from ..data.edits import EditSource, OnConflict
from ..io.files import check_folder, write_atomically

OVERWRITE = "--overwrite"


@dataclass(frozen=True, slots=True)
class ConvertedEdits:
    """What [`convert_edits`][peft_locft.workflows.convert_edits] understood and wrote.

    Attributes:
        summary: what was understood.
        files: the number of edits in each file that was written.
    """

    summary: EditSummary
    files: dict[Path, int]

    def __str__(self) -> str:
        written = [f"wrote {number} edits to {file}" for file, number in self.files.items()]
        return "\n".join([str(self.summary), *([""] if written else []), *written])


def convert_edits(
    source: EditSource,
    *,
    output: str | os.PathLike[str] | None = None,
    split: float | None = None,
    seed: int = 0,
    language: str | None = None,
    on_conflict: OnConflict = "warn",
    overwrite: bool = False,
) -> ConvertedEdits:
    """Read edits, say what was understood, and write them in our own form, one JSON record per line.

    Everything is checked before anything is written, and each file is written whole or not at all.

    Args:
        source: whatever `read_edits` reads, or a folder of such files.
        output: the file to write, `.jsonl`; `None`: write nothing.
        split: how many edits to train on, as in [`split_edits`][peft_locft.data.split_edits]. Then two files are
            written: of `edits.jsonl`, `edits.train.jsonl` and `edits.held_out.jsonl`.
        seed: of the split.
        language: as in `read_edits`.
        on_conflict: as in `summarize_edits`.
        overwrite: replace files that are there.

    Returns:
        What was understood, and the files; `print` shows both.

    Raises:
        FileExistsError: if a file is there and `overwrite` is False.
        ValueError: as in `summarize_edits` and `split_edits`; if `output` has another ending, or is missing beside
            `split`.

    Example:
        >>> print(convert_edits("mquake.json", output="edits.jsonl", split=0.8))
    """
    files = _files(output, split)
    for file in files:
        check_folder(file.parent, "edits")
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} is there. Nothing was changed. Choose another output, or add {OVERWRITE}.")
    summary = summarize_edits(source, language=language, on_conflict=on_conflict)
    parts: tuple[list[Edit], ...] = (summary.edits,)
    if split is not None:
        parts = split_edits(summary.edits, split, seed=seed)
    for file, edits in zip(files, parts, strict=False):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, edit_lines(edits))
    return ConvertedEdits(summary, {file: len(edits) for file, edits in zip(files, parts, strict=False)})


def _files(output: str | os.PathLike[str] | None, split: float | None) -> list[Path]:
    if output is None:
        if split is not None:
            raise ValueError("output is missing: split writes two files. Give one: output='edits.jsonl'.")
        return []
    file = Path(output)
    if file.suffix != ".jsonl":
        raise ValueError(f"output: found {str(output)!r}; expected a name that ends in .jsonl")
    if file.is_dir():
        raise ValueError(f"output: found the folder {file}; expected the name of a file")
    return [file] if split is None else [file.with_suffix(f".{part}.jsonl") for part in ("train", "held_out")]
