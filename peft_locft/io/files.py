"""Writing a file whole or not at all, and its hash."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under another name and rename it, so that a kill at any moment leaves the old one or the new."""
    with atomic_file(path) as staged:
        staged.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the name of an empty file to write to, and put it in the place of `path` when it is written."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(descriptor)
    staged = Path(name)
    try:
        yield staged
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        staged.chmod(0o666 & ~current_umask())  # mkstemp makes it private
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_folder(folder: str | os.PathLike[str], what: str) -> None:
    """Check that something can be saved to `folder`, which need not be there.

    Args:
        folder: the folder.
        what: is saved, for the message: "an adapter".

    Raises:
        NotADirectoryError: if it or one above it is a file.
    """
    for place in (Path(folder), *Path(folder).parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"Cannot save {what} to {folder}: {place} is a file. Give a folder.")
