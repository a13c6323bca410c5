"""Copies of large files: by reference where the file system can, by hard link if asked, within the kernel else."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

if sys.platform != "win32":
    import fcntl

Link = Literal["auto", "hard", "copy"]
# told how many more bytes were written
Progress = Callable[[int], object]

COPIED_AT_ONCE = 1 << 23
CLONE_FILE = 0x40049409  # linux/fs.h: FICLONE
NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EMLINK)


def place_file(source: Path, target: Path, link: Link, progress: Progress) -> str:
    """Put a file with the content of `source` at `target`, without writing its bytes where that can be avoided.

    Args:
        source: a file; of a symbolic link, the file that it leads to.
        target: where there is none yet.
        link: `"copy"`: a file of its own, sharing blocks with the source where the file system can (a reflink).
            `"hard"`: the same file under a second name. `"auto"`: a reflink, or else a hard link, or else a copy.
        progress: told how many bytes were done.

    Returns:
        `"reflink"`, `"hard link"` or `"copy"`.

    Raises:
        ValueError: if `link` is `"hard"` and the two places cannot share a file.
        OSError: if the disk has no room for a copy, or it cannot be written.
    """
    source = source.resolve()
    how = "hard link" if link != "copy" else "copy"
    if link != "hard" and clone(source, target):
        how = "reflink"
        sync_file(target)
        shutil.copymode(source, target)
    elif link == "copy" or not _hard_link(source, target):
        if link == "hard":
            raise ValueError(
                f"{source} cannot have a hard link at {target}: they are on different file systems, or this one has "
                "no links. Choose a place beside the base, or link='copy'."
            )
        how = "copy"
        check_room(target.parent, source.stat().st_size)
        target.touch()
        copy_ranges(source, target, [(0, source.stat().st_size)], progress)
        sync_file(target)
        shutil.copymode(source, target)
        return how
    progress(source.stat().st_size)
    return how


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise an OSError if the disk has no room for a file of this size, rather than after it was written in part."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"No space left on device: {num_bytes / 1e6:,.1f} MB are to be written to {folder}, where "
            f"{free / 1e6:,.1f} MB are free. Nothing was changed",
        )


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in NOT_HERE:
            return False
        raise
    return True


def clone(source: Path, target: Path) -> bool:
    """Make `target` a copy of `source` that shares its blocks; return False, with no file there, where it cannot.

    The copy has the mode of any new file, since that of the source may forbid to write into it. It is not on the disk
    when this returns.
    """
    if sys.platform != "linux":
        return False
    with open(source, "rb") as reader, open(target, "wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), CLONE_FILE, reader.fileno())
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
        else:
            return True
    target.unlink()
    return False


def copy_ranges(source: Path, target: Path, ranges: Sequence[tuple[int, int]], progress: Progress) -> None:
    """Copy bytes to the same places in another file.

    Args:
        source: the file to read.
        target: the file to write, which is there.
        ranges: pairs of the first byte and the one after the last.
        progress: told how many bytes were written, again and again.

    Raises:
        OSError: if the file to read ends before them, or the other cannot be written.
    """
    in_kernel = hasattr(os, "copy_file_range")
    with open(source, "rb", buffering=0) as reader, open(target, "r+b", buffering=0) as writer:
        for start, end in ranges:
            while start < end:
                count, copied = min(end - start, COPIED_AT_ONCE), 0
                if in_kernel:
                    try:
                        copied = os.copy_file_range(reader.fileno(), writer.fileno(), count, start, start)
                    except OSError as error:
                        if error.errno not in NOT_HERE:
                            raise
                        in_kernel = False
                if not in_kernel:
                    reader.seek(start)
                    writer.seek(start)
                    copied = writer.write(reader.read(count))
                if not copied:
                    raise OSError(errno.EIO, f"{source} ended while it was copied: something else is writing to it")
                begin_writing(writer, start, copied)
                start += copied
                progress(copied)


def begin_writing(writer: BinaryIO | IO[Any], start: int, num_bytes: int) -> None:
    """Let the disk begin with what was written to a file, so that there is less to wait for in the end."""
    if hasattr(os, "posix_fadvise"):
        # it drops what is on the disk already from memory, and has the rest written; what is being written stays
        os.posix_fadvise(writer.fileno(), start, num_bytes, os.POSIX_FADV_DONTNEED)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "r+b", buffering=0) as file:
        os.fsync(file.fileno())


def write_all(writer: BinaryIO | IO[Any], part: memoryview) -> None:
    """Write all bytes of `part` where an open file without a buffer stands, which may take less at once."""
    while part:
        part = part[writer.write(part) :]


def gaps(ranges: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Yield what `ranges`, pairs of first byte and the one after the last, leave of a file of `size` bytes."""
    start = 0
    for begin, end in sorted(ranges):
        if start < begin:
            yield start, begin
        start = end
    if start < size:
        yield start, size
