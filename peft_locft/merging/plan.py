"""Plans a merge on disk: which tensors change, verified before anything is written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.edited_parameters import EditedParameter, adapter_list, edited_parameters
from ..adapters.reading import CheckedAdapter, check_adapter
from ..io.checkpoint import Checkpoint, local_folder
from ..io.copies import Progress
from ..io.parameter_names import Span
from ..io.patched_file import write_patched
from ..io.safetensors_file import raw_bytes

# a subfolder, since vLLM and others load every safetensors file beside a model that has no index
IN_PLACE_FOLDER = "locft"


@dataclass(frozen=True, slots=True)
class MergePlan:
    """The changes of a merge in a checkpoint.

    Attributes:
        checkpoint: the base.
        adapters: the adapters, in the order of addition.
        parameters: the edited parameters.
    """

    checkpoint: Checkpoint
    adapters: list[CheckedAdapter]
    parameters: list[EditedParameter]

    def by_shard(self) -> dict[str, list[tuple[EditedParameter, Span]]]:
        """Return the edited tensors, each with its parameter, by file."""
        edits: dict[str, list[tuple[EditedParameter, Span]]] = {}
        for parameter in self.parameters:
            for span in parameter.base.spans:
                edits.setdefault(self.checkpoint.files[span.name], []).append((parameter, span))
        return edits


def checked_adapters(
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], weights: Sequence[float] | None
) -> list[CheckedAdapter]:
    """Return adapters to merge, after checking that they are LocFT adapters with nothing but deltas.

    Args:
        adapters: one or more folders or ids on the Hub.
        weights: one factor per adapter, or `None`.

    Raises:
        ValueError: if one is refused, or the number of weights is not that of the adapters.
    """
    paths = adapter_list(adapters)
    if weights is not None and len(weights) != len(paths):
        raise ValueError(f"weights: found {len(weights)} for {len(paths)} adapters; expected one weight per adapter.")
    checked = [check_adapter(local_folder(path, only=["adapter_*", "locft_*"])) for path in paths]
    for adapter in checked:
        adapter.refuse_all_but_deltas()
    return checked


def plan_edits(
    checkpoint: Checkpoint,
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None,
    scale: float | None,
    force: bool,
) -> MergePlan:
    """Return the changes of a merge, after checking that the adapters were trained on this base.

    Args:
        checkpoint: the base.
        adapters: one or more folders or ids on the Hub.
        weights: as in `merge_checkpoint`.
        scale: as in `merge_checkpoint`.
        force: as in `merge_checkpoint`.

    Raises:
        ValueError: as in `merge_checkpoint`.
    """
    checked = checked_adapters(adapters, weights)
    checkpoint.check_shards()
    parameters = edited_parameters(checkpoint, checked, weights=weights, scale=scale, force=force)
    for term in (term for parameter in parameters for term in parameter.terms):
        if term.recorded_sha256 is None and not force:
            warnings.warn(
                f"{term.adapter.folder} does not record the base of its delta of {term.name}, so the base is "
                "not verified. Check that it is the right one.",
                stacklevel=3,
            )
    return MergePlan(checkpoint, checked, parameters)


def write_edited_shard(
    source: Path, target: Path, edits: Sequence[tuple[EditedParameter, Span]], progress: Progress
) -> dict[str, str]:
    """Write a copy of a safetensors file with the edited tensors; all other bytes stay.

    Args:
        source: the file.
        target: the copy; it is on the disk on return.
        edits: the edited tensors in this file, each with its parameter.
        progress: called with the number of new bytes.

    Returns:
        The sha256 of the new bytes, by tensor name.

    Raises:
        ValueError: if an edited value is not finite.
        OSError: if the disk has no room, or reading the copy returns other bytes than were written.
    """
    new = {
        span.name: ((raw_bytes(values) for values in parameter.edited(span)), span.tensor) for parameter, span in edits
    }
    return write_patched(source, target, new, progress)
