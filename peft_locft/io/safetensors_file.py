"""One safetensors file: reads and checks its header, reads its tensors in parts, writes a header."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from .untrusted_json import one_line, shortened, strict_json

# the dtypes of adapters and checkpoints, by their safetensors names
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# dtypes of weights that a delta can be added to
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
BUFFER_BYTES = 1 << 23
LENGTH_BYTES = 8
# safetensors' own limit
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
# of a tensor; above it, the offsets of some readers overflow
MAX_BYTES = 2**63 - 1
MAX_NAME_LENGTH = 500
# first bytes of a zip file (torch.save) and of pickles of protocols 2 to 5
PICKLE_BEGINNINGS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: the file.
        dtype: its dtype by safetensors name, such as `"BF16"`.
        shape: its shape.
        start: offset of its first byte in the file.
        num_bytes: size of its values, in row-major order.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def value_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    def read(self, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Return `count` values from flat index `start`, as a flat tensor of the stored dtype; default: all values.

        Raises:
            ValueError: if the file is too short.
        """
        values = torch.empty(self.num_values - start if count is None else count, dtype=DTYPES[self.dtype])
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start + start * self.value_bytes)
            _read_into(file, raw_bytes(values), self.file)
        return values

    def read_bytes(self) -> Iterator[memoryview]:
        """Yield the stored bytes in parts of up to 8 MiB. Each part overwrites the previous one."""
        buffer = memoryview(bytearray(min(self.num_bytes, BUFFER_BYTES)))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            for start in range(0, self.num_bytes, BUFFER_BYTES):
                part = buffer[: min(BUFFER_BYTES, self.num_bytes - start)]
                _read_into(file, part, self.file)
                yield part

    def bytes_sha256(self) -> str:
        """Return the sha256 of the stored bytes."""
        digest = hashlib.sha256()
        for part in self.read_bytes():
            digest.update(part)
        return digest.hexdigest()


def raw_bytes(values: torch.Tensor) -> memoryview:
    """Return the memory of a flat, contiguous tensor on the CPU, without a copy."""
    return values.view(torch.uint8).numpy().data


def _read_into(file: Any, buffer: memoryview, path: Path) -> None:
    filled = 0
    while filled < len(buffer):
        num_bytes = file.readinto(buffer[filled:])
        if not num_bytes:
            raise ValueError(
                f"{path} ended while it was read: another program is writing to it. Try again when it has finished."
            )
        filled += num_bytes


def read_header(
    path: Path, *, where: object = None, max_header_bytes: int = MAX_HEADER_BYTES
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, in the order of their bytes, and the file's metadata.

    `safe_open` checks that the tensors cover the file without gaps and overlaps, and that their bytes fit their
    shapes. This function adds checks for pickles, the length of the header and duplicate keys.

    Args:
        path: the file.
        where: name of the file for messages; `None`: the path.
        max_header_bytes: maximum length of the header; a longer one is not parsed.

    Raises:
        ValueError: if it is not a complete safetensors file, is a pickle, or its header has a duplicate key.
        OSError: if it cannot be opened.
    """
    where = path if where is None else where
    with open(path, "rb") as file:
        header = _header_bytes(file, where, max_header_bytes)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        reason = one_line(error).removeprefix("Error while deserializing header: ")
        raise refusal(
            where,
            f"a header that safetensors refuses ({reason})",
            "dtype, shape and data_offsets that fit the file exactly. The file is cut off or damaged",
        ) from None
    try:
        content = strict_json(header)
    except (ValueError, RecursionError) as error:
        raise refusal(where, f"a header of invalid JSON ({one_line(error)})", "valid JSON") from None
    metadata = content.pop("__metadata__", None) or {}
    tensors = {name: _stored(path, name, entry, LENGTH_BYTES + len(header), where) for name, entry in content.items()}
    return dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes))), metadata


def _header_bytes(file: BinaryIO, where: object, max_header_bytes: int) -> bytes:
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    beginning = file.read(LENGTH_BYTES)
    length = int.from_bytes(beginning, "little")
    if len(beginning) < LENGTH_BYTES or length > num_bytes - LENGTH_BYTES:
        # only here: a header of 640 bytes begins as a pickle does
        if beginning.startswith(PICKLE_BEGINNINGS):
            raise refusal(where, "a pickle, as torch.save writes it", "safetensors, since pickles can run code")
        expected = f"{LENGTH_BYTES} bytes with the header's length"
        if len(beginning) == LENGTH_BYTES:
            expected = f"a header of {length} bytes, as the first 8 bytes say"
        raise refusal(where, f"{num_bytes} bytes", f"{expected}. The file is cut off or has another format")
    if length > max_header_bytes:
        raise refusal(where, f"a header of {length} bytes", f"at most {max_header_bytes}")
    return file.read(length)


def _stored(path: Path, name: str, entry: dict[str, Any], data_start: int, where: object) -> StoredTensor:
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refusal(where, f"{shortened(name)}: {shortened(entry)}", "dtype, shape and data_offsets")
    begin, end = entry["data_offsets"]
    return StoredTensor(path, entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)


def check_tensors(tensors: Mapping[str, StoredTensor], where: object) -> None:
    """Check the names, dtypes and shapes of an untrusted file's tensors, in addition to `read_header`.

    Raises:
        ValueError: if a name is not a path of modules, or PyTorch cannot hold a tensor of that dtype and shape.
    """
    for name, tensor in tensors.items():
        check_tensor_name(name, where)
        shape = shortened(list(tensor.shape))
        if tensor.dtype not in DTYPES:
            raise refusal(where, f"{name}: dtype {shortened(tensor.dtype)}", f"one of {', '.join(DTYPES)}")
        if len(tensor.shape) > MAX_DIMENSIONS:
            raise refusal(where, f"{name}: shape {shape}", f"at most {MAX_DIMENSIONS} dimensions")
        # count a 0 as 1: it would hide other dimensions that are too large
        if math.prod(size or 1 for size in tensor.shape) * DTYPES[tensor.dtype].itemsize > MAX_BYTES:
            raise refusal(where, f"{name}: shape {shape}", f"at most {MAX_BYTES} bytes")


def check_tensor_name(name: str, where: object) -> None:
    """Raise a ValueError if a name is not module names joined by dots, as in PyTorch."""
    wrong = not name.isprintable() or any(letter in name for letter in "/\\") or "" in name.split(".")
    if wrong or len(name) > MAX_NAME_LENGTH:
        raise refusal(
            where,
            f"a tensor named {shortened(name)}",
            f"module names joined by dots, no slashes, up to {MAX_NAME_LENGTH} characters",
        )


def refusal(where: object, found: str, expected: str) -> ValueError:
    """Return the error that refuses a safetensors file."""
    return ValueError(
        f"{where} is not a readable safetensors file: found {found}; expected {expected}. Download or save it again."
    )


def write_header(file: Any, tensors: Mapping[str, StoredTensor], metadata: dict[str, str]) -> None:
    """Write the header of a safetensors file; the bytes of `tensors` must follow in that order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    file.write(len(data).to_bytes(8, "little") + data)
