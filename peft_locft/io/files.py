"""Atomic writes of a file, and its hash."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .disk_space import explained_disk_full

if sys.platform != "win32":
    import fcntl

MOMENT_SECONDS = 60.0  # a writer locks its file within moments of making it
ABANDONED_AFTER_SECONDS = 24 * 3600  # without locks: the age at which a file belongs to no running process


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a temporary file and rename it: a kill at any moment leaves the old file or the new one."""
    with atomic_file(path) as staged:
        staged.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty file to write to, and rename it to `path` if the body raises nothing.

    The file that a killed process left is removed by the next call for the same path.

    Raises:
        DiskFullError: if the disk has no room.
    """
    _remove_leftovers(path)
    with explained_disk_full(path.parent):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        staged = Path(name)
        try:
            _lock(descriptor)
            yield staged
            with staged.open("rb+") as file:
                os.fsync(file.fileno())
            staged.chmod(0o666 & ~current_umask())  # mkstemp makes it private
            os.replace(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove the unfinished files of `path` that killed processes left."""
    unfinished = re.compile(re.escape(f".{path.name}-") + "[a-z0-9_]{8}")
    remove_abandoned(each for each in path.parent.glob(".*") if unfinished.fullmatch(each.name))


def remove_abandoned(files: Iterable[Path]) -> None:
    """Remove those of some unfinished files from [`atomic_file`] that belong to no running process."""
    for file in list(files):
        with suppress(OSError):
            age = time.time() - file.stat().st_mtime
            if age > ABANDONED_AFTER_SECONDS or (age > MOMENT_SECONDS and _is_unlocked(file)):
                file.unlink()


def _lock(descriptor: int) -> bool:
    """Lock an open file, and return whether this was possible. Some file systems have no locks."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_unlocked(file: Path) -> bool:
    """Return whether no process holds the lock of a file; False if the system cannot tell."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


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
