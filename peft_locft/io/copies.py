"""Copies of large files: by reflink where the file system can, by hard link if allowed, else within the kernel."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

from .files import size

if sys.platform != "win32":
    import fcntl

Link = Literal["auto", "hard", "copy"]
# called with the number of bytes written since the last call
Progress = Callable[[int], object]

COPIED_AT_ONCE = 1 << 23
CLONE_FILE = 0x40049409  # linux/fs.h: FICLONE
NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EMLINK)


def place_file(source: Path, target: Path, link: Link, progress: Progress) -> str:
    """Put a file with the content of `source` at `target`, without writing its bytes where that can be avoided.

    Args:
        source: a file, or a symbolic link to one.
        target: the new file, which must not be there.
        link: `"copy"`: a file of its own that shares blocks with the source where the file system can (a reflink).
            `"hard"`: the same file under a second name. `"auto"`: a reflink, else a hard link, else a copy.
        progress: called with the number of bytes done.

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
                "no hard links. Choose a folder beside the base, or link='copy'."
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
    """Raise an OSError if the disk has no room for a file of this size, before it is written in part."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"No space left on device: {size(num_bytes)} are to be written to {folder}, where {size(free)} are "
            "free. Nothing was changed",
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
    """Make `target` a copy of `source` that shares its blocks; return False, with no file there, if it cannot be made.

    The copy has the mode of a new file, since that of the source may forbid writing. It is not synced to the disk.
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
    """Copy bytes to the same offsets in another file.

    Args:
        source: the file to read.
        target: the file to write, which is there.
        ranges: offsets of the first byte of each range and of the byte after its last.
        progress: called with the number of bytes written, again and again.

    Raises:
        OSError: if the source ends before them, or the target cannot be written.
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
                    raise OSError(errno.EIO, f"{source} ended while it was copied: another program is writing to it")
                begin_writing(writer, start, copied)
                start += copied
                progress(copied)


def begin_writing(writer: BinaryIO | IO[Any], start: int, num_bytes: int) -> None:
    """Start writing a file's new bytes to the disk, so that the final sync has less to wait for."""
    if hasattr(os, "posix_fadvise"):
        # drops from memory what is on the disk already, and starts writing the rest
        os.posix_fadvise(writer.fileno(), start, num_bytes, os.POSIX_FADV_DONTNEED)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "r+b", buffering=0) as file:
        os.fsync(file.fileno())


def write_all(writer: BinaryIO | IO[Any], part: memoryview) -> None:
    """Write all bytes of `part` at the position of an unbuffered file, which may take less at once."""
    while part:
        part = part[writer.write(part) :]


def gaps(ranges: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a file of `size` bytes that `ranges` leave out, each as first offset and end."""
    start = 0
    for begin, end in sorted(ranges):
        if start < begin:
            yield start, begin
        start = end
    if start < size:
        yield start, size
