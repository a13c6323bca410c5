"""A folder of files for later runs that stays below a size: the files unused for longest are removed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def mark_used(file: Path) -> None:
    """Note that a file was used now."""
    with suppress(OSError):
        os.utime(file)


def remove_oldest(folder: Path, max_bytes: int, endings: tuple[str, ...] = (".json", ".safetensors")) -> None:
    """Remove the files unused for longest until the others take at most `max_bytes`; only files with these endings.

    A running process that has such a file open keeps its content.
    """
    known = []
    for file in folder.rglob("*"):
        with suppress(OSError):  # another process may remove it
            if file.suffix in endings and not file.name.startswith("."):
                known.append((file.stat().st_mtime, file.stat().st_size, file))
    left = sum(size for _, size, _ in known)
    for _, size, file in sorted(known):
        if left <= max_bytes:
            break
        with suppress(OSError):
            file.unlink()
        left -= size
