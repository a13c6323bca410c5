"""The originals of what a merge in place replaced, in a safetensors file of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, StoredTensor, read_header, write_header
from .edited_weights import Edits
from .file_copies import write_all

UNDO_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Undo:
    """The content of an undo file.

    Attributes:
        originals: where the bytes lie that a merge replaced, by the tensor's name.
        merged: of each of these tensors, the file that it is in (`"shard"`), its first byte there (`"start"`), and the
            sha256 of the bytes that the merge wrote (`"sha256"`) and of those before (`"original_sha256"`).
        sizes: of these files, in bytes.
    """

    originals: dict[str, StoredTensor]
    merged: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, int]

    def by_shard(self) -> dict[str, list[str]]:
        """Return the tensors' names by the file that they are in."""
        found: dict[str, list[str]] = {}
        for name, facts in self.merged.items():
            found.setdefault(facts["shard"], []).append(name)
        return found

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise a ValueError if a tensor is no longer what the merge wrote, or where, or its original is damaged."""
        for name, facts in self.merged.items():
            shard = checkpoint.folder / facts["shard"]
            tensor = checkpoint.tensor(name) if checkpoint.files.get(name) == facts["shard"] else None
            if (
                tensor is None
                or (tensor.start, shard.stat().st_size) != (facts["start"], self.sizes[facts["shard"]])
                or tensor.num_bytes != self.originals[name].num_bytes
                or tensor.bytes_sha256() != facts["sha256"]
            ):
                raise ValueError(
                    f"{name} in {shard} is not what the merge in place wrote: something else has changed the file "
                    f"since, and the originals in {self.originals[name].file.name} do not belong to it. Nothing was "
                    "detached. Restore the file, or get the base model again."
                )
            if self.originals[name].bytes_sha256() != facts["original_sha256"]:
                raise ValueError(
                    f"{self.originals[name].file} is damaged: the original of {name} is not what was put there. "
                    "Nothing was detached. Get the base model again."
                )


def write_undo(path: Path, edits: Edits, digests: Mapping[str, str], record: Mapping[str, Any]) -> None:
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
        )
    except (KeyError, ValueError, TypeError, AttributeError):
        known = False
    if not known:
        raise ValueError(f"{path} is not what a merge in place wrote. Get the base model again.")
    return undo
