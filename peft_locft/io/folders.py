"""Atomic writes of a folder, and its lock between processes."""

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

from .disk_space import explained_disk_full
from .files import check_folder, current_umask

if sys.platform != "win32":
    import fcntl

STAGING_PREFIX = ".locft-"
# errors of file systems without locks
NO_LOCKS = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EBADF, errno.ENOLCK)
# without locks: a staging folder with no change for this time belongs to a dead process
ABANDONED_AFTER_SECONDS = 24 * 3600
# moving files into a folder takes moments; a lock held for longer has another purpose
PATIENCE_SECONDS = 30.0
TARGET_EXISTS = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock a folder for this process, and yield whether it got the lock.

    The lock ends with the process. Without such locks (Windows, some network file systems), every process gets True.
    """
    with _lock(folder) as acquired:
        yield acquired is not False


@contextmanager
def _lock(folder: Path) -> Iterator[bool | None]:
    """Lock a folder, and yield whether this process got the lock; `None` if the system has no locks."""
    descriptor, acquired = _acquire(folder)
    try:
        yield acquired
    finally:
        _release(descriptor)


def _acquire(folder: Path) -> tuple[int | None, bool | None]:
    """Return an open folder, and whether this process got its lock; `None` if the system has no locks."""
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
    """Yield an empty staging folder, and move its files into `folder` once all of them are on the disk.

    A kill at any moment leaves the old files or the new ones. Nothing changes if the body raises. The staging folder
    is locked: other processes that write to the same `folder` do not touch it, and remove only leftovers of dead
    processes.

    Args:
        folder: the target, created if it does not exist. Files in it that are not rewritten stay.
        what: name of the content for messages, such as `"an adapter"`.
        new: the target must not exist at the end, or must be empty.
        main_file: name of the file that makes a set of files complete. If one is replaced, the whole set is exchanged
            in one step where the system supports it. Otherwise this file is moved last.
        optional_files: names of other files of such a set. If a set is replaced, its old optional files are removed.

    Raises:
        NotADirectoryError: if `folder` or a parent is a file.
        ValueError: if `new`, and another process created the folder with files in it.
        DiskFullError: if the disk has no room.
    """
    # a link to a folder must stay a link, so exchange the folder itself
    folder = Path(folder).resolve()
    check_folder(folder, what)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    with explained_disk_full(folder), _staging(folder) as staging:
        yield staging
        if new:
            _sync(staging)
            if not _rename(staging, folder):
                raise ValueError(
                    f"{folder} already exists: another process created it during this run. Nothing was changed. "
                    "Remove it, or choose another folder."
                )
        else:
            for file in _files(staging):
                file.chmod(0o666 & ~current_umask())  # safetensors creates private files
            _sync(staging)
            _move_files(staging, folder, main_file, optional_files)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Yield a new, locked folder beside `folder`, or inside it if nothing can be moved in from outside."""
    inside = folder.is_dir() and (os.path.ismount(folder) or folder.stat().st_dev != folder.parent.stat().st_dev)
    while True:
        staging = _make_staging(folder, folder if inside else folder.parent)
        try:
            with _lock(staging) as acquired:
                # another process may have removed it as a leftover before it was locked
                if acquired is False or not staging.exists():
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
    """Remove the staging folders of dead processes in and beside `folder`. Live processes hold a lock."""
    # match mkdtemp's ending: "run-2" may be saved beside "run"
    staging = re.compile(re.escape(f"{STAGING_PREFIX}{folder.name}-") + "[a-z0-9_]{8}")
    for place in (folder, folder.parent):
        for leftover in list(place.iterdir()) if place.is_dir() else []:
            if staging.fullmatch(leftover.name):
                with suppress(FileNotFoundError), _lock(leftover) as acquired:
                    if acquired or (acquired is None and _is_abandoned(leftover)):
                        shutil.rmtree(leftover, ignore_errors=True)


def _is_abandoned(staging: Path) -> bool:
    newest = max(path.stat().st_mtime for path in [staging, *staging.rglob("*")])
    return time.time() - newest > ABANDONED_AFTER_SECONDS


def _rename(staging: Path, folder: Path) -> bool:
    """Rename a staging folder to `folder`. If that exists and is not empty, change nothing and return False."""
    staging.chmod(0o777 & ~current_umask())  # mkdtemp makes it private
    try:
        os.rename(staging, folder)  # replaces an empty folder, but no other
    except OSError as error:
        if error.errno not in TARGET_EXISTS:
            raise
        return False
    sync_folder(folder)
    sync_folder(folder.parent)
    return True


def _move_files(staging: Path, folder: Path, main_file: str | None, optional_files: Sequence[str]) -> None:
    if not folder.exists() and _rename(staging, folder):
        return
    sets = [file.parent.relative_to(staging) for file in _files(staging) if file.name == main_file]
    written = {file.relative_to(staging) for file in _files(staging)}
    stale = {place / name for place in sets for name in optional_files} - written
    replaces = any((folder / place / str(main_file)).exists() for place in sets)
    with _wait_for_lock(folder):
        if not replaces or not _exchange(staging, folder, written | stale):
            for name in stale:
                (folder / name).unlink(missing_ok=True)
            for name in sorted(written, key=lambda name: name.name == main_file):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _replace(staging / name, folder / name)
    sync_folder(folder)
    sync_folder(folder.parent)


@contextmanager
def _wait_for_lock(folder: Path) -> Iterator[None]:
    """Wait for the lock of a folder, for at most `PATIENCE_SECONDS`, and hold it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        descriptor, acquired = _acquire(folder)
        # another process may have exchanged the folder since it was opened
        is_current = descriptor is None or os.path.samestat(os.fstat(descriptor), folder.stat())
        if (acquired is not False and is_current) or time.monotonic() > end:
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
        if error.errno != errno.EXDEV:  # the target is on another mount
            raise
        staged = target.with_name(f"{STAGING_PREFIX}{target.name}")
        shutil.copy2(file, staged)
        os.replace(staged, target)


def _exchange(staging: Path, folder: Path, replaced: set[Path]) -> bool:
    """Swap `folder`, in one step, for a folder with the new files and hard links to all others.

    Weights and configuration are two files that must match. If one was replaced after the other, a kill in between
    would leave two files that do not match. Changes nothing and returns False if the swap is impossible (another file
    system, a mount point, or the working directory is inside the folder).
    """
    if Path.cwd().is_relative_to(folder) or staging.is_relative_to(folder):
        return False  # the swap would remove the working directory, or staging is inside
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
            # `complete` is now the old folder and is removed
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
            # Windows cannot sync a file that is open read-only
            with open(path, "rb" if os.name == "posix" else "r+b") as handle:
                os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's file names are on the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
