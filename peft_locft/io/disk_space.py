"""Space on a disk: reserved before it is used, and one clear error when there is none left."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors and torch.save have errors of their own
DISK_FULL_TEXTS = ("os error 28", "os error 122", "No space left on device", "file write failed", "unexpected pos")


class DiskFullError(OSError):
    """A disk has no space left.

    Args:
        folder: where something was to be written.
        num_bytes: how much it needs, if that is known.
    """

    def __init__(self, folder: str | os.PathLike[str], num_bytes: int | None = None) -> None:
        needs = "" if num_bytes is None else f" needs {size(num_bytes)} and"
        super().__init__(
            f"No space left on device: {folder}{needs} has {size(free_bytes(folder))} free. Free some space, or "
            "choose a folder on another disk."
        )
        self.errno = errno.ENOSPC


def size(num_bytes: int) -> str:
    """Return a size as text, such as `234.9 MB`."""
    unit, name = (1e9, "GB") if num_bytes >= 1e9 else (1e6, "MB") if num_bytes >= 1e5 else (1e3, "kB")
    return f"{num_bytes / unit:.1f} {name}"


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """Return the free space of the disk that holds a folder, or will hold it."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that a disk, or a user's share of it, is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_FULL
    return isinstance(error, Exception) and any(text in str(error) for text in DISK_FULL_TEXTS)


@contextmanager
def explained_disk_full(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Raise a [`DiskFullError`] that names `folder` in place of any error about a full disk."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(folder) from error


def check_room(folder: str | os.PathLike[str], num_bytes: int) -> None:
    """Raise a [`DiskFullError`] if the disk has no room for a file of this size."""
    if free_bytes(folder) < num_bytes:
        raise DiskFullError(folder, num_bytes)


def reserve(file: IO[Any], folder: str | os.PathLike[str], num_bytes: int) -> None:
    """Give a new file its size, and the space for it on the disk.

    A file that is only made longer has no space yet. If the disk is full when its memory map is written to, the
    process ends with a bus error, and no Python code runs.

    Raises:
        DiskFullError: if there is not enough space.
    """
    check_room(folder, num_bytes)
    file.truncate(num_bytes)
    if num_bytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise DiskFullError(folder, num_bytes) from error
            # a file system that cannot reserve space
