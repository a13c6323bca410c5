"""Merging adapters into a model's own folder, and the exact way back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants

from .checkpoint import Checkpoint
from .edited_weights import plan_edits, write_edited_shard, write_patched
from .file_copies import locked
from .in_place_journal import UNDO_NAME, Committed, Journal
from .in_place_undo import read_undo, write_undo
from .stream_merge import MergeSummary, merge_record, other_files, progress_bar


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

    The edited tensors have the bits that `merge_checkpoint` gives them; no other byte of the folder changes. Their
    originals go into `locft/locft_undo.safetensors` in the folder (in a folder of its own, since some servers load
    every safetensors file that they find beside a model).

    What holds when the process is killed, or the machine goes down, at any moment:

    - Every file of the checkpoint is the old one or the new one, whole: a new one is written aside, waits until it is
      on the disk, and takes the place of the old by a rename. A program that has the old one open or mapped keeps it.
    - If one file holds all edited tensors, the model is therefore the old or the new one, for every reader, always.
    - If several do, no system call renames them together. The index that names them is moved away while they are
      renamed, well below a millisecond: a program that opens the model through its index, as transformers does, finds
      no model in this moment, or after a kill in it, rather than a mixture. (One that has read the index before can
      get a mixture, and so can one that asks for no index. When the machine goes down in this moment, it takes a file
      system that keeps the order of renames, as ext4, XFS, Btrfs and APFS do.)
    - The next `merge_in_place` or `detach` on the folder ends what was interrupted: nothing is left of a merge that
      was killed before all its files were written aside; one that was killed later is completed, to the same bytes.

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
            Hub's cache or a file to change a symbolic link (what it leads to belongs to others), if another process is
            at work in the folder, or if a file changed since a merge that was interrupted. The model stays as it was.
        OSError: if a file cannot be written, or does not read as it was written.

    Example:
        >>> from peft_locft import detach, merge_in_place
        >>> merge_in_place("model", ["out"])
        >>> detach("model")  # every file has the bytes that it had before
    """
    begun = time.perf_counter()
    with _at_work(model_folder) as (folder, journal):
        if (journal.folder / UNDO_NAME).exists():
            raise ValueError(
                f"{folder} has an edit merged in place already"
                f"{' (by a merge that was interrupted and is completed now)' if journal.completed else ''}. Edits are "
                f"not merged on top of each other, since each would round anew: `locft detach {folder}`, and then "
                "merge all of the adapters together."
            )
        edits = plan_edits(Checkpoint(folder), adapters, weights, scale, force)
        shards = edits.by_shard()
        _refuse_what_others_share(folder, list(shards))
        _, left_out = other_files(edits.checkpoint)
        with journal.staging() as staged, progress_bar(_size(folder, shards), progress) as advance:
            digests: dict[str, str] = {}
            for shard, changes in shards.items():
                digests |= write_edited_shard(folder / shard, staged / shard, changes, advance)
            write_undo(staged / UNDO_NAME, edits, digests, merge_record(edits, weights, scale))
            journal.commit("merge", sorted(shards), sorted(digests))
        done = journal.carry_out()
        return replace(_summary(folder, done, begun), left_out=tuple(left_out))


def detach(model_folder: str | os.PathLike[str], *, progress: bool = False) -> MergeSummary:
    """Take off what `merge_in_place` merged: every file of the folder has the bytes again that it had before.

    What `merge_in_place` says of a kill at any moment holds here too.

    Args:
        model_folder: the folder.
        progress: show a progress bar on a terminal.

    Returns:
        What was done.

    Raises:
        ValueError: if nothing is merged in place there; if the tensors that the merge wrote, or the layout of their
            file, are no longer those that it wrote, so that the originals do not belong there; if a file to change is
            a symbolic link; if another process is at work in the folder; or if a file changed since a merge that was
            interrupted. The model is as it was then.
        OSError: if a file cannot be written, or does not read as it was written.
    """
    begun = time.perf_counter()
    with _at_work(model_folder) as (folder, journal):
        if journal.completed is not None and journal.completed.action == "detach":
            return _summary(folder, journal.completed, begun)
        if not (journal.folder / UNDO_NAME).is_file():
            raise ValueError(
                f"{folder} has no {journal.folder.name}/{UNDO_NAME}: nothing is merged in place there"
                f"{', and what was left of a merge that was interrupted is removed' if journal.removed else ''}."
            )
        undo = read_undo(journal.folder / UNDO_NAME)
        shards = undo.by_shard()
        checkpoint = Checkpoint(folder)
        undo.check(checkpoint)
        _refuse_what_others_share(folder, list(shards))
        with journal.staging() as staged, progress_bar(_size(folder, shards), progress) as advance:
            for shard, names in shards.items():
                originals = {name: (undo.originals[name].read_bytes(), checkpoint.tensor(name)) for name in names}
                write_patched(folder / shard, staged / shard, originals, advance)
            journal.commit("detach", sorted(shards), sorted(undo.originals))
        return _summary(folder, journal.carry_out(), begun)


def _size(folder: Path, shards: Iterable[str]) -> int:
    return sum((folder / shard).stat().st_size for shard in shards)


def _summary(folder: Path, done: Committed | None, begun: float) -> MergeSummary:
    assert done is not None
    return MergeSummary(
        folder,
        tensors=tuple(done.tensors),
        written=tuple(done.replaced),
        num_bytes=_size(folder, done.replaced),
        seconds=time.perf_counter() - begun,
    )


@contextmanager
def _at_work(model_folder: str | os.PathLike[str]) -> Iterator[tuple[Path, Journal]]:
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
        journal = Journal(folder)
        journal.recover()
        yield folder, journal


def _refuse_what_others_share(folder: Path, shards: Sequence[str]) -> None:
    links = [folder / shard for shard in shards if (folder / shard).is_symlink()]
    if links or folder.is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
        what = f"{links[0]} is a symbolic link to {links[0].resolve()}" if links else f"{folder} is in the Hub's cache"
        raise ValueError(
            f"{what}, which belongs to others too: in the Hub's cache, to every program that loads this model. Merge "
            f"into a new folder instead: `locft merge {folder} ADAPTER OUT`."
        )
