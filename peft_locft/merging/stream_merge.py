"""Merging adapters into a checkpoint on disk: a new folder in which only the edited tensors are new."""

from __future__ import annotations

import fnmatch
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .._version import __version__
from ..adapters.shipped_edits import Conflicts, find_conflicts
from ..io.checkpoint import INDEX_NAME, OTHER_WEIGHTS, Checkpoint, local_folder
from ..io.copies import Link, Progress, place_file
from ..io.files import size, write_atomically
from ..io.folders import atomic_folder
from .plan import IN_PLACE_FOLDER, MergePlan, plan_edits, write_edited_shard

RECORD_NAME = "locft_merge.json"


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """Result of a merge on disk, or of a detach.

    Attributes:
        folder: the model's folder.
        tensors: the checkpoint's names of the tensors that changed.
        written: names of the rewritten files, those with a changed tensor.
        num_bytes: size of the rewritten files.
        placed: number of other files by the way they were put there: `{"hard link": 3, "copy": 5}`.
        left_out: names of files with the unedited weights in another format. They are not in the new folder; a merge
            in place leaves them as they are.
        conflicts: prompts that several of the merged adapters edit, as far as they ship their edits.
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
            ("changed", f"{tensors} ({len(self.tensors)} in all)"),
            ("written", f"{', '.join(self.written)}: {size(self.num_bytes)}"),
        ]
        if self.placed:
            rows.append(("others", ", ".join(f"{count} by {how}" for how, count in sorted(self.placed.items()))))
        if self.left_out:
            rows.append(("not edited", f"{', '.join(self.left_out)}: the base's weights in another form"))
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

    Every tensor of the result has the bits that `merge_and_unload()` and `save_pretrained()` give of a base loaded in
    the dtype of its checkpoint (`dtype="auto"`). The arithmetic is `compose_weight`. A few megabytes are in memory at
    a time, whatever the size of the tensors.

    The new folder appears in one step, complete and on the disk: a kill at any moment leaves no folder, or the new
    one. The next merge to the same folder removes what a killed one left beside it.

    Args:
        base: the model: a folder, or an id on the Hub, downloaded to huggingface_hub's cache. It is not changed.
        adapters: one or several adapters: folders, or ids on the Hub. Several are added in this order and rounded
            once, as `merge_and_unload(adapter_names=…)` does.
        out: the new folder. It must not exist, or be empty.
        weights: one factor per adapter; the result is that of `add_weighted_adapter(…, "linear")`, merged. `None`:
            every adapter as it is.
        scale: strength of the deltas, in place of each adapter's own.
        link: how weight files without an edited tensor get there: `"auto"` shares blocks with the base's files (a
            reflink) where the file system can, else makes hard links, else copies. `"hard"`: hard links. `"copy"`:
            files of their own. A hard link is one file under two names: writing into it changes both. All other files
            are copied.
        force: merge even if the base's tensors are not those that the adapters were trained on.
        revision: branch, tag or commit of a base on the Hub.
        progress: show a progress bar on a terminal.

    Returns:
        A summary.

    Raises:
        ValueError: if the base has no safetensors checkpoint; if an adapter is refused by `check_adapter`, or holds
            more than deltas; if edits that it ships are broken or not its own; if an edited tensor is not in the
            checkpoint, is quantized, tied, of another shape, or (without `force`) not the one that the adapter was
            trained on; if the edit is not finite; if `out` is not empty, a mount point, or in the base; if the weights
            are not one an adapter; if a hard link was asked for and cannot be made. Nothing is left of a merge that is
            refused.
        OSError: if the disk has no room, or a file cannot be written, or does not read as it was written.

    Example:
        >>> from peft_locft import merge_checkpoint
        >>> print(merge_checkpoint("Qwen/Qwen2.5-7B-Instruct", ["out"], "merged"))
    """
    begun = time.perf_counter()
    if link not in ("auto", "hard", "copy"):
        raise ValueError(f"link={link!r}: expected 'auto', 'hard' or 'copy'.")
    target = Path(out).resolve()
    source = local_folder(base, revision)
    _check_target(source, target)
    edits = plan_edits(Checkpoint(source), adapters, weights, scale, force)
    record = {"base_model": {"name_or_path": str(base), "revision": revision}, **merge_record(edits, weights, scale)}
    conflicts = conflicts_of(edits)
    with atomic_folder(target, what="a merged model", new=True) as staging:
        done = _write(edits, staging, link, record, progress)
    return replace(done, folder=target, conflicts=conflicts, seconds=time.perf_counter() - begun)


def conflicts_of(edits: MergePlan) -> Conflicts | None:
    """Return the prompts that several of the adapters edit; `None` if there is one adapter alone."""
    folders = list(dict.fromkeys(adapter.folder for adapter in edits.adapters))
    return find_conflicts(folders) if len(folders) > 1 else None


def _check_target(source: Path, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"{target} is there already: a merge writes a new folder. Remove it, or choose another folder."
        )
    if os.path.ismount(target):
        raise ValueError(f"{target} is a mount point, which a rename cannot replace. Choose a folder in it.")
    if target.is_relative_to(source):
        raise ValueError(
            f"{target} is inside of the base, {source}. Choose a folder outside of it; to change the base, merge "
            "in place (merge_in_place, --in-place)."
        )


def merge_record(edits: MergePlan, weights: Sequence[float] | None, scale: float | None) -> dict[str, Any]:
    """Return the record of a merged model: its adapters, and how they were added."""
    adapters = [
        {
            "adapter": str(adapter.folder),
            "scale": adapter.config.scale if scale is None else scale,
            "weight": None if weights is None else weights[index],
        }
        for index, adapter in enumerate(edits.adapters)
    ]
    return {"format": 1, "adapters": adapters, "peft-locft": __version__}


def _write(edits: MergePlan, staging: Path, link: Link, record: dict[str, Any], progress: bool) -> MergeSummary:
    checkpoint = edits.checkpoint
    edited = edits.by_shard()
    kept, left_out = other_files(checkpoint)
    placed: Counter[str] = Counter()
    digests: dict[str, str] = {}
    for name in kept:
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
    if before.is_file():  # the base was merged itself
        record = record | {"before": json.loads(before.read_text(encoding="utf-8"))}
    write_atomically(staging / RECORD_NAME, json.dumps(record | {"tensors_sha256": digests}, indent=2) + "\n")
    num_bytes = sum((staging / shard).stat().st_size for shard in edited)
    return MergeSummary(
        staging, tuple(sorted(digests)), tuple(sorted(edited)), num_bytes, dict(placed), tuple(left_out)
    )


def other_files(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Return the other files of a model's folder: those to copy, and weights in other formats."""
    own = {*checkpoint.shards, RECORD_NAME}
    kept: list[str] = []
    weights: list[str] = []
    for place, folders, files in os.walk(checkpoint.folder, followlinks=True):
        inside = Path(place).relative_to(checkpoint.folder)
        # hidden folders of git and huggingface_hub describe the unedited files
        folders[:] = [name for name in folders if not name.startswith(".") and inside / name != Path(IN_PLACE_FOLDER)]
        for name in files:
            of_weights = [
                pattern for pattern in OTHER_WEIGHTS if fnmatch.fnmatch(name.removesuffix(".index.json"), pattern)
            ]
            if str(inside / name) in own:
                continue
            stale = of_weights and not (str(inside / name) == INDEX_NAME and checkpoint.has_index)
            (weights if stale else kept).append(str(inside / name))
    return sorted(kept), sorted(weights)


@contextmanager
def progress_bar(num_bytes: int, shown: bool) -> Iterator[Progress]:
    """Yield a function to call with numbers of written bytes; `shown` draws a progress bar on a terminal."""
    with tqdm(total=num_bytes, unit="B", unit_scale=True, leave=False, disable=None if shown else True) as bar:
        yield bar.update
