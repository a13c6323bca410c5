"""What was merged into a model on disk, and how to take one of several adapters off again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..adapters.reading import check_adapter
from .gguf_merge import RECORD_KEY, GGUFSummary, detach_gguf, merge_gguf_in_place
from .gguf_plan import GGUFModel, split_names
from .gguf_undo import Undo, undo_path
from .in_place import UNDO_NAME, detach, merge_in_place, read_undo
from .plan import IN_PLACE_FOLDER
from .stream_merge import RECORD_NAME, MergeSummary


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """An adapter that a merge added.

    Attributes:
        adapter: its folder, or its name on the Hub.
        scale: strength of its delta.
        weight: its factor, if several were combined; `None` if each was added separately.
    """

    adapter: str
    scale: float
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Merge:
    """One merge into a model.

    Attributes:
        adapters: what was merged, in the order of addition.
        can_detach: whether the originals are kept, so that `detach` undoes it.
        when: when the newest merge was written; `None` for those before it.
    """

    adapters: tuple[MergedAdapter, ...]
    can_detach: bool
    when: datetime | None = None

    def __str__(self) -> str:
        when = "earlier" if self.when is None else f"{self.when:%Y-%m-%d %H:%M}"
        how = "in place, `locft detach` undoes it" if self.can_detach else "for good"
        rows = [f"{when}, {how}:"]
        for each in self.adapters:
            weight = "" if each.weight is None else f", weight {each.weight:g}"
            rows.append(f"  {each.adapter} (scale {each.scale:g}{weight})")
        return "\n".join(rows)


def merge_history(model: str | os.PathLike[str]) -> list[Merge]:
    """Return the merges into a model, the newest first.

    Args:
        model: a folder, or a GGUF file (of several, any).

    Raises:
        ValueError: if it is neither, or a record in it is broken.
        OSError: if a file cannot be read.
    """
    path = Path(model)
    records = _gguf_records(path) if path.suffix == ".gguf" else _folder_records(path)
    merges = []
    for record, can_detach, when in records:
        while isinstance(record, dict):
            try:
                adapters = tuple(
                    MergedAdapter(str(each["adapter"]), float(each["scale"]), each["weight"])
                    for each in record["adapters"]
                )
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{path}: the record of a merge is broken: {record!r}.") from None
            merges.append(Merge(adapters, can_detach, when))
            record, can_detach, when = record.get("before"), False, None
    return merges


def detach_adapter(
    model: str | os.PathLike[str], adapter: str | os.PathLike[str], *, progress: bool = False
) -> MergeSummary | GGUFSummary:
    """Take one of several adapters, which were merged in place together, off again.

    The original tensors are put back, and the other adapters are merged again, so the result has the bits of a merge
    without the adapter. In between, the model is the original one; a kill then leaves that.

    Args:
        model: a folder or a GGUF file.
        adapter: the adapter, as `merge_history` names it.
        progress: show a progress bar on a terminal.

    Returns:
        A summary of the last step.

    Raises:
        ValueError: if nothing is merged in place, the adapter is not among what is, or another one is not there any
            more. The model is unchanged.
        OSError: as in `merge_in_place`.
    """
    path = Path(model)
    is_gguf = path.suffix == ".gguf"
    merged = next((merge.adapters for merge in merge_history(path) if merge.can_detach), None)
    if merged is None:
        raise ValueError(f"{path}: nothing is merged in place there, so nothing can be detached.")
    wanted = str(adapter)
    rest = [each for each in merged if each.adapter not in (wanted, str(Path(wanted).resolve()))]
    if len(rest) == len(merged):
        names = ", ".join(each.adapter for each in merged)
        raise ValueError(f"{wanted} is not merged in place in {path}. Merged are: {names}.")
    for each in rest:
        check_adapter(each.adapter)
    types = _merged_types(path) if is_gguf else set()
    if len(types) > 1:
        raise ValueError(f"{path}: its edited tensors have several types. Detach all, and merge the others again.")
    summary: MergeSummary | GGUFSummary = (detach_gguf if is_gguf else detach)(path, progress=progress)
    if not rest:
        return summary
    try:
        return _merge_again(path, rest, types, progress)
    except BaseException:
        _merge_again(path, merged, types, progress=False)
        raise


def _merge_again(
    path: Path, adapters: Sequence[MergedAdapter], types: set[str], progress: bool
) -> MergeSummary | GGUFSummary:
    # the merge was allowed before, so it is now
    how: dict[str, Any] = {"progress": progress, "force": True, "scale": None, "weights": None}
    scales = {each.scale for each in adapters}
    if any(check_adapter(each.adapter).config.scale != each.scale for each in adapters):
        (how["scale"],) = scales  # a scale that was given is one for all
    if adapters[0].weight is not None:
        how["weights"] = [each.weight for each in adapters]
    paths = [each.adapter for each in adapters]
    if types:
        return merge_gguf_in_place(path, paths, tensor_type=next(iter(types)), **how)
    return merge_in_place(path, paths, **how)


def _folder_records(folder: Path) -> list[tuple[Any, bool, datetime | None]]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is neither a local folder nor a GGUF file: expected a model.")
    records: list[tuple[Any, bool, datetime | None]] = []
    undo = folder / IN_PLACE_FOLDER / UNDO_NAME
    if undo.is_file():
        records.append((read_undo(undo).record, True, _written(undo)))
    new = folder / RECORD_NAME
    if new.is_file():
        try:
            records.append((json.loads(new.read_text(encoding="utf-8")), False, _written(new)))
        except ValueError as error:
            raise ValueError(f"{new} is not readable JSON ({error}).") from None
    return records


def _gguf_records(path: Path) -> list[tuple[Any, bool, datetime | None]]:
    model = GGUFModel(path)
    kept = [each for each in split_names(path) if undo_path(each).is_file()]
    text = model.first.value(RECORD_KEY)
    try:
        record = None if text is None else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {RECORD_KEY} in its metadata is not readable JSON ({error}).") from None
    if kept and record is None:  # of a model in several files, only the changed one says it
        record = Undo(undo_path(kept[0])).record
    return [] if record is None else [(record, bool(kept), _written(kept[0] if kept else path))]


def _merged_types(path: Path) -> set[str]:
    """Return the types of the edited matrices of a file."""
    found = set()
    for file in GGUFModel(path).files:
        if undo_path(file.path).is_file():
            names = Undo(undo_path(file.path)).names
            found |= {file.tensors[name].type for name in names if len(file.tensors[name].shape) > 1}
    return found or {"F32"}


def _written(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime)
