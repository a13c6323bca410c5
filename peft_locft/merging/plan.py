"""What a merge on disk changes in a checkpoint, verified before anything is written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.edited_parameters import EditedParameter, edited_parameters, one_or_more
from ..adapters.reading import CheckedAdapter, check_adapter
from ..io.checkpoint import Checkpoint, local_folder
from ..io.copies import Progress
from ..io.parameter_names import Span
from ..io.patched_file import write_patched
from ..io.safetensors_file import raw_bytes

# in the model's folder: vLLM and others load every safetensors file that lies beside a model without an index
IN_PLACE_FOLDER = "locft"


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What a merge changes in a checkpoint.

    Attributes:
        checkpoint: the base.
        adapters: in the order in which they are added.
        parameters: the edited ones.
    """

    checkpoint: Checkpoint
    adapters: list[CheckedAdapter]
    parameters: list[EditedParameter]

    def by_shard(self) -> dict[str, list[tuple[EditedParameter, Span]]]:
        """Return the edited tensors, each with its parameter, by the file that holds them."""
        found: dict[str, list[tuple[EditedParameter, Span]]] = {}
        for parameter in self.parameters:
            for span in parameter.base.spans:
                found.setdefault(self.checkpoint.files[span.name], []).append((parameter, span))
        return found


def plan_edits(
    checkpoint: Checkpoint,
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None,
    scale: float | None,
    force: bool,
) -> MergePlan:
    """Find what adapters change in a checkpoint, and check that it is the base that they were trained on.

    Args:
        checkpoint: the base.
        adapters: one or several folders or ids on the Hub.
        weights: as `merge_checkpoint` takes them.
        scale: as `merge_checkpoint` takes it.
        force: merge into another base.

    Raises:
        ValueError: as `merge_checkpoint` names them.
    """
    paths = one_or_more(adapters)
    if weights is not None and len(weights) != len(paths):
        raise ValueError(f"{len(paths)} adapters but {len(weights)} weights: expected one weight per adapter.")
    found = [check_adapter(local_folder(path, only=["adapter_*", "locft_*"])) for path in paths]
    for adapter in found:
        adapter.refuse_all_but_deltas()
    checkpoint.check_shards()
    parameters = edited_parameters(checkpoint, found, weights=weights, scale=scale, force=force)
    for term in (term for parameter in parameters for term in parameter.terms):
        if term.recorded_sha256 is None and not force:
            warnings.warn(
                f"{term.adapter.folder} does not say which base its delta of {term.name} belongs to: it is merged "
                "unchecked.",
                stacklevel=3,
            )
    return MergePlan(checkpoint, found, parameters)


def write_edited_shard(
    source: Path, target: Path, edits: Sequence[tuple[EditedParameter, Span]], progress: Progress
) -> dict[str, str]:
    """Write a copy of a safetensors file in which the bytes of the edited tensors, and no others, are new.

    Args:
        source: the file.
        target: the copy; it is on the disk when this returns.
        edits: the edited tensors in this file, each with its parameter.
        progress: told how many bytes were written.

    Returns:
        The sha256 of the new bytes by the tensors' names.

    Raises:
        ValueError: if an edited value is not finite.
        OSError: if what is on the disk afterwards is not what was written.
    """
    new = {
        span.name: ((raw_bytes(values) for values in parameter.edited(span)), span.tensor) for parameter, span in edits
    }
    return write_patched(source, target, new, progress)
