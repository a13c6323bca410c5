"""The header of a safetensors file that nobody vouches for, checked before anything is allocated by what it says."""

from __future__ import annotations

import json
import math
import os
import reprlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

# safetensors' names of the element types that adapters and checkpoints have
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
LENGTH_BYTES = 8
# a header is parsed whole, and one that was made for it takes 50 times its length while it is. An adapter has some
# hundreds of tensors, of 150 bytes each; this is 50,000 of them.
MAX_HEADER_BYTES = 8_000_000
MAX_DIMENSIONS = 8
# of bytes, and of values along a dimension; beyond it numbers wrap around in what reads the file after this
MAX_COUNT = 2**63 - 1
MAX_NAME_LENGTH = 500
# zip, in which torch.save packs its pickle; and what pickles of protocols 2 to 5 begin with
PICKLE_BEGINNINGS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in a safetensors file.

    Attributes:
        dtype: safetensors' name of its element type, one of `DTYPES`.
        shape: its shape.
        start: of its values in the file, in bytes.
        end: one after the last of them.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: BinaryIO, where: object) -> dict[str, TensorEntry]:
    """Read and check the header of an open safetensors file: every byte of the file belongs to exactly one tensor.

    Args:
        file: opened for reading bytes.
        where: its name, for messages.

    Returns:
        The tensors by name, in the order of their values in the file.

    Raises:
        ValueError: if the file is cut off, is a pickle, has a header that is too long, is not UTF-8 or not JSON, says
            something twice, or lies: an unknown dtype, a shape that does not fit its bytes, values that overlap, leave
            a hole or lie outside of the file, or a name that is no tensor's.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    beginning = file.read(LENGTH_BYTES)
    if beginning.startswith(PICKLE_BEGINNINGS):
        raise refusal(where, "a pickle, as torch.save writes it", "safetensors; nothing here unpickles")
    length = int.from_bytes(beginning, "little")
    if len(beginning) < LENGTH_BYTES or length > num_bytes - LENGTH_BYTES:
        expected = f"{LENGTH_BYTES} bytes with the header's length"
        if len(beginning) == LENGTH_BYTES:
            expected = f"a header of {length} bytes, as its beginning says"
        raise refusal(where, f"{num_bytes} bytes", f"{expected}. It is cut off, or something else")
    if length > MAX_HEADER_BYTES:
        raise refusal(where, f"a header of {length} bytes", f"{MAX_HEADER_BYTES} at most")
    content = _parsed(file.read(length), where)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refusal(where, f"__metadata__ {shortened(metadata)}", "names and texts")
    data_start = LENGTH_BYTES + length
    entries = {name: _entry(name, said, data_start, where) for name, said in content.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_covers(entries, data_start, num_bytes, where)
    return entries


class _Shortened(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if abs(x) < 10**60 else "a number of many digits"


def shortened(value: object) -> str:
    """Return a value as it may be shown: on one line, without control characters, and no longer than a line."""
    text = _Shortened().repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: object) -> str:
    """Return an error's message as it may be shown, where parts of it come from a file."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return text if len(text) <= 300 else f"{text[:297]}..."


def refusal(where: object, found: str, expected: str) -> ValueError:
    return ValueError(
        f"{where} is not a readable safetensors file: found {found}; expected {expected}. Download or save it again."
    )


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of a JSON object's pairs; of two with one name, other readers may take the other."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shortened(name)} is there twice")
        found[name] = value
    return found


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _parsed(header: bytes, where: object) -> dict[str, Any]:
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=unique_pairs, parse_constant=refuse_constant)
    except UnicodeDecodeError:
        raise refusal(where, "a header that is not UTF-8", "JSON in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise refusal(where, f"a header that is no JSON ({one_line(error)})", "JSON") from None
    if not isinstance(content, dict):
        raise refusal(where, f"a header that is {shortened(content)}", "a JSON object")
    return content


def _entry(name: str, said: object, data_start: int, where: object) -> TensorEntry:
    check_tensor_name(name, where)
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise refusal(where, f"{name}: {shortened(said)}", "dtype, shape and data_offsets")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refusal(where, f"{name}: dtype {shortened(dtype)}", f"one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise refusal(where, f"{name}: shape {shortened(shape)}", f"a list of up to {MAX_DIMENSIONS} sizes from 0 up")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refusal(where, f"{name}: data_offsets {shortened(offsets)}", "where its bytes begin and end")
    # a dimension of nothing hides others that are too large for any reader
    if math.prod(size or 1 for size in shape) * DTYPES[dtype].itemsize > MAX_COUNT:
        raise refusal(where, f"{name}: shape {shortened(shape)}", f"{MAX_COUNT} bytes at most")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != offsets[1] - offsets[0]:
        raise refusal(
            where,
            f"{name}: {shortened(offsets[1] - offsets[0])} bytes",
            f"{shortened(needed)} for {dtype} of shape {shortened(shape)}",
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def check_tensor_name(name: str, where: object) -> None:
    """Raise a ValueError if a name is not made of module names with dots between, as PyTorch's are."""
    wrong = not name.isprintable() or any(letter in name for letter in "/\\") or "" in name.split(".")
    if wrong or len(name) > MAX_NAME_LENGTH:
        raise refusal(
            where,
            f"a tensor named {shortened(name)}",
            f"module names with dots between, no slashes, up to {MAX_NAME_LENGTH} letters",
        )


def _are_counts(value: object) -> bool:
    # a bool is an int, and is none here
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_COUNT for item in value)


def _check_covers(entries: dict[str, TensorEntry], data_start: int, num_bytes: int, where: object) -> None:
    position = data_start
    for name, entry in entries.items():
        if entry.start != position:
            what = "values that overlap those before" if entry.start < position else "a hole before its values"
            raise refusal(where, f"{name}: {what}", "every byte to belong to one tensor")
        position = entry.end
    if position != num_bytes:
        what = "is cut off" if position > num_bytes else "has bytes that belong to no tensor"
        raise refusal(where, f"{num_bytes} bytes", f"{shortened(position)}: it {what}")
