"""The originals of a merge into a GGUF file itself, and what to do after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ..io.copies import write_all
from ..io.disk_space import explained_disk_full
from ..io.files import atomic_file
from ..io.folders import locked, sync_folder
from ..io.gguf_file import GGUFFile
from ..io.interruption import explained_interruption
from ..io.safetensors_file import StoredTensor, read_header, write_header
from .gguf_plan import split_names
from .plan import IN_PLACE_FOLDER

UNDO_ENDING = ".undo.safetensors"
UNDO_FORMAT = 1
HEADER = "header"


def undo_path(model: Path) -> Path:
    """Return where the original bytes of a file with a merge in place are."""
    return model.parent / IN_PLACE_FOLDER / f"{model.name}{UNDO_ENDING}"


class Undo:
    """The content of an undo file: the original header, and the original bytes of each edited tensor.

    Raises:
        ValueError: if the file is broken or is not an undo file.
    """

    def __init__(self, path: Path) -> None:
        self.tensors, metadata = read_header(path)
        try:
            content = json.loads(metadata["locft_undo"])
            self.size, self.sha256 = int(content["size"]), dict(content["sha256"])
            self.merged_size, self.merged_sha256 = int(content["merged_size"]), dict(content["merged_sha256"])
            self.record = content.get("record")
            is_valid = content["format"] == UNDO_FORMAT and self.sha256.keys() == self.tensors.keys()
            is_valid &= self.merged_sha256.keys() == self.sha256.keys() >= {HEADER}
        except (KeyError, ValueError, TypeError, AttributeError):
            is_valid = False
        if not is_valid:
            raise ValueError(f"{path} is not an undo file of a merge in place. Download the model again.")
        self.path = path

    def original(self, name: str) -> bytes:
        """Return the original bytes of an edited tensor with its padding, or of the `HEADER`."""
        return self.tensors[name].read().numpy().tobytes()

    @property
    def names(self) -> list[str]:
        """The names of the edited tensors."""
        return [name for name in self.tensors if name != HEADER]

    def fits(self, file: GGUFFile, merged: bool) -> bool:
        """Whether a file is the merged model, or the original one."""
        digests, num_bytes = (self.merged_sha256, self.merged_size) if merged else (self.sha256, self.size)
        if file.path.stat().st_size != num_bytes or _sha256(file.header) != digests[HEADER]:
            return False
        slots = {name: file.tensors[name] for name in self.names}
        return all(_sha256(tensor.bytes(tensor.slot)) == digests[name] for name, tensor in slots.items())

    def check_originals(self) -> None:
        """Raise a ValueError if the undo file's tensors have changed since the merge."""
        for name, tensor in self.tensors.items():
            if tensor.bytes_sha256() != self.sha256[name]:
                raise ValueError(
                    f"{self.path} is damaged: the original of {name} has changed since the merge. Nothing was "
                    "detached. Download the model again."
                )


def write_undo(file: GGUFFile, header: bytes, new: Mapping[str, Sequence[bytes]], record: str) -> None:
    """Save the original bytes of a merge, and the hashes of the new ones.

    Args:
        file: the original file.
        header: the new header.
        new: the new bytes of each edited tensor, with its padding, in parts.
        record: what is merged, as JSON.

    Raises:
        OSError: if the file cannot be written, or reading it returns other bytes than were written.
    """
    originals = {HEADER: file.header} | {name: file.tensors[name].bytes(file.tensors[name].slot) for name in new}
    padded = {HEADER: header} | {name: b"".join(parts) for name, parts in new.items()}
    old_size = file.path.stat().st_size
    content = {
        "format": UNDO_FORMAT,
        "size": old_size,
        "merged_size": old_size + sum(len(padded[name]) - len(originals[name]) for name in originals),
        "sha256": {name: _sha256(each) for name, each in originals.items()},
        "merged_sha256": {name: _sha256(each) for name, each in padded.items()},
        "record": json.loads(record),
    }
    path = undo_path(file.path)
    path.parent.mkdir(exist_ok=True)
    described = {name: StoredTensor(path, "U8", (len(each),), 0, len(each)) for name, each in originals.items()}
    with atomic_file(path) as staged:
        with open(staged, "wb", buffering=0) as writer:
            write_header(writer, described, {"format": "pt", "locft_undo": json.dumps(content)})
            for each in originals.values():
                write_all(writer, memoryview(each))
        written, _ = read_header(staged)
        if any(tensor.bytes_sha256() != content["sha256"][name] for name, tensor in written.items()):
            raise OSError(f"{path}: the disk returned other bytes than were written. Check the disk.")
    sync_folder(path.parent)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def remove_undo(model: Path) -> None:
    undo_path(model).unlink(missing_ok=True)
    with suppress(OSError):
        undo_path(model).parent.rmdir()  # unless another file's is there
    sync_folder(model.parent)


def recover(model: Path) -> bool:
    """Clean up after a killed merge or detach, and return whether an edit is merged in place.

    Args:
        model: the file.

    Raises:
        ValueError: if the undo file is broken, or the file is neither the edited nor the original one.
    """
    path = undo_path(model)
    if not path.is_file():
        with suppress(OSError):
            path.parent.rmdir()
        return False
    undo, file = Undo(path), GGUFFile(model)
    if undo.names and not file.tensors.keys() >= set(undo.names):
        raise _neither(model)
    if undo.fits(file, merged=True):
        return True
    if not undo.fits(file, merged=False):
        raise _neither(model)
    remove_undo(model)
    return False


def _neither(model: Path) -> ValueError:
    return ValueError(
        f"{model} is not what the merge in place wrote: another program has changed it, so the originals in "
        f"{undo_path(model)} do not fit it. Nothing was changed. Restore the file, or download the model again. To "
        "keep it as it is, remove the originals."
    )


@contextmanager
def exclusive_access(model: Path) -> Iterator[list[Path]]:
    """Lock a model's folder, recover from a killed process, and yield its files that have an edit merged in place.

    Args:
        model: the model's file; of several, any.
    """
    if not model.is_file():
        raise FileNotFoundError(f"{model} is not a file: expected a model in GGUF.")
    paths = [path for path in split_names(model) if path.exists()]
    links = [path for path in paths if path.is_symlink()]
    if links:
        raise ValueError(
            f"{links[0]} is a symbolic link to {links[0].resolve()}: other programs share that file, so a merge in "
            "place would change their model too. Merge into a new file."
        )
    with locked(model.parent) as acquired, explained_disk_full(model.parent):
        if not acquired:
            raise ValueError(f"Another process is merging or detaching in {model.parent}. Wait until it has finished.")
        merged = [path for path in paths if recover(path)]
        with explained_interruption(partial(_what_is_left, model, paths, merged)):
            yield merged


def _what_is_left(model: Path, paths: Sequence[Path], merged: Sequence[Path]) -> str:
    now = [path for path in paths if recover(path)]
    if now == merged:
        return f"{model} is as it was before. Run the same command to try again."
    return f"{model} is complete: the adapters are {'merged' if now else 'detached'}."
