"""The originals of what a merge in place replaced, in a safetensors file of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.checkpoint import Checkpoint, StoredTensor, read_header, write_header
from ..io.copies import write_all
from .edited_weights import MergePlan

# in a folder of its own: vLLM and others load every safetensors file that lies beside a model without an index
IN_PLACE_FOLDER = "locft"
UNDO_NAME = "locft_undo.safetensors"
UNDO_FORMAT = 1
EDITED_ENDING = "-locft.safetensors"


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
    originals = {piece.name: piece.tensor for parameter in edits.parameters for piece in parameter.pieces}
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
