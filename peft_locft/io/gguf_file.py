"""One GGUF file, as llama.cpp reads it: where its tensors are, their values, and copies with other bytes for some."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .copies import Progress, copy_ranges, write_all
from .disk_space import check_room
from .untrusted_json import one_line, shortened

if TYPE_CHECKING:
    from gguf import GGUFReader

INSTALL = "pip install 'peft-locft[gguf]'"
# of the types that torch has; every other one is quantized
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KV_COUNT_AT = 16  # bytes from the file's beginning
STRING = 8  # the type of a text in the metadata


def gguf_package() -> Any:
    """Return the package `gguf`.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"GGUF files need the package gguf: run `{INSTALL}`.") from error
    return gguf


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor in a GGUF file.

    Attributes:
        file: the file.
        name: its name, such as `"blk.20.ffn_down.weight"`.
        type: its type, such as `"Q4_1"`.
        shape: its shape as in PyTorch, the last dimension contiguous.
        start: offset of its first byte in the file.
        num_bytes: size of its values.
        slot: size up to the next tensor, with the padding.
        described_at: offset in the file of the number of its type. Its own offset follows there.
    """

    file: Path
    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    slot: int
    described_at: int

    @property
    def is_quantized(self) -> bool:
        return self.type not in FLOAT_TYPES

    def bytes(self, count: int | None = None) -> bytes:
        """Return its stored bytes, or `count` bytes from its start."""
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            content = file.read(self.num_bytes if count is None else count)
        return content

    def values(self) -> torch.Tensor:
        """Return its values, in its own dtype; a quantized tensor is dequantized to float32.

        Raises:
            ValueError: if the package `gguf` cannot dequantize its type.
        """
        return decode_values(self.bytes(), self.type, self.shape, f"{self.name} of {self.file}")


def gguf_version() -> str:
    from importlib.metadata import version

    return version("gguf")


def decode_values(content: bytes, type_name: str, shape: tuple[int, ...], where: str) -> torch.Tensor:
    """Return the values of bytes of a GGUF type: in its own dtype, or float32 if it is quantized.

    Args:
        content: the bytes.
        type_name: their type.
        shape: shape of the values.
        where: the tensor, for messages.

    Raises:
        ValueError: if the package `gguf` cannot dequantize the type.
    """
    if type_name in FLOAT_TYPES:
        return torch.frombuffer(bytearray(content), dtype=FLOAT_TYPES[type_name]).reshape(shape)
    import numpy as np

    gguf = gguf_package()
    try:
        packed = np.frombuffer(content, dtype=np.uint8).reshape(*shape[:-1], -1)
        values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[type_name])
    except NotImplementedError:
        raise ValueError(
            f"{where} has the type {type_name}, which the package gguf {gguf_version()} cannot dequantize. Take a "
            "file of another type, such as Q8_0 or F16, or update the package."
        ) from None
    return torch.from_numpy(values.astype(np.float32, copy=False)).reshape(shape)


def encode_values(values: torch.Tensor, type_name: str, where: str) -> bytes:
    """Return values as the bytes of a GGUF type.

    Args:
        values: any float dtype.
        type_name: a type of GGUF, such as `"F16"` or `"Q8_0"`.
        where: the tensor, for messages.

    Raises:
        ValueError: if no tensor can be written in that type, or not one of this shape, or F16 is too narrow.
    """
    if type_name in FLOAT_TYPES:
        narrow = values.to(FLOAT_TYPES[type_name]).contiguous()
        if not narrow.isfinite().all():
            raise ValueError(
                f"{where}: its edited values do not fit into {type_name}. Take another --tensor_type, F32."
            )
        return narrow.view(torch.uint8).numpy().tobytes()
    import numpy as np

    gguf = gguf_package()
    number = gguf.GGMLQuantizationType[type_name]
    block_size, _ = gguf.GGML_QUANT_SIZES[number]
    try:
        gguf.quants.quantize(np.zeros((1, block_size), dtype=np.float32), number)
    except NotImplementedError:
        raise ValueError(
            f"tensor_type={type_name!r}: the package gguf {gguf_version()} cannot write this type. Expected one that "
            "holds an edit (F16, BF16, F32, Q8_0), or a coarser one such as Q5_1."
        ) from None
    if values.shape[-1] % block_size:
        raise ValueError(
            f"{where}: its rows of {values.shape[-1]} values do not fit the blocks of {type_name} ({block_size} "
            "each). Take F16, BF16 or F32 as --tensor_type."
        )
    return bytes(gguf.quants.quantize(values.float().contiguous().numpy(), number).tobytes())


class GGUFFile:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        tensors: its tensors by name, in the order of their bytes.

    Raises:
        ValueError: if it is not a complete, little-endian GGUF file.
        OSError: if it cannot be opened.
        ModuleNotFoundError: if the package `gguf` is not installed.
    """

    path: Path
    tensors: dict[str, GGUFTensor]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._reader = _read(self.path)
        self._size = self.path.stat().st_size
        self.tensors = self._tensors()

    def value(self, key: str, default: Any = None) -> Any:
        """Return a value of the file's metadata."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    @property
    def architecture(self) -> str:
        return str(self.value("general.architecture", ""))

    @property
    def alignment(self) -> int:
        return int(self._reader.alignment)

    @cached_property
    def header(self) -> bytes:
        """All bytes before the first tensor."""
        with open(self.path, "rb") as file:
            return file.read(self._header_size)

    def _tensors(self) -> dict[str, GGUFTensor]:
        stored = sorted(self._reader.tensors, key=lambda tensor: int(tensor.data_offset))
        if not stored:
            raise _refusal(self.path, "no tensors", "the tensors of a model")
        ends = [int(tensor.data_offset) for tensor in stored[1:]] + [self._size]
        tensors = {}
        for tensor, end in zip(stored, ends, strict=True):
            start, num_bytes = int(tensor.data_offset), int(tensor.n_bytes)
            if start + num_bytes > end:
                found = f"{tensor.name} of {num_bytes} bytes at {start}, and the next tensor or the end at {end}"
                raise _refusal(self.path, found, "tensors that do not overlap. The file is cut off or damaged")
            described_at = int(tensor.field.offset) + sum(int(part.nbytes) for part in tensor.field.parts[:4])
            shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
            tensors[tensor.name] = GGUFTensor(
                self.path, tensor.name, tensor.tensor_type.name, shape, start, num_bytes, end - start, described_at
            )
        self._header_size = int(stored[0].data_offset)
        return tensors

    def header_with(self, changed: Mapping[str, tuple[str, int]], metadata: Mapping[str, str]) -> bytes:
        """Return the header of a copy of the file, up to its first tensor.

        Args:
            changed: by tensor name: its new type and its new size in bytes.
            metadata: texts to add, by key; they replace older ones.
        """
        content = bytearray(self.header)
        position = 0
        for name, tensor in self.tensors.items():
            type_name, num_bytes = changed.get(name, (tensor.type, tensor.num_bytes))
            number = int(gguf_package().GGMLQuantizationType[type_name])
            struct.pack_into("<IQ", content, tensor.described_at, number, position)
            position += self.slot(num_bytes) if name in changed else tensor.slot
        infos_at = min(int(tensor.field.offset) for tensor in self._reader.tensors)
        described_end = max(tensor.described_at for tensor in self.tensors.values()) + 12
        old = [field for key in metadata if (field := self._reader.fields.get(key)) is not None]
        kept = bytearray(content[:infos_at])
        for field in sorted(old, key=lambda field: -field.offset):
            del kept[field.offset : field.offset + sum(int(part.nbytes) for part in field.parts)]
        (count,) = struct.unpack_from("<Q", kept, KV_COUNT_AT)
        struct.pack_into("<Q", kept, KV_COUNT_AT, count - len(old) + len(metadata))
        added = b"".join(_string(key) + struct.pack("<I", STRING) + _string(text) for key, text in metadata.items())
        header = bytes(kept) + added + bytes(content[infos_at:described_end])
        return header + bytes(-len(header) % self.alignment)

    def slot(self, num_bytes: int) -> int:
        """Return the size of a tensor with its padding."""
        return num_bytes + -num_bytes % self.alignment


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _read(path: Path) -> GGUFReader:
    gguf = gguf_package()
    with open(path, "rb") as file:
        beginning = file.read(8)
    if beginning[:4] != b"GGUF":
        raise _refusal(path, f"the first bytes {shortened(beginning[:4])}", "b'GGUF'")
    if beginning[4:6] == b"\0\0":
        raise _refusal(path, "a big-endian file", "a little-endian one. Convert it with `gguf-convert-endian`")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        raise _refusal(path, one_line(error), "a complete file of version 2 or 3. It is cut off or damaged") from None
    if sys.byteorder != "little":
        raise _refusal(path, "a big-endian machine", "a little-endian one")
    return reader


def _refusal(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(f"{path} is not a readable GGUF file: found {found}; expected {expected}.")


def write_gguf(
    source: GGUFFile,
    target: Path,
    header: bytes,
    new: Mapping[str, Sequence[bytes]],
    progress: Progress,
) -> None:
    """Write a copy of a GGUF file with another header and other bytes for some of its tensors.

    Args:
        source: the file.
        target: the copy; it is on the disk on return.
        header: all bytes before the first tensor.
        new: by tensor name: its new bytes with its padding, in parts.
        progress: called with the number of new bytes.

    Raises:
        OSError: if the disk has no room, or reading the copy returns other bytes than were written.
    """
    parts = list(_parts(source, new))
    check_room(target.parent, len(header) + sum(size for size, _, _ in parts))
    with open(target, "wb", buffering=0) as writer:
        write_all(writer, memoryview(header))
        position = writer.tell()
        for size, start, content in parts:
            if content is None:
                writer.truncate(position + size)
                copy_ranges(source.path, target, [(start, start + size)], progress, shift=position - start)
            else:
                writer.seek(position)
                for each in content:
                    write_all(writer, memoryview(each))
                progress(size)
            position += size
        os.fsync(writer.fileno())
    shutil.copymode(source.path, target)
    _verify(target, header, parts)


def _parts(source: GGUFFile, new: Mapping[str, Sequence[bytes]]) -> Iterator[tuple[int, int, Sequence[bytes] | None]]:
    """Yield the parts of a copy after its header: size, and where it is in the source or its new content."""
    size = start = 0
    for name, tensor in source.tensors.items():
        if name not in new:
            start = start if size else tensor.start
            size += tensor.slot
            continue
        if size:
            yield size, start, None
        size = 0
        yield sum(len(each) for each in new[name]), tensor.start, new[name]
    if size:
        yield size, start, None


def _verify(target: Path, header: bytes, parts: Sequence[tuple[int, int, Sequence[bytes] | None]]) -> None:
    with open(target, "rb") as file:
        same = file.read(len(header)) == header
        for size, _, content in parts:
            if content is None:
                file.seek(size, os.SEEK_CUR)
            else:
                same &= all(file.read(len(each)) == each for each in content)
        same &= file.tell() == file.seek(0, os.SEEK_END)
    if not same:
        raise OSError(
            f"{target.name}: the disk returned other bytes than were written. Nothing was merged. Check the disk."
        )
