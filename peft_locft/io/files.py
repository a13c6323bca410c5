"""Atomic writes of a file; its hash and its size."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a temporary file and rename it: a kill at any moment leaves the old file or the new one."""
    with atomic_file(path) as staged:
        staged.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty file to write to, and rename it to `path` if the body raises nothing."""
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
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def size(num_bytes: int) -> str:
    """Return a size as text, such as `234.9 MB`."""
    unit, name = (1e9, "GB") if num_bytes >= 1e9 else (1e6, "MB") if num_bytes >= 1e5 else (1e3, "kB")
    return f"{num_bytes / unit:.1f} {name}"


def check_folder(folder: str | os.PathLike[str], what: str) -> None:
    """Raise an error if `folder` cannot be a folder. It need not exist.

    Args:
        folder: the folder to save to.
        what: name of the content for the message, such as "an adapter".

    Raises:
        NotADirectoryError: if it or a parent is a file.
    """
    for place in (Path(folder), *Path(folder).parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"Cannot save {what} to {folder}: {place} is a file. Choose another folder.")
