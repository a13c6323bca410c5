"""Copies of large files: by reflink if the file system supports it, by hard link if allowed, else by the kernel."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

from .disk_space import check_room

if sys.platform != "win32":
    import fcntl

Link = Literal["auto", "hard", "copy"]
# called with the number of bytes written since the last call
Progress = Callable[[int], object]

COPIED_AT_ONCE = 1 << 23
CLONE_FILE = 0x40049409  # linux/fs.h: FICLONE
UNSUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EMLINK)


def place_file(source: Path, target: Path, link: Link, progress: Progress) -> str:
    """Create `target` with the content of `source`, and write its bytes only if there is no cheaper way.

    Args:
        source: a file, or a symbolic link to one.
        target: the new file, which must not exist.
        link: `"copy"`: an independent file, as a reflink (shared blocks) if the file system supports it. `"hard"`: a
            hard link, which is the same file under a second name. `"auto"`: a reflink, else a hard link, else a copy.
        progress: called with the number of new bytes.

    Returns:
        `"reflink"`, `"hard link"` or `"copy"`.

    Raises:
        ValueError: if `link` is `"hard"` and a hard link is impossible.
        OSError: if the disk has no room for a copy, or the copy cannot be written.
    """
    source = source.resolve()
    method = "hard link" if link != "copy" else "copy"
    if link != "hard" and clone(source, target):
        method = "reflink"
        sync_file(target)
        shutil.copymode(source, target)
    elif link == "copy" or not _hard_link(source, target):
        if link == "hard":
            raise ValueError(
                f"{target} cannot be a hard link to {source}: they are on different file systems, or the file system "
                "has no hard links. Choose a folder beside the base, or link='copy'."
            )
        method = "copy"
        check_room(target.parent, source.stat().st_size)
        target.touch()
        copy_ranges(source, target, [(0, source.stat().st_size)], progress)
        sync_file(target)
        shutil.copymode(source, target)
        return method
    progress(source.stat().st_size)
    return method


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def clone(source: Path, target: Path) -> bool:
    """Make `target` a copy of `source` that shares its blocks. If that is impossible, leave no file and return False.

    The copy has the mode of a new file, since the mode of the source may forbid writing. It is not synced to the disk.
    """
    if sys.platform != "linux":
        return False
    with open(source, "rb") as reader, open(target, "wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), CLONE_FILE, reader.fileno())
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        else:
            return True
    target.unlink()
    return False


def copy_ranges(
    source: Path, target: Path, ranges: Sequence[tuple[int, int]], progress: Progress, shift: int = 0
) -> None:
    """Copy bytes to the same offsets in another file, or to offsets that are greater by `shift`.

    Args:
        source: the file to read.
        target: the existing file to write into.
        ranges: start and end offset of each range, the end exclusive.
        progress: called with the number of new bytes after every part.
        shift: what to add to an offset in the source to get that in the target.

    Raises:
        OSError: if the source is too short, or the target cannot be written.
    """
    in_kernel = hasattr(os, "copy_file_range")
    with open(source, "rb", buffering=0) as reader, open(target, "r+b", buffering=0) as writer:
        for start, end in ranges:
            while start < end:
                count, copied = min(end - start, COPIED_AT_ONCE), 0
                if in_kernel:
                    try:
                        copied = os.copy_file_range(reader.fileno(), writer.fileno(), count, start, start + shift)
                    except OSError as error:
                        if error.errno not in UNSUPPORTED:
                            raise
                        in_kernel = False
                if not in_kernel:
                    reader.seek(start)
                    writer.seek(start + shift)
                    copied = writer.write(reader.read(count))
                if not copied:
                    raise OSError(errno.EIO, f"{source} ended while it was copied: another program is writing to it")
                begin_writing(writer, start + shift, copied)
                start += copied
                progress(copied)


def begin_writing(writer: BinaryIO | IO[Any], start: int, num_bytes: int) -> None:
    """Start writing a file's new bytes to the disk, to shorten the final sync."""
    if hasattr(os, "posix_fadvise"):
        # drops the pages that are on the disk, and starts writing the others
        os.posix_fadvise(writer.fileno(), start, num_bytes, os.POSIX_FADV_DONTNEED)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "r+b", buffering=0) as file:
        os.fsync(file.fileno())


def write_all(writer: BinaryIO | IO[Any], part: memoryview) -> None:
    """Write all bytes of `part` to an unbuffered file, whose `write` may accept fewer bytes per call."""
    while part:
        part = part[writer.write(part) :]


def gaps(ranges: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a file of `size` bytes that are outside of `ranges`, as start and end offset."""
    start = 0
    for begin, end in sorted(ranges):
        if start < begin:
            yield start, begin
        start = end
    if start < size:
        yield start, size
