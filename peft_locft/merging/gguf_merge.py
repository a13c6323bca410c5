"""Merges adapters into a GGUF file, into a new file or in place, and detaches them with every byte restored."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.edited_parameters import base_to_compare, terms_of
from ..adapters.reading import CheckedAdapter
from ..adapters.shipped_edits import Conflicts
from ..io.arithmetic import one_thread
from ..io.copies import Progress, place_file
from ..io.disk_space import size
from ..io.files import atomic_file
from ..io.folders import sync_folder
from ..io.gguf_file import GGUFFile, gguf_package, write_gguf
from ..io.interruption import explained_interruption
from .gguf_plan import (
    TOLERANCE,
    GGUFEdit,
    GGUFModel,
    plan_gguf_edits,
    split_names,
    warn_about_costs,
)
from .gguf_undo import HEADER, Undo, exclusive_access, remove_undo, undo_path, write_undo
from .plan import checked_adapters
from .stream_merge import conflicts_of, merge_record, progress_bar

RECORD_KEY = "peft_locft.merge"
MAX_SHOWN = 3


@dataclass(frozen=True, slots=True)
class ChangedTensor:
    """A tensor that a merge changed.

    Attributes:
        old_type: its type before, such as `"Q4_1"`.
        new_type: its type now.
        rounding: what the new type rounds away, relative to what the edit changes: `|stored - exact| / |delta|`.
        evidence: how the tensor was recognized as the one that the adapter was trained on.
    """

    old_type: str
    new_type: str
    rounding: float
    evidence: str


@dataclass(frozen=True, slots=True)
class GGUFSummary:
    """Result of a merge into a GGUF file, or of a detach.

    Attributes:
        path: the file; of several, the first.
        tensors: the changed tensors, by name. After a detach, without their details.
        num_bytes: size of all files that were written.
        conflicts: prompts that several of the merged adapters edit, if these ship their edits.
        seconds: duration.
    """

    path: Path
    tensors: dict[str, ChangedTensor]
    num_bytes: int
    conflicts: Conflicts | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        rows = [("model", str(self.path))]
        for name, tensor in list(self.tensors.items())[:MAX_SHOWN]:
            types = tensor.old_type if tensor.old_type == tensor.new_type else f"{tensor.old_type} → {tensor.new_type}"
            rows.append(("changed", f"{name} ({types}; rounding {tensor.rounding:.4f} of the edit)"))
        if len(self.tensors) > MAX_SHOWN:
            rows.append(("", f"… ({len(self.tensors)} in total)"))
        rows += [("recognized", each) for each in dict.fromkeys(tensor.evidence for tensor in self.tensors.values())]
        if self.conflicts is not None and self.conflicts.conflicts:
            rows.append(("conflicts", str(self.conflicts)))
        rows += [("written", size(self.num_bytes)), ("time", f"{self.seconds:.1f} s")]
        return "\n".join(f"{key:<12}{value}" for key, value in rows)


def merge_gguf(
    model: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    tensor_type: str | None = None,
    base_model: str | None = None,
    tolerance: float = TOLERANCE,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    force: bool = False,
    progress: bool = False,
) -> GGUFSummary:
    """Merge adapters into a model for llama.cpp, and write it to a new GGUF file.

    Only the edited tensors change. A quantized one is dequantized, the delta is added, and the result is written in a
    type that holds the edit. All other bytes are copied as they are. The metadata gets one more text,
    `peft_locft.merge`, which says what was merged.

    The values of each tensor are compared with those of the training. A file that was converted from the same weights
    has the same ones, perhaps rounded. A quantized file has near ones: these are compared with the base model, which
    must be on this machine or be named.

    The new file appears in one step. A model in several files (`…-00001-of-00003.gguf`) is written to as many, the
    first of which appears last.

    Args:
        model: the GGUF file; of several, any.
        adapters: one or more adapters: folders, or ids on the Hub.
        out: the new file. It must not exist.
        tensor_type: type of the edited tensors, such as `"BF16"` or `"Q8_0"`. `None`: the old type, or F16 where that
            is quantized. A vector keeps its type.
        base_model: the model that the adapters were trained on, a folder or an id on the Hub, to compare with. `None`:
            the one that the adapters name, if it is on this machine.
        tolerance: the largest relative distance, `|file - base| / |base|`, of a quantized tensor that counts as near;
            of one that is not quantized at most 0.01.
        weights: one factor per adapter, as in `merge_checkpoint`.
        scale: strength of all deltas; `None`: each adapter's own.
        force: merge even if a tensor is not near, or cannot be compared.
        progress: show a progress bar on a terminal.

    Returns:
        A summary.

    Raises:
        ValueError: if the file is no model in GGUF, damaged or big-endian; if an adapter is refused; if an edited
            tensor is missing, of another shape or of a type that cannot be dequantized; without `force`, if it is not
            near the base or cannot be compared; if the edit does not fit `tensor_type`; if `out` exists. Nothing is
            written.
        OSError: if a file cannot be read or written, or the disk has no room.
        ModuleNotFoundError: if the package `gguf` is not installed.

    Example:
        >>> from peft_locft.merging import merge_gguf
        >>> print(merge_gguf("model.Q4_K_M.gguf", ["out"], "edited.gguf"))
    """
    start = time.perf_counter()
    target = Path(out).resolve()
    if target.suffix != ".gguf":
        raise ValueError(f"{out} does not end in .gguf: expected the name of a new file.")
    plan = _plan(model, adapters, weights, scale, base_model, tolerance, force)
    sources = plan.model.files
    targets = [target] if len(sources) == 1 else split_names(_first_of(target, len(sources)))
    for each in targets:
        if os.path.lexists(each):
            raise ValueError(f"{each} already exists: a merge writes a new file. Remove it, or choose another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    new, changed = _new_tensors(plan, tensor_type)
    nothing = partial("Nothing is left of {}. Run the same command to merge again.".format, target)
    total = sum(file.path.stat().st_size for file in sources)
    with explained_interruption(nothing), ExitStack() as stack, progress_bar(total, progress) as advance:
        # the first file is renamed last: without it, nothing loads the others
        staged = [stack.enter_context(atomic_file(each)) for each in targets]
        for file, place in zip(sources, staged, strict=True):
            _write(file, place, new, plan.record if file is plan.model.first else None, advance)
    sync_folder(target.parent)
    num_bytes = sum(each.stat().st_size for each in targets)
    return GGUFSummary(targets[0], changed, num_bytes, conflicts_of(plan.adapters), time.perf_counter() - start)


def merge_gguf_in_place(
    model: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    tensor_type: str | None = None,
    base_model: str | None = None,
    tolerance: float = TOLERANCE,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    force: bool = False,
    progress: bool = False,
) -> GGUFSummary:
    """Merge adapters into a GGUF file itself, and save the original bytes for `detach_gguf`.

    The originals are saved in `locft/NAME.undo.safetensors` beside the file. A rename replaces the file, so a kill at
    any moment leaves the old one or the new one, and a server that has the old one mapped keeps it. It needs disk
    space for a second copy while it runs.

    Args:
        model: the GGUF file. Of a model in several files, all edited tensors must be in one: several cannot be
            replaced in one step.
        adapters: as in `merge_gguf`.
        tensor_type: as in `merge_gguf`.
        base_model: as in `merge_gguf`.
        tolerance: as in `merge_gguf`.
        weights: as in `merge_gguf`.
        scale: as in `merge_gguf`.
        force: as in `merge_gguf`.
        progress: as in `merge_gguf`.

    Returns:
        A summary.

    Raises:
        ValueError: as in `merge_gguf`; also if adapters are already merged in place, the file is a symbolic link, or
            another process merges or detaches beside it. The file is unchanged.
        OSError: as in `merge_gguf`.
        ModuleNotFoundError: as in `merge_gguf`.
    """
    start = time.perf_counter()
    path = Path(model).absolute()
    # the file is read under the lock: another process may have changed it before
    with exclusive_access(path) as merged:
        if merged:
            raise ValueError(
                f"{merged[0]} already has an edit merged in place. Run `locft detach {model}`, then merge all "
                "adapters together."
            )
        plan = _plan(path, adapters, weights, scale, base_model, tolerance, force)
        changed_files = [file for file in plan.model.files if plan.edits.keys() & file.tensors.keys()]
        if len(changed_files) > 1:
            raise ValueError(
                f"{model}: the edited tensors are in {len(changed_files)} files, which cannot be replaced in one "
                "step. Merge into a new file."
            )
        file = changed_files[0]
        new, changed = _new_tensors(plan, tensor_type)
        header = _header(file, new, plan.record)
        with progress_bar(file.path.stat().st_size, progress) as advance:
            padded = _padded(file, new)
            write_undo(file, header, padded, plan.record)
            with atomic_file(file.path) as staged:
                write_gguf(file, staged, header, padded, advance)
                mode = file.path.stat().st_mode
            file.path.chmod(mode)
            sync_folder(file.path.parent)
    num_bytes = file.path.stat().st_size
    return GGUFSummary(file.path, changed, num_bytes, conflicts_of(plan.adapters), time.perf_counter() - start)


def detach_gguf(model: str | os.PathLike[str], *, progress: bool = False) -> GGUFSummary:
    """Undo `merge_gguf_in_place`: the file gets its original bytes back.

    Args:
        model: the file; of several, any.
        progress: show a progress bar on a terminal.

    Returns:
        A summary.

    Raises:
        ValueError: if nothing is merged in place there, or the file changed since the merge. It is unchanged.
        OSError: if the file cannot be read or written, or the disk has no room.
        ModuleNotFoundError: if the package `gguf` is not installed.
    """
    start = time.perf_counter()
    with exclusive_access(Path(model).absolute()) as merged:
        if not merged:
            raise ValueError(f"{model} has no originals beside it: nothing is merged in place there.")
        path = merged[0]
        undo = Undo(undo_path(path))
        undo.check_originals()
        file = GGUFFile(path)
        originals = {name: [undo.original(name)] for name in undo.names}
        with progress_bar(undo.size, progress) as advance:
            with atomic_file(path) as staged:
                write_gguf(file, staged, undo.original(HEADER), originals, advance)
                if staged.stat().st_size != undo.size:
                    raise OSError(f"{path}: restored {staged.stat().st_size} bytes instead of {undo.size}.")
                mode = path.stat().st_mode
            path.chmod(mode)
            sync_folder(path.parent)
        remove_undo(path)
        return GGUFSummary(path, {}, undo.size, seconds=time.perf_counter() - start)


# ---------------------------------------------------------------------- the new tensors


@dataclass(frozen=True, slots=True)
class _Plan:
    model: GGUFModel
    adapters: list[CheckedAdapter]
    edits: dict[str, GGUFEdit]
    record: str


def _plan(
    model: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None,
    scale: float | None,
    base_model: str | None,
    tolerance: float,
    force: bool,
) -> _Plan:
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: expected a relative distance from 0 to 1.")
    gguf = GGUFModel(Path(model).absolute())
    checked = checked_adapters(adapters, weights)
    base = base_to_compare(base_model, checked)
    with one_thread():
        edits = plan_gguf_edits(gguf, list(terms_of(checked, weights, scale)), base, tolerance, force)
    before = gguf.first.value(RECORD_KEY)
    record: dict[str, Any] = merge_record(checked, weights, scale)
    if before is not None:  # the file is itself the result of a merge
        with suppress(ValueError):
            record |= {"before": json.loads(before)}
    return _Plan(gguf, checked, edits, json.dumps(record))


def _first_of(target: Path, count: int) -> Path:
    first = split_names(target)
    if len(first) == count:
        return first[0]
    return target.with_name(f"{target.name.removesuffix('.gguf')}-00001-of-{count:05d}.gguf")


def _new_tensors(
    plan: _Plan, tensor_type: str | None
) -> tuple[dict[str, tuple[str, bytes]], dict[str, ChangedTensor]]:
    """Return the type and the bytes of each edited tensor, and what a summary says of it."""
    if tensor_type is not None and tensor_type not in gguf_package().GGMLQuantizationType.__members__:
        raise ValueError(f"tensor_type={tensor_type!r}: GGUF has no such type. Expected F16, BF16, F32 or Q8_0.")
    new, changed = {}, {}
    for name, edit in plan.edits.items():
        type_name, content, cost = edit.edited(tensor_type)
        new[name] = (type_name, content)
        changed[name] = ChangedTensor(edit.tensor.type, type_name, cost, edit.evidence)
    warn_about_costs({name: (tensor.new_type, tensor.rounding) for name, tensor in changed.items()})
    return new, changed


def _header(file: GGUFFile, new: Mapping[str, tuple[str, bytes]], record: str | None) -> bytes:
    changed = {name: (kind, len(content)) for name, (kind, content) in new.items() if name in file.tensors}
    return file.header_with(changed, {} if record is None else {RECORD_KEY: record})


def _padded(file: GGUFFile, new: Mapping[str, tuple[str, bytes]]) -> dict[str, list[bytes]]:
    return {
        name: [content, bytes(file.slot(len(content)) - len(content))]
        for name, (_, content) in new.items()
        if name in file.tensors
    }


def _write(
    file: GGUFFile, staged: Path, new: Mapping[str, tuple[str, bytes]], record: str | None, advance: Progress
) -> None:
    if record is None and not new.keys() & file.tensors.keys():
        staged.unlink()
        place_file(file.path, staged, "copy", advance)
        return
    write_gguf(file, staged, _header(file, new, record), _padded(file, new), advance)
