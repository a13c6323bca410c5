"""How a merge in place, and its way back, exchange files: the new ones come beside the old, and one rename decides."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..io.checkpoint import INDEX_NAME, Checkpoint
from ..io.copies import sync_folder
from ..io.files import write_atomically
from .in_place_undo import IN_PLACE_FOLDER, UNDO_NAME, Undo, read_undo

STAGED_FOLDER = "staged"


@contextmanager
def staging(model: Path) -> Iterator[Path]:
    """Give an empty folder for new files; an error leaves of them what the model's own files need, and no more."""
    staged = model / IN_PLACE_FOLDER / STAGED_FOLDER
    try:
        staged.mkdir(parents=True)
        yield staged
    except BaseException:
        recover(model)
        raise


def stage_index(model: Path, staged: Path, names: Mapping[str, str]) -> None:
    """Write the index that a model has once its files are called otherwise, if any are.

    Args:
        model: the model's folder.
        staged: the folder for new files.
        names: the new names by those that the index has now.

    Raises:
        ValueError: if the index would not come back byte by byte.
    """
    if all(before == after for before, after in names.items()):
        return
    index = model / INDEX_NAME
    content = index.read_bytes()
    # the text is changed and not written anew, so that the way back gives the bytes that were there
    renamed = _replaced(content, names)
    expected = {name: names.get(shard, shard) for name, shard in json.loads(content)["weight_map"].items()}
    back = _replaced(renamed, {after: before for before, after in names.items()})
    if json.loads(renamed)["weight_map"] != expected or back != content:
        raise ValueError(
            f"{index} does not write the names of its files as JSON is commonly written, or uses them for something "
            "else, so that they cannot be exchanged and put back. Merge into a new folder."
        )
    write_atomically(staged / INDEX_NAME, renamed)
    shutil.copymode(index, staged / INDEX_NAME)


def _replaced(content: bytes, names: Mapping[str, str]) -> bytes:
    for before, after in names.items():
        content = content.replace(json.dumps(before).encode(), json.dumps(after).encode())
    return content


def exchange(model: Path, staged: Path, names: Mapping[str, str]) -> None:
    """Make staged files, which are on the disk, those of the model.

    Args:
        model: the model's folder.
        staged: the folder of the new files: those of weights, and the index that names them if their names are new.
        names: the new names by those that the model's files have now. If a file keeps its name, it is the only one,
            and its rename is what decides; else that of the index is.
    """
    for folder in (staged, staged.parent, model):
        sync_folder(folder)
    for name in names.values():
        os.replace(staged / name, model / name)
    if (staged / INDEX_NAME).exists():
        sync_folder(model)  # an index on the disk must not name files that are not there yet
        os.replace(staged / INDEX_NAME, model / INDEX_NAME)
    sync_folder(model)


def settle(model: Path, names: Mapping[str, str], merged: bool) -> None:
    """Remove what does not belong to a model with its edit merged, or to one without: no index names it.

    Args:
        model: the model's folder.
        names: those of the edited files by those without the edit.
        merged: whether the model is the edited one.
    """
    folder = model / IN_PLACE_FOLDER
    for original, edited in names.items():
        if original != edited:
            (model / (original if merged else edited)).unlink(missing_ok=True)
    shutil.rmtree(folder / STAGED_FOLDER, ignore_errors=True)
    if not merged:
        # the last one, since it tells what else there is to remove
        (folder / UNDO_NAME).unlink()
        _remove_empty(folder)
    sync_folder(model)


def recover(model: Path) -> tuple[Undo | None, bool]:
    """End what another process was killed in.

    Which of the two models is there, the files that it is loaded from say. Files beside them that belong to the other
    one are removed.

    Args:
        model: the model's folder.

    Returns:
        What takes the edit off again that is merged in place, if one is, and whether there was something to remove.

    Raises:
        ValueError: if the undo file is broken, or the model neither what the merge wrote nor what was there before.
    """
    folder = model / IN_PLACE_FOLDER
    staged = (folder / STAGED_FOLDER).exists()
    if not (folder / UNDO_NAME).is_file():
        if staged:
            shutil.rmtree(folder / STAGED_FOLDER)
        _remove_empty(folder)
        return None, staged
    undo = read_undo(folder / UNDO_NAME)
    merged = undo.is_merged(Checkpoint(model))
    settle(model, undo.edited_names(), merged)
    return (undo, staged) if merged else (None, True)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
