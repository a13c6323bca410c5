"""Copies a safetensors file with new bytes for some of its tensors, and verifies the copy."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .arithmetic import one_thread
from .copies import Progress, begin_writing, clone, copy_ranges, gaps, write_all
from .disk_space import check_room
from .safetensors_file import StoredTensor, read_header


def write_patched(
    source: Path,
    target: Path,
    new: Mapping[str, tuple[Iterator[memoryview], StoredTensor]],
    progress: Progress,
) -> dict[str, str]:
    """Write a copy of a safetensors file with new bytes for some of its tensors.

    Args:
        source: the file.
        target: the copy; it is on the disk on return.
        new: by tensor name: the new bytes in parts, and where the tensor is stored.
        progress: called with the number of new bytes.

    Returns:
        The sha256 of the new bytes, by tensor name.

    Raises:
        OSError: if the disk has no room, or reading the copy returns other bytes than were written.
    """
    source = source.resolve()  # a symbolic link in the Hub's cache
    size = source.stat().st_size
    ranges = [(tensor.start, tensor.start + tensor.num_bytes) for _, tensor in new.values()]
    untouched = list(gaps(ranges, size))
    cloned = clone(source, target)
    if not cloned:
        check_room(target.parent, size)
    else:
        progress(sum(end - begin for begin, end in untouched))
    digests = {}
    mode = "r+b" if cloned else "wb"
    with one_thread(), ThreadPoolExecutor(1) as beside, open(target, mode, buffering=0) as writer:
        writer.truncate(size)
        # the kernel copies while the new bytes are computed
        copying = None if cloned else beside.submit(copy_ranges, source, target, untouched, progress)
        for name, (parts, tensor) in new.items():
            digest = hashlib.sha256()
            writer.seek(tensor.start)
            for part in parts:
                digest.update(part)
                start = writer.tell()
                write_all(writer, part)
                begin_writing(writer, start, len(part))
                progress(len(part))
            digests[name] = digest.hexdigest()
        if copying is not None:
            copying.result()
        os.fsync(writer.fileno())
    shutil.copymode(source, target)
    _verify(source, target, digests)
    return digests


def _verify(source: Path, target: Path, digests: Mapping[str, str]) -> None:
    tensors, _ = read_header(target)
    original, _ = read_header(source)
    same = [(tensor.dtype, tensor.shape, tensor.start) for tensor in tensors.values()] == [
        (tensor.dtype, tensor.shape, tensor.start) for tensor in original.values()
    ]
    wrong = [name for name, digest in digests.items() if tensors[name].bytes_sha256() != digest]
    if wrong or not same or target.stat().st_size != source.stat().st_size:
        raise OSError(
            f"{target.name}: the disk returned other bytes than were written{' for ' + wrong[0] if wrong else ''}. "
            "Nothing was merged. Check the disk."
        )
