"""Merges adapters into a checkpoint on disk, and writes the result to a new folder."""

from __future__ import annotations

import fnmatch
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .._version import __version__
from ..adapters.reading import CheckedAdapter
from ..adapters.shipped_edits import Conflicts, find_conflicts
from ..io.checkpoint import INDEX_NAME, OTHER_WEIGHTS, Checkpoint, local_folder
from ..io.copies import Link, Progress, place_file
from ..io.disk_space import size
from ..io.files import write_atomically
from ..io.folders import atomic_folder
from ..io.interruption import explained_interruption
from .plan import IN_PLACE_FOLDER, MergePlan, plan_edits, write_edited_shard

RECORD_NAME = "locft_merge.json"


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """Result of a merge on disk or a detach.

    Attributes:
        folder: the model's folder.
        tensors: names of the changed tensors in the checkpoint.
        written: names of the rewritten files.
        num_bytes: size of the rewritten files.
        placed: number of the other files by method, such as `{"hard link": 3, "copy": 5}`.
        left_out: names of files with weights in another format, which are not edited. A new folder does not contain
            them; a merge in place leaves them unchanged.
        conflicts: prompts that several of the merged adapters edit, if these ship their edits.
        seconds: duration.
    """

    folder: Path
    tensors: tuple[str, ...]
    written: tuple[str, ...]
    num_bytes: int
    placed: dict[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    conflicts: Conflicts | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        tensors = ", ".join(self.tensors[:3]) + (", …" if len(self.tensors) > 3 else "")
        rows = [
            ("model", str(self.folder)),
            ("changed", f"{tensors} ({len(self.tensors)} in total)"),
            ("written", f"{', '.join(self.written)}: {size(self.num_bytes)}"),
        ]
        if self.placed:
            rows.append(("other files", ", ".join(f"{count} by {how}" for how, count in sorted(self.placed.items()))))
        if self.left_out:
            rows.append(("not edited", f"{', '.join(self.left_out)}: weights in another format"))
        if self.conflicts is not None and self.conflicts.conflicts:
            rows.append(("conflicts", str(self.conflicts)))
        rows.append(("time", f"{self.seconds:.1f} s"))
        return "\n".join(f"{key:<12}{value}" for key, value in rows)


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    link: Link = "auto",
    force: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> MergeSummary:
    """Merge adapters into a checkpoint without loading a model; only files with an edited tensor are rewritten.

    Every tensor is equal bit for bit to that of `merge_and_unload()` and `save_pretrained()`, for a base loaded in the
    dtype of its checkpoint (`dtype="auto"`). The arithmetic is `compose_weight`. Memory use is a few megabytes for
    tensors of any size.

    The new folder appears in one step, complete and on the disk: a kill at any moment leaves no folder or the whole
    one. The next merge to the same folder removes the temporary files of a killed merge.

    Args:
        base: the model: a folder, or an id on the Hub (downloaded to the cache). It is not changed.
        adapters: one or more adapters: folders, or ids on the Hub. They are added in this order and rounded once, as
            in `merge_and_unload(adapter_names=…)`.
        out: the new folder. It must not exist, or must be empty.
        weights: one factor per adapter; the result equals `add_weighted_adapter(…, "linear")`, merged. `None`: add the
            adapters without factors.
        scale: strength of all deltas; `None`: each adapter's own.
        link: how to create weight files without an edited tensor. `"auto"`: a reflink (shared blocks) if the file
            system supports it, else a hard link, else a copy. `"hard"`: hard links. `"copy"`: independent files. A
            hard link is one file under two names: writing into one changes both. All other files are copied.
        force: merge even if the adapters were trained on other values of the base's tensors.
        revision: branch, tag or commit of a base on the Hub.
        progress: show a progress bar on a terminal.

    Returns:
        A summary.

    Raises:
        ValueError: if the base has no safetensors checkpoint; if `check_adapter` refuses an adapter, or it holds more
            than deltas; if its shipped edits are broken or do not match its training; if an edited tensor is missing
            in the checkpoint, quantized, tied, of another shape, or (without `force`) has other values than in
            training; if the edit is not finite; if `out` is not empty, a mount point, or inside the base; if the
            number of weights is not the number of adapters; if `link="hard"` is impossible. A refused merge leaves no
            files.
        OSError: if the disk has no room, a file cannot be written, or reading it returns other bytes than were
            written.

    Example:
        >>> from peft_locft import merge_checkpoint
        >>> print(merge_checkpoint("Qwen/Qwen2.5-7B-Instruct", ["out"], "merged"))
    """
    start = time.perf_counter()
    if link not in ("auto", "hard", "copy"):
        raise ValueError(f"link={link!r}: expected 'auto', 'hard' or 'copy'.")
    target = Path(out).resolve()
    source = local_folder(base, revision)
    _check_target(source, target)
    edits = plan_edits(Checkpoint(source), adapters, weights, scale, force)
    record = {
        "base_model": {"name_or_path": str(base), "revision": revision},
        **merge_record(edits.adapters, weights, scale),
    }
    conflicts = conflicts_of(edits.adapters)
    nothing = partial("Nothing is left in {}. Run the same command to merge again.".format, target)
    with (
        explained_interruption(nothing),
        atomic_folder(target, what="a merged model", new=True) as staging,
    ):
        summary = _write(edits, staging, link, record, progress)
    return replace(summary, folder=target, conflicts=conflicts, seconds=time.perf_counter() - start)


def conflicts_of(adapters: Sequence[CheckedAdapter]) -> Conflicts | None:
    """Return the prompts that several of the adapters edit; `None` for a single adapter."""
    folders = list(dict.fromkeys(adapter.folder for adapter in adapters))
    return find_conflicts(folders) if len(folders) > 1 else None


def _check_target(source: Path, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} already exists: a merge writes a new folder. Remove it, or choose another folder.")
    if os.path.ismount(target):
        raise ValueError(f"{target} is a mount point, which a rename cannot replace. Choose a folder inside it.")
    if target.is_relative_to(source):
        raise ValueError(
            f"{target} is inside the base, {source}. Choose a folder outside of it; to change the base, merge "
            "in place (merge_in_place, --in-place)."
        )


def merge_record(
    adapters: Sequence[CheckedAdapter], weights: Sequence[float] | None, scale: float | None
) -> dict[str, Any]:
    """Return the record of a merge: its adapters with their scales and weights."""
    merged = [
        {
            "adapter": str(adapter.folder),
            "scale": adapter.config.scale if scale is None else scale,
            "weight": None if weights is None else weights[index],
        }
        for index, adapter in enumerate(adapters)
    ]
    return {"format": 1, "adapters": merged, "peft-locft": __version__}


def _write(edits: MergePlan, staging: Path, link: Link, record: dict[str, Any], progress: bool) -> MergeSummary:
    checkpoint = edits.checkpoint
    edited = edits.by_shard()
    to_copy, left_out = other_files(checkpoint)
    placed: Counter[str] = Counter()
    digests: dict[str, str] = {}
    for name in to_copy:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        placed[place_file(checkpoint.folder / name, staging / name, "copy", lambda _: None)] += 1
    total = sum((checkpoint.folder / name).stat().st_size for name in checkpoint.shards)
    with progress_bar(total, progress) as advance:
        for shard in checkpoint.shards:
            source, target = checkpoint.folder / shard, staging / shard
            if shard in edited:
                digests |= write_edited_shard(source, target, edited[shard], advance)
            else:
                placed[place_file(source, target, link, advance)] += 1
    before = checkpoint.folder / RECORD_NAME
    if before.is_file():  # the base is itself the result of a merge
        record = record | {"before": json.loads(before.read_text(encoding="utf-8"))}
    write_atomically(staging / RECORD_NAME, json.dumps(record | {"tensors_sha256": digests}, indent=2) + "\n")
    num_bytes = sum((staging / shard).stat().st_size for shard in edited)
    return MergeSummary(
        staging, tuple(sorted(digests)), tuple(sorted(edited)), num_bytes, dict(placed), tuple(left_out)
    )


def other_files(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Return the other files of a model's folder: files to copy, and weights in other formats."""
    own = {*checkpoint.shards, RECORD_NAME}
    to_copy: list[str] = []
    weights: list[str] = []
    for place, folders, files in os.walk(checkpoint.folder, followlinks=True):
        inside = Path(place).relative_to(checkpoint.folder)
        # skip hidden folders: git and huggingface_hub describe the unedited files there
        folders[:] = [name for name in folders if not name.startswith(".") and inside / name != Path(IN_PLACE_FOLDER)]
        for name in files:
            matching = [
                pattern for pattern in OTHER_WEIGHTS if fnmatch.fnmatch(name.removesuffix(".index.json"), pattern)
            ]
            if str(inside / name) in own:
                continue
            stale = matching and not (str(inside / name) == INDEX_NAME and checkpoint.has_index)
            (weights if stale else to_copy).append(str(inside / name))
    return sorted(to_copy), sorted(weights)


@contextmanager
def progress_bar(num_bytes: int, shown: bool) -> Iterator[Progress]:
    """Yield a function to call with the number of new bytes; `shown` shows a progress bar on a terminal."""
    with tqdm(total=num_bytes, unit="B", unit_scale=True, leave=False, disable=None if shown else True) as bar:
        yield bar.update
