"""A folder of files, written aside and put in place at once; and the lock that keeps others off it meanwhile."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .files import check_folder, current_umask

if sys.platform != "win32":
    import fcntl

STAGING_PREFIX = ".locft-"
# on some file systems there are none
NO_LOCKS = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EBADF, errno.ENOLCK)
# without locks, a staging folder that nothing has changed for so long belongs to a process that is gone
ABANDONED_AFTER_SECONDS = 24 * 3600
# to put files into a folder takes moments; a lock that is held longer is held for other work
PATIENCE_SECONDS = 30.0
APPEARED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep off a folder other processes that ask for its lock, and yield whether this one has it.

    The lock dies with the process. Where the system has no such locks (Windows, some network file systems), every
    process has it.
    """
    with _lock(folder) as has_it:
        yield has_it is not False


@contextmanager
def _lock(folder: Path) -> Iterator[bool | None]:
    """Yield whether this process has the lock of a folder; `None` where there are no locks."""
    descriptor, has_it = _acquire(folder)
    try:
        yield has_it
    finally:
        _release(descriptor)


def _acquire(folder: Path) -> tuple[int | None, bool | None]:
    """Return an open folder, and whether this process has its lock; `None` where there are no locks."""
    if sys.platform == "win32":
        return None, None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return descriptor, False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return descriptor, None
        os.close(descriptor)
        raise
    return descriptor, True


def _release(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def atomic_folder(
    folder: str | os.PathLike[str],
    *,
    what: str = "files",
    new: bool = False,
    main_file: str | None = None,
    optional_files: Sequence[str] = (),
) -> Iterator[Path]:
    """Yield an empty folder to write to, and put its files into `folder` when all of them are written and on the disk.

    A kill at any moment leaves the old files or the new ones. Nothing is changed if the body raises. The folder to
    write to is locked: another process that writes to the same `folder` meanwhile leaves it alone, and removes only
    what dead processes left.

    Args:
        folder: made if it is not there. Files in it that are not written anew stay.
        what: what is saved, for messages, such as `"an adapter"`.
        new: the folder must not be there at the end, or be empty.
        main_file: name of the file that makes a set of files complete. Where one is replaced, the set is exchanged in
            one step if the system can do it; else, or where there was none, this file comes last.
        optional_files: names of files that belong to such a set; those of a replaced set that are not written anew are
            removed.

    Raises:
        NotADirectoryError: if `folder` or one above it is a file.
        ValueError: if it is to be `new`, and another process has put files there meanwhile.
    """
    # a link to a folder must stay one, and what is exchanged below is the folder
    folder = Path(folder).resolve()
    check_folder(folder, what)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    with _staging(folder) as staging:
        yield staging
        if new:
            _sync(staging)
            if not _rename(staging, folder):
                raise ValueError(
                    f"{folder} is there now: another process has written to it meanwhile. Nothing was changed. Remove "
                    "it, or choose another place."
                )
        else:
            for file in _files(staging):
                file.chmod(0o666 & ~current_umask())  # safetensors makes its files private
            _sync(staging)
            _put_in_place(staging, folder, main_file, optional_files)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Yield a new, locked folder beside `folder`, or in it where that is the only place to write to."""
    inside = folder.is_dir() and (os.path.ismount(folder) or folder.stat().st_dev != folder.parent.stat().st_dev)
    while True:
        staging = _make_staging(folder, folder if inside else folder.parent)
        try:
            with _lock(staging) as has_it:
                # before the lock, another process could take it for a leftover
                if has_it is False or not staging.exists():
                    continue
                yield staging
                return
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _make_staging(folder: Path, place: Path) -> Path:
    prefix = f"{STAGING_PREFIX}{folder.name}-"
    try:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    except OSError:
        if place == folder or not folder.is_dir():
            raise
        return Path(tempfile.mkdtemp(prefix=prefix, dir=folder))


def _remove_leftovers(folder: Path) -> None:
    """Remove what dead processes left in `folder` and beside it. Those at work hold a lock."""
    # the ending as mkdtemp makes it: "run-2" may be written beside "run"
    staging = re.compile(re.escape(f"{STAGING_PREFIX}{folder.name}-") + "[a-z0-9_]{8}")
    for place in (folder, folder.parent):
        for leftover in list(place.iterdir()) if place.is_dir() else []:
            if staging.fullmatch(leftover.name):
                with suppress(FileNotFoundError), _lock(leftover) as has_it:
                    if has_it or (has_it is None and _is_abandoned(leftover)):
                        shutil.rmtree(leftover, ignore_errors=True)


def _is_abandoned(staging: Path) -> bool:
    newest = max(path.stat().st_mtime for path in [staging, *staging.rglob("*")])
    return time.time() - newest > ABANDONED_AFTER_SECONDS


def _rename(staging: Path, folder: Path) -> bool:
    """Make a staging folder the folder; return False, with nothing changed, if that is there and not empty."""
    staging.chmod(0o777 & ~current_umask())  # mkdtemp makes it private
    try:
        os.rename(staging, folder)  # onto an empty folder too, but on no other
    except OSError as error:
        if error.errno not in APPEARED:
            raise
        return False
    sync_folder(folder)
    sync_folder(folder.parent)
    return True


def _put_in_place(staging: Path, folder: Path, main_file: str | None, optional_files: Sequence[str]) -> None:
    if not folder.exists() and _rename(staging, folder):
        return
    sets = [file.parent.relative_to(staging) for file in _files(staging) if file.name == main_file]
    written = {file.relative_to(staging) for file in _files(staging)}
    stale = {place / name for place in sets for name in optional_files} - written
    replaces = any((folder / place / str(main_file)).exists() for place in sets)
    with _alone_in(folder):
        if not replaces or not _exchange(staging, folder, written | stale):
            for name in stale:
                (folder / name).unlink(missing_ok=True)
            for name in sorted(written, key=lambda name: name.name == main_file):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _replace(staging / name, folder / name)
    sync_folder(folder)
    sync_folder(folder.parent)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait while another process puts files into a folder, and keep others waiting."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        descriptor, has_it = _acquire(folder)
        # the folder at this place may have been exchanged since it was opened
        is_current = descriptor is None or os.path.samestat(os.fstat(descriptor), folder.stat())
        if (has_it is not False and is_current) or time.monotonic() > end:
            break
        _release(descriptor)
        time.sleep(0.02)
    try:
        yield
    finally:
        _release(descriptor)


def _replace(file: Path, target: Path) -> None:
    try:
        os.replace(file, target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # a mount of the same file system
            raise
        staged = target.with_name(f"{STAGING_PREFIX}{target.name}")
        shutil.copy2(file, staged)
        os.replace(staged, target)


def _exchange(staging: Path, folder: Path, replaced: set[Path]) -> bool:
    """Swap the whole folder, in one step, for one with the new files and hard links to all others.

    Weights and configuration are two files, and an adapter that moved to another location needs both: replacing one
    after the other would have a moment at which they do not belong together. Returns False, with nothing changed,
    where the system cannot do it (another file system, a mount point, the process works inside the folder).
    """
    if Path.cwd().is_relative_to(folder) or staging.is_relative_to(folder):
        return False  # the working directory would be gone; or the folder alone can be written to
    ignored = {str(folder / name) for name in replaced}

    def ignore(directory: str, names: list[str]) -> list[str]:
        return [name for name in names if os.path.join(directory, name) in ignored]

    try:
        with _staging(folder) as complete:
            shutil.copytree(folder, complete, copy_function=os.link, symlinks=True, dirs_exist_ok=True, ignore=ignore)
            shutil.copytree(staging, complete, copy_function=os.link, dirs_exist_ok=True)
            shutil.copystat(folder, complete)
            sync_folder(complete)
            _swap(complete, folder)
            # from here on it is the old folder
    except (OSError, shutil.Error):
        return False
    return True


def _swap(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        current_folder, exchange = -100, 2
        failed = libc.renameat2(current_folder, names[0], current_folder, names[1], exchange)
    elif sys.platform == "darwin":
        failed = libc.renamex_np(*names, 2)
    else:
        raise OSError(errno.ENOSYS, "no atomic exchange of folders on this system")
    if failed:
        raise OSError(ctypes.get_errno(), f"exchanging {one} and {other}")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        else:
            # Windows syncs no file that is open for reading alone
            with open(path, "rb" if os.name == "posix" else "r+b") as handle:
                os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
