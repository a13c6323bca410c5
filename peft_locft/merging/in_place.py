"""Merges adapters into a model's own folder, and detaches them with every byte restored."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..io.checkpoint import INDEX_NAME, Checkpoint
from ..io.copies import write_all
from ..io.disk_space import explained_disk_full
from ..io.files import write_atomically
from ..io.folders import locked, sync_folder
from ..io.interruption import explained_interruption
from ..io.patched_file import write_patched
from ..io.safetensors_file import StoredTensor, read_header, write_header
from .plan import IN_PLACE_FOLDER, MergePlan, plan_edits, write_edited_shard
from .stream_merge import MergeSummary, conflicts_of, merge_record, other_files, progress_bar

UNDO_NAME = "locft_undo.safetensors"
UNDO_FORMAT = 1
EDITED_ENDING = "-locft.safetensors"
STAGED_FOLDER = "staged"


def merge_in_place(
    model_folder: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    force: bool = False,
    progress: bool = False,
) -> MergeSummary:
    """Merge adapters into a model's own folder, and save the original tensors for `detach`.

    The edited tensors are equal bit for bit to those of `merge_checkpoint`; no other tensor changes. The originals are
    saved in `locft/locft_undo.safetensors`: a subfolder, because some servers load every safetensors file beside a
    model.

    A kill or a power failure at any moment is safe:

    - New files are written under temporary names, and the model's files are never written into. A program that has
      one open or mapped keeps the old content.
    - If one file holds all edited tensors, a rename replaces it. Every reader finds the old model or the new one.
    - If several files hold them, the new files get new names (`…-locft.safetensors`), and a rename replaces the index.
      A reader that uses the index, as transformers does, finds the old model or the new one. A reader that read the
      index before the rename and opens a file after it finds the old file or none. A reader that ignores the index
      finds both models until the old files are removed; after a kill, until the next call.
    - The next `merge_in_place` or `detach` on the folder removes the leftovers of a killed one.

    It needs disk space for a copy of the files that hold an edited tensor, unless the file system has reflinks.

    Args:
        model_folder: a folder with a safetensors checkpoint, not in the Hub's cache.
        adapters: as in `merge_checkpoint`.
        weights: as in `merge_checkpoint`.
        scale: as in `merge_checkpoint`.
        force: as in `merge_checkpoint`.
        progress: as in `merge_checkpoint`.

    Returns:
        A summary.

    Raises:
        ValueError: as in `merge_checkpoint`; also if adapters are already merged in place; if the folder is in the
            Hub's cache or a file to change is a symbolic link, since others share it; if the new name of an edited
            file is taken; if the index could not be restored byte by byte; if another process merges or detaches in
            the folder. The model is unchanged.
        OSError: if the disk has no room, a file cannot be written, or reading it returns other bytes than were
            written.

    Example:
        >>> from peft_locft import detach, merge_in_place
        >>> merge_in_place("model", ["out"])
        >>> detach("model")  # every file has its original bytes again
    """
    start = time.perf_counter()
    with _exclusive_access(model_folder) as (folder, undo, _):
        if undo is not None:
            raise ValueError(
                f"{folder} already has an edit merged in place. A second merge on top would add a rounding error. Run "
                f"`locft detach {folder}`, then merge all adapters together."
            )
        edits = plan_edits(Checkpoint(folder), adapters, weights, scale, force)
        shards = edits.by_shard()
        names = edited_names(shards)
        _refuse_shared_files(folder, names)
        _refuse_existing_files(folder, names)
        _, left_out = other_files(edits.checkpoint)
        conflicts = conflicts_of(edits.adapters)
        with staging(folder) as staged, progress_bar(_size(folder, shards), progress) as advance:
            stage_index(folder, staged, names)
            digests: dict[str, str] = {}
            for shard, changes in shards.items():
                digests |= write_edited_shard(folder / shard, staged / names[shard], changes, advance)
            write_undo(staged / UNDO_NAME, edits, digests, merge_record(edits.adapters, weights, scale))
            # before the new files, since recovery needs it to identify them
            os.replace(staged / UNDO_NAME, staged.parent / UNDO_NAME)
            exchange(folder, staged, names)
        settle(folder, names, merged=True)
        summary = _summary(folder, digests, names.values(), start)
        return replace(summary, left_out=tuple(left_out), conflicts=conflicts)


def detach(model_folder: str | os.PathLike[str], *, progress: bool = False) -> MergeSummary:
    """Undo `merge_in_place`: every file of the folder gets its original name and bytes back.

    A kill at any moment is safe, as in `merge_in_place`.

    Args:
        model_folder: the folder given to `merge_in_place`.
        progress: show a progress bar on a terminal.

    Returns:
        A summary.

    Raises:
        ValueError: if nothing is merged in place there; if the merged tensors or the layout of their files changed
            since the merge; if a file to change is a symbolic link; if another process merges or detaches in the
            folder. The model is unchanged.
        OSError: if the disk has no room, a file cannot be written, or reading it returns other bytes than were
            written.
    """
    start = time.perf_counter()
    with _exclusive_access(model_folder) as (folder, undo, removed_leftovers):
        if undo is None:
            raise ValueError(
                f"{folder} has no {IN_PLACE_FOLDER}/{UNDO_NAME}: nothing is merged in place there."
                f"{' The leftovers of an interrupted merge or detach were removed.' if removed_leftovers else ''}"
            )
        undo.check_originals()
        checkpoint = Checkpoint(folder)
        names = {edited: original for original, edited in undo.edited_names().items()}
        _refuse_shared_files(folder, names)
        with staging(folder) as staged, progress_bar(_size(folder, names), progress) as advance:
            stage_index(folder, staged, names)
            for edited, original in names.items():
                tensors = undo.by_shard()[original]
                originals = {name: (undo.originals[name].read_bytes(), checkpoint.tensor(name)) for name in tensors}
                write_patched(folder / edited, staged / original, originals, advance)
            exchange(folder, staged, names)
        settle(folder, undo.edited_names(), merged=False)
        return _summary(folder, undo.originals, names.values(), start)


def _size(folder: Path, shards: Iterable[str]) -> int:
    return sum((folder / shard).stat().st_size for shard in shards)


def _summary(folder: Path, tensors: Iterable[str], written: Collection[str], start: float) -> MergeSummary:
    return MergeSummary(
        folder,
        tensors=tuple(sorted(tensors)),
        written=tuple(sorted(written)),
        num_bytes=_size(folder, written),
        seconds=time.perf_counter() - start,
    )


@contextmanager
def _exclusive_access(model_folder: str | os.PathLike[str]) -> Iterator[tuple[Path, Undo | None, bool]]:
    """Lock a model's folder, recover from a killed process, and yield the folder and the results of `recover`."""
    folder = Path(model_folder).resolve()
    if not folder.is_dir():
        raise ValueError(
            f"{model_folder} is not a local folder, as merge_in_place and detach need. To merge into a model from the "
            "Hub, write a new folder (merge_checkpoint, `locft merge BASE ADAPTER OUT`)."
        )
    with locked(folder) as acquired:
        if not acquired:
            raise ValueError(f"Another process is merging or detaching in {folder}. Wait until it has finished.")
        before = recover(folder)
        with explained_interruption(partial(_what_is_left, folder, before[0] is not None)):
            yield folder, *before


def _what_is_left(folder: Path, was_merged: bool) -> str:
    """Return what an interrupted merge or detach left."""
    is_merged = recover(folder)[0] is not None
    if is_merged == was_merged:
        return f"The model in {folder} is as it was before. Run the same command to try again."
    return f"The model in {folder} is complete: the adapters are {'merged' if is_merged else 'detached'}."


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve()


def _refuse_shared_files(folder: Path, names: Mapping[str, str]) -> None:
    files = [folder / name for name in (*names, INDEX_NAME)]
    links = [file for file in files if file.is_symlink()]
    if links or folder.is_relative_to(_hub_cache()):
        problem = (
            f"{links[0]} is a symbolic link to {links[0].resolve()}" if links else f"{folder} is in the Hub's cache"
        )
        raise ValueError(
            f"{problem}: other programs share these files, so a merge in place would change their model too. Merge "
            f"into a new folder instead: `locft merge {folder} ADAPTER OUT`."
        )


def _refuse_existing_files(folder: Path, names: Mapping[str, str]) -> None:
    for before, after in names.items():
        if before != after and os.path.lexists(folder / after):
            raise ValueError(
                f"{folder / after} already exists, but the edited {before} needs that name. Move or remove the "
                "existing file."
            )


# ---------------------------------------------------------------------- the originals


def edited_names(shards: Iterable[str]) -> dict[str, str]:
    """Return the names of the edited files, by the names of the original files.

    A single file keeps its name: a rename replaces it. Several files cannot be renamed in one step, so they get new
    names, and a rename replaces the index.

    Args:
        shards: names of the original files that hold an edited tensor.
    """
    shards = list(shards)
    if len(shards) == 1:
        return {shards[0]: shards[0]}
    # keep beginning and ending: converters find a model's files by them
    return {shard: shard.removesuffix(".safetensors") + EDITED_ENDING for shard in shards}


@dataclass(frozen=True, slots=True)
class Undo:
    """The content of an undo file.

    Attributes:
        originals: by tensor name: where the original bytes of each edited tensor are stored.
        merged: by tensor name: the name of its original file (`"shard"`), its offset there and in the edited file
            (`"start"`), and the sha256 of its new bytes (`"sha256"`) and original bytes (`"original_sha256"`).
        sizes: by name of the original file: its size in bytes, which the edited file has too.
        record: what was merged, see `merge_record`.
    """

    originals: dict[str, StoredTensor]
    merged: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, int]
    record: Mapping[str, Any]

    def edited_names(self) -> dict[str, str]:
        """Return the names of the edited files, by the names of the original files."""
        return edited_names(self.sizes)

    def by_shard(self) -> dict[str, list[str]]:
        """Return the names of the edited tensors, by the name of the original file."""
        tensors: dict[str, list[str]] = {}
        for name, entry in self.merged.items():
            tensors.setdefault(entry["shard"], []).append(name)
        return tensors

    def is_merged(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is the merged model; False if it is the original model.

        Raises:
            ValueError: if it is neither.
        """
        changed = self._differing(checkpoint, self.edited_names(), "sha256")
        if changed is None:
            return True
        if self._differing(checkpoint, {shard: shard for shard in self.sizes}, "original_sha256") is None:
            return False
        name, folder = self.merged[changed]["shard"], checkpoint.folder
        raise ValueError(
            f"{changed} in {folder / self.edited_names()[name]} is not what the merge in place wrote: another program "
            f"has changed the model, so the originals in {self.originals[changed].file.name} do not fit it. Nothing "
            f"was changed. Restore the file, or download the base model again. To keep the model as it is, remove "
            f"{self.originals[changed].file.parent}."
        )

    def _differing(self, checkpoint: Checkpoint, names: Mapping[str, str], digest: str) -> str | None:
        """Return the first tensor with other bytes or another place; `None` if there is none."""
        for name, entry in self.merged.items():
            shard = names[entry["shard"]]
            if checkpoint.files.get(name) != shard:
                return name
            tensor, size = checkpoint.tensor(name), (checkpoint.folder / shard).stat().st_size
            if (
                (tensor.start, size) != (entry["start"], self.sizes[entry["shard"]])
                or tensor.num_bytes != self.originals[name].num_bytes
                or tensor.bytes_sha256() != entry[digest]
            ):
                return name
        return None

    def check_originals(self) -> None:
        """Raise a ValueError if the undo file's tensors have changed since the merge."""
        for name, entry in self.merged.items():
            if self.originals[name].bytes_sha256() != entry["original_sha256"]:
                raise ValueError(
                    f"{self.originals[name].file} is damaged: the original of {name} has changed since the merge. "
                    "Nothing was detached. Download the base model again."
                )


def write_undo(path: Path, edits: MergePlan, digests: Mapping[str, str], record: Mapping[str, Any]) -> None:
    """Write the undo file: the original edited tensors, and the hashes of the new ones.

    Args:
        path: the new file.
        edits: the merge.
        digests: the sha256 of the new bytes, by tensor name.
        record: the record of the merge, see `merge_record`.

    Raises:
        OSError: if the file cannot be written, or reading it returns other bytes than were written.
    """
    checkpoint = edits.checkpoint
    originals = {span.name: span.tensor for parameter in edits.parameters for span in parameter.base.spans}
    merged = {
        name: {
            "shard": checkpoint.files[name],
            "start": tensor.start,
            "sha256": digests[name],
            "original_sha256": tensor.bytes_sha256(),
        }
        for name, tensor in originals.items()
    }
    sizes = {shard: (checkpoint.folder / shard).stat().st_size for shard in edits.by_shard()}
    content = {"format": UNDO_FORMAT, "merged": merged, "sizes": sizes, "record": record}
    with open(path, "wb", buffering=0) as file:
        write_header(file, originals, {"format": "pt", "locft_undo": json.dumps(content)})
        for tensor in originals.values():
            for part in tensor.read_bytes():
                write_all(file, part)
        os.fsync(file.fileno())
    written, _ = read_header(path)
    wrong = [name for name, entry in merged.items() if written[name].bytes_sha256() != entry["original_sha256"]]
    if wrong:
        raise OSError(f"{path}: the disk returned other bytes than were written for {wrong[0]}. Check the disk.")


def read_undo(path: Path) -> Undo:
    """Return the content of an undo file.

    Raises:
        ValueError: if the file is broken or is not an undo file.
    """
    originals, metadata = read_header(path)
    try:
        content = json.loads(metadata["locft_undo"])
        undo = Undo(originals, content["merged"], content["sizes"], content.get("record", {}))
        is_valid = (
            content["format"] == UNDO_FORMAT
            and undo.merged.keys() == originals.keys()
            and undo.by_shard().keys() == undo.sizes.keys()
            # files with these names are removed
            and all(Path(name).name == name and name.endswith(".safetensors") for name in undo.sizes)
        )
    except (KeyError, ValueError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"{path} is not an undo file of a merge in place. Download the base model again.")
    return undo


# ---------------------------------------------------------------------- the exchange of files


@contextmanager
def staging(model: Path) -> Iterator[Path]:
    """Yield an empty folder for new files. After an error, `recover` removes files that the model does not use."""
    staged = model / IN_PLACE_FOLDER / STAGED_FOLDER
    with explained_disk_full(model):
        try:
            staged.mkdir(parents=True)
            yield staged
        except BaseException:
            recover(model)
            raise


def stage_index(model: Path, staged: Path, names: Mapping[str, str]) -> None:
    """Write an index with the new names of a model's files, unless all names stay.

    Args:
        model: the model's folder.
        staged: the folder for new files.
        names: new names of the files, by the names in the current index.

    Raises:
        ValueError: if replacing the names back would not restore the index byte by byte.
    """
    if all(before == after for before, after in names.items()):
        return
    index = model / INDEX_NAME
    content = index.read_bytes()
    # replace names in the text: writing the JSON again could change other bytes, and detach must restore them
    renamed = _with_new_names(content, names)
    expected = {name: names.get(shard, shard) for name, shard in json.loads(content)["weight_map"].items()}
    restored = _with_new_names(renamed, {after: before for before, after in names.items()})
    if json.loads(renamed)["weight_map"] != expected or restored != content:
        raise ValueError(
            f"{index} cannot be changed and restored byte by byte: it escapes the names of its files, or contains "
            "them in other places too. Merge into a new folder."
        )
    write_atomically(staged / INDEX_NAME, renamed)
    shutil.copymode(index, staged / INDEX_NAME)


def _with_new_names(content: bytes, names: Mapping[str, str]) -> bytes:
    for before, after in names.items():
        content = content.replace(json.dumps(before).encode(), json.dumps(after).encode())
    return content


def exchange(model: Path, staged: Path, names: Mapping[str, str]) -> None:
    """Move staged files, which are on the disk, into the model's folder.

    Args:
        model: the model's folder.
        staged: the folder with the new weight files, and with the new index if the names change.
        names: new names of the files, by their current names. A file that keeps its name is the only one, and its
            rename switches the model. Otherwise the rename of the index does.
    """
    for folder in (staged, staged.parent, model):
        sync_folder(folder)
    for name in names.values():
        os.replace(staged / name, model / name)
    if (staged / INDEX_NAME).exists():
        sync_folder(model)  # the new files must be on the disk before the index that names them
        os.replace(staged / INDEX_NAME, model / INDEX_NAME)
    sync_folder(model)


def settle(model: Path, names: Mapping[str, str], merged: bool) -> None:
    """Remove the files of the other model (edited or original), which the index does not name.

    Args:
        model: the model's folder.
        names: names of the edited files, by the names of the original files.
        merged: whether the model is now the edited one.
    """
    folder = model / IN_PLACE_FOLDER
    for original, edited in names.items():
        if original != edited:
            (model / (original if merged else edited)).unlink(missing_ok=True)
    shutil.rmtree(folder / STAGED_FOLDER, ignore_errors=True)
    if not merged:
        # remove it last, since recovery needs it
        (folder / UNDO_NAME).unlink()
        _remove_empty(folder)
    sync_folder(model)


def recover(model: Path) -> tuple[Undo | None, bool]:
    """Clean up after a killed merge or detach.

    The index and the files that it names decide whether the model is the original or the edited one. Files of the
    other model are removed.

    Args:
        model: the model's folder.

    Returns:
        The undo file's content if an edit is merged in place, and whether leftovers were removed.

    Raises:
        ValueError: if the undo file is broken, or the model is neither the edited nor the original one.
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
