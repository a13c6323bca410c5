"""Merging adapters into a model's own folder, and the exact way back."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants

from ..io.checkpoint import INDEX_NAME, Checkpoint
from ..io.copies import locked
from .edited_weights import plan_edits, write_edited_shard, write_patched
from .in_place_exchange import exchange, recover, settle, stage_index, staging
from .in_place_undo import IN_PLACE_FOLDER, UNDO_NAME, Undo, edited_names, write_undo
from .stream_merge import MergeSummary, conflicts_of, merge_record, other_files, progress_bar


def merge_in_place(
    model_folder: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    force: bool = False,
    progress: bool = False,
) -> MergeSummary:
    """Merge adapters into the files of a model's own folder, and keep what `detach` needs to take them off again.

    The edited tensors have the bits that `merge_checkpoint` gives them, and no other tensor changes. The originals go
    into `locft/locft_undo.safetensors` in the folder (in a folder of its own, since some servers load every
    safetensors file that they find beside a model).

    What holds when the process is killed, or the machine goes down, at any moment:

    - Every file is written aside, whole, and no file of the model is written into. A program that has one open or
      mapped keeps it.
    - If one file holds all edited tensors, the new one takes its place by a rename. The model is the old or the new
      one, for every reader, always.
    - If several do, the new ones come beside the old under names of their own (`…-locft.safetensors`), and the index
      that names them takes the place of the old one by a rename. Whoever loads the model by its index, as transformers
      does, finds the old or the new one, always. One that read the index before and opens a file after it finds that
      of the model that it began with, or none, and never one of the other. A reader that takes all files beside the
      model, and asks for no index, finds both models from the moment that the new files are there until the old ones
      are removed, or, after a kill in between, until the next call.
    - The next `merge_in_place` or `detach` on the folder removes what a killed one left.

    It needs room on the disk for the files that hold an edited tensor, unless the file system shares blocks
    (reflinks).

    Args:
        model_folder: a folder with a safetensors checkpoint; no folder of the Hub's cache.
        adapters: as in `merge_checkpoint`.
        weights: as in `merge_checkpoint`.
        scale: as in `merge_checkpoint`.
        force: as in `merge_checkpoint`.
        progress: as in `merge_checkpoint`.

    Returns:
        What was done.

    Raises:
        ValueError: as in `merge_checkpoint`; also if adapters are merged in place already, if the folder is in the
            Hub's cache or a file to change a symbolic link (what it leads to belongs to others), if a file has the
            name that an edited one would get, if the index would not come back byte by byte, or if another process is
            at work in the folder. The model stays as it was.
        OSError: if the disk has no room, or a file cannot be written, or does not read as it was written.

    Example:
        >>> from peft_locft import detach, merge_in_place
        >>> merge_in_place("model", ["out"])
        >>> detach("model")  # every file has the bytes that it had before
    """
    begun = time.perf_counter()
    with _at_work(model_folder) as (folder, undo, _):
        if undo is not None:
            raise ValueError(
                f"{folder} has an edit merged in place already. Edits are not merged on top of each other, since each "
                f"would round anew: `locft detach {folder}`, and then merge all of the adapters together."
            )
        edits = plan_edits(Checkpoint(folder), adapters, weights, scale, force)
        shards = edits.by_shard()
        names = edited_names(shards)
        _refuse_what_others_share(folder, names)
        _refuse_what_is_there(folder, names)
        _, left_out = other_files(edits.checkpoint)
        conflicts = conflicts_of(edits)
        with staging(folder) as staged, progress_bar(_size(folder, shards), progress) as advance:
            stage_index(folder, staged, names)
            digests: dict[str, str] = {}
            for shard, changes in shards.items():
                digests |= write_edited_shard(folder / shard, staged / names[shard], changes, advance)
            write_undo(staged / UNDO_NAME, edits, digests, merge_record(edits, weights, scale))
            # before the new files: by it a later call knows what is there of them
            os.replace(staged / UNDO_NAME, staged.parent / UNDO_NAME)
            exchange(folder, staged, names)
        settle(folder, names, merged=True)
        done = _summary(folder, digests, names.values(), begun)
        return replace(done, left_out=tuple(left_out), conflicts=conflicts)


def detach(model_folder: str | os.PathLike[str], *, progress: bool = False) -> MergeSummary:
    """Take off what `merge_in_place` merged: every file of the folder has the name and the bytes again that it had.

    What `merge_in_place` says of a kill at any moment holds here too.

    Args:
        model_folder: the folder.
        progress: show a progress bar on a terminal.

    Returns:
        What was done.

    Raises:
        ValueError: if nothing is merged in place there; if the tensors that the merge wrote, or the layout of their
            file, are no longer those that it wrote, so that the originals do not belong there; if a file to change is
            a symbolic link; or if another process is at work in the folder. The model is as it was then.
        OSError: if the disk has no room, or a file cannot be written, or does not read as it was written.
    """
    begun = time.perf_counter()
    with _at_work(model_folder) as (folder, undo, something_removed):
        if undo is None:
            raise ValueError(
                f"{folder} has no {IN_PLACE_FOLDER}/{UNDO_NAME}: nothing is merged in place there"
                f"{', and what was left of one that was interrupted is removed' if something_removed else ''}."
            )
        undo.check_originals()
        checkpoint = Checkpoint(folder)
        names = {edited: original for original, edited in undo.edited_names().items()}
        _refuse_what_others_share(folder, names)
        with staging(folder) as staged, progress_bar(_size(folder, names), progress) as advance:
            stage_index(folder, staged, names)
            for edited, original in names.items():
                tensors = undo.by_shard()[original]
                originals = {name: (undo.originals[name].read_bytes(), checkpoint.tensor(name)) for name in tensors}
                write_patched(folder / edited, staged / original, originals, advance)
            exchange(folder, staged, names)
        settle(folder, undo.edited_names(), merged=False)
        return _summary(folder, undo.originals, names.values(), begun)


def _size(folder: Path, shards: Iterable[str]) -> int:
    return sum((folder / shard).stat().st_size for shard in shards)


def _summary(folder: Path, tensors: Iterable[str], written: Collection[str], begun: float) -> MergeSummary:
    return MergeSummary(
        folder,
        tensors=tuple(sorted(tensors)),
        written=tuple(sorted(written)),
        num_bytes=_size(folder, written),
        seconds=time.perf_counter() - begun,
    )


@contextmanager
def _at_work(model_folder: str | os.PathLike[str]) -> Iterator[tuple[Path, Undo | None, bool]]:
    """Give a model's folder to this process alone, and end what another was killed in."""
    folder = Path(model_folder).resolve()
    if not folder.is_dir():
        raise ValueError(
            f"{model_folder} is no folder here. A merge in place, and its way back, need a model's own folder; to "
            "merge into a model from the Hub, write a new folder (merge_checkpoint, `locft merge BASE ADAPTER OUT`)."
        )
    with locked(folder) as has_it:
        if not has_it:
            raise ValueError(f"Another process is merging or detaching in {folder}: wait until it is done.")
        yield folder, *recover(folder)


def _refuse_what_others_share(folder: Path, names: Mapping[str, str]) -> None:
    files = [folder / name for name in (*names, INDEX_NAME)]
    links = [file for file in files if file.is_symlink()]
    if links or folder.is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
        what = f"{links[0]} is a symbolic link to {links[0].resolve()}" if links else f"{folder} is in the Hub's cache"
        raise ValueError(
            f"{what}, which belongs to others too: in the Hub's cache, to every program that loads this model. Merge "
            f"into a new folder instead: `locft merge {folder} ADAPTER OUT`."
        )


def _refuse_what_is_there(folder: Path, names: Mapping[str, str]) -> None:
    for before, after in names.items():
        if before != after and os.path.lexists(folder / after):
            raise ValueError(
                f"{folder / after} is there already, and the edited {before} would get that name. Move it away if "
                "nothing needs it."
            )
