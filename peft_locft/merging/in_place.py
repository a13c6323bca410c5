"""Merging adapters into a model's own folder, and the exact way back."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..io.checkpoint import INDEX_NAME, Checkpoint
from ..io.copies import write_all
from ..io.files import write_atomically
from ..io.folders import locked, sync_folder
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
    """Merge adapters into the files of a model's own folder, and save what `detach` needs to undo it.

    The edited tensors have the bits that `merge_checkpoint` gives them; no other tensor changes. The originals go into
    `locft/locft_undo.safetensors`, in a subfolder because some servers load every safetensors file beside a model.

    If the process is killed, or the machine goes down, at any moment:

    - Every new file is written aside, and no file of the model is written into. A program that has one open or mapped
      keeps it.
    - If one file holds all edited tensors, a rename replaces it. Every reader finds the old model or the new one.
    - If several files do, the new ones are put beside them under new names (`…-locft.safetensors`), and a rename
      replaces the index. A reader that loads by the index, as transformers does, finds the old model or the new one. A
      reader that read the index before the rename and opens a file after it finds the file of the old model, or none.
      A reader that loads all files without the index finds both models until the old files are removed; after a kill
      in between, until the next call.
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
        A summary.

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
    """Undo `merge_in_place`: every file of the folder gets back the name and the bytes that it had.

    `merge_in_place` says what holds when the process is killed; it holds here too.

    Args:
        model_folder: the folder.
        progress: show a progress bar on a terminal.

    Returns:
        A summary.

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
    """Lock a model's folder for this process, and finish or undo the work of a killed one."""
    folder = Path(model_folder).resolve()
    if not folder.is_dir():
        raise ValueError(
            f"{model_folder} is not a folder here. merge_in_place and detach need a model's own folder; to merge into "
            "a model from the Hub, write a new folder (merge_checkpoint, `locft merge BASE ADAPTER OUT`)."
        )
    with locked(folder) as has_it:
        if not has_it:
            raise ValueError(f"Another process is merging or detaching in {folder}. Wait until it is done.")
        yield folder, *recover(folder)


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve()


def _refuse_what_others_share(folder: Path, names: Mapping[str, str]) -> None:
    files = [folder / name for name in (*names, INDEX_NAME)]
    links = [file for file in files if file.is_symlink()]
    if links or folder.is_relative_to(_hub_cache()):
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


# ---------------------------------------------------------------------- the originals


def edited_names(shards: Iterable[str]) -> dict[str, str]:
    """Return the name that each file has while an edit is merged in place, by the name that it has without.

    A single file keeps its name: the new one takes the place of the old by a rename. No system call renames several
    together, so that they get names of their own, and it is the index that is exchanged.

    Args:
        shards: the files that hold an edited tensor.
    """
    shards = list(shards)
    if len(shards) == 1:
        return {shards[0]: shards[0]}
    # they begin and end as before, by which converters find the files of a model
    return {shard: shard.removesuffix(".safetensors") + EDITED_ENDING for shard in shards}


@dataclass(frozen=True, slots=True)
class Undo:
    """The content of an undo file.

    Attributes:
        originals: where the bytes lie that a merge replaced, by the tensor's name.
        merged: of each of these tensors, the file that it is in without the edit (`"shard"`), its first byte there and
            in the edited file (`"start"`), and the sha256 of the bytes that the merge wrote (`"sha256"`) and of those
            before (`"original_sha256"`).
        sizes: of these files, and of the edited ones, in bytes.
    """

    originals: dict[str, StoredTensor]
    merged: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, int]

    def edited_names(self) -> dict[str, str]:
        """Return the edited files' names by those without the edit."""
        return edited_names(self.sizes)

    def by_shard(self) -> dict[str, list[str]]:
        """Return the tensors' names by the file that they are in without the edit."""
        found: dict[str, list[str]] = {}
        for name, facts in self.merged.items():
            found.setdefault(facts["shard"], []).append(name)
        return found

    def is_merged(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is the one that the merge wrote, or else the one before.

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
            f"{changed} in {folder / self.edited_names()[name]} is not what the merge in place wrote: something else "
            f"has changed the model since, and the originals in {self.originals[changed].file.name} do not belong to "
            f"it. Nothing was changed. Restore the file, or get the base model again; to keep the model as it is, "
            f"remove {self.originals[changed].file.parent}."
        )

    def _differing(self, checkpoint: Checkpoint, names: Mapping[str, str], digest: str) -> str | None:
        """Return the first tensor that has other bytes, or a place in another file; `None` if there is none."""
        for name, facts in self.merged.items():
            shard = names[facts["shard"]]
            if checkpoint.files.get(name) != shard:
                return name
            tensor, size = checkpoint.tensor(name), (checkpoint.folder / shard).stat().st_size
            if (
                (tensor.start, size) != (facts["start"], self.sizes[facts["shard"]])
                or tensor.num_bytes != self.originals[name].num_bytes
                or tensor.bytes_sha256() != facts[digest]
            ):
                return name
        return None

    def check_originals(self) -> None:
        """Raise a ValueError if an original is not what was put into the undo file."""
        for name, facts in self.merged.items():
            if self.originals[name].bytes_sha256() != facts["original_sha256"]:
                raise ValueError(
                    f"{self.originals[name].file} is damaged: the original of {name} is not what was put there. "
                    "Nothing was detached. Get the base model again."
                )


def write_undo(path: Path, edits: MergePlan, digests: Mapping[str, str], record: Mapping[str, Any]) -> None:
    """Write the originals of all edited tensors, and what a merge is about to put in their place.

    Args:
        path: of the new file.
        edits: what is merged.
        digests: the sha256 of the new bytes, by the tensor's name.
        record: what is known of the adapters.
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
    facts = {"format": UNDO_FORMAT, "merged": merged, "sizes": sizes, "record": record}
    with open(path, "wb", buffering=0) as file:
        write_header(file, originals, {"format": "pt", "locft_undo": json.dumps(facts)})
        for tensor in originals.values():
            for part in tensor.read_bytes():
                write_all(file, part)
        os.fsync(file.fileno())
    written, _ = read_header(path)
    wrong = [name for name, facts in merged.items() if written[name].bytes_sha256() != facts["original_sha256"]]
    if wrong:
        raise OSError(f"{path} reads differently from what was written to it: {wrong[0]}. Check the disk.")


def read_undo(path: Path) -> Undo:
    """Read what `write_undo` wrote.

    Raises:
        ValueError: if the file is broken, or something else.
    """
    originals, metadata = read_header(path)
    try:
        facts = json.loads(metadata["locft_undo"])
        undo = Undo(originals, facts["merged"], facts["sizes"])
        known = (
            facts["format"] == UNDO_FORMAT
            and undo.merged.keys() == originals.keys()
            and undo.by_shard().keys() == undo.sizes.keys()
            # files are removed by these names
            and all(Path(name).name == name and name.endswith(".safetensors") for name in undo.sizes)
        )
    except (KeyError, ValueError, TypeError, AttributeError):
        known = False
    if not known:
        raise ValueError(f"{path} is not what a merge in place wrote. Get the base model again.")
    return undo


# ---------------------------------------------------------------------- the exchange of files


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
