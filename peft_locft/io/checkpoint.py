"""A checkpoint of safetensors files: which tensor lies where, read a piece at a time. Builds no model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# the dtypes that a delta can be added to, as safetensors names them
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BUFFER_BYTES = 1 << 23
# weights in other forms: an edit of the safetensors files does not reach them
OTHER_WEIGHTS = ("*.bin", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "*.safetensors")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file.

    Attributes:
        file: the file.
        dtype: as safetensors names it: `"BF16"`.
        shape: its sizes.
        start: of its first byte, counted from the beginning of the file.
        num_bytes: how many it has; they are one after the other, in row-major order.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def num_values(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def value_bytes(self) -> int:
        return FLOAT_DTYPES[self.dtype].itemsize

    def read(self, start: int, count: int) -> torch.Tensor:
        """Return `count` of its values from the flat index `start` on, as a flat tensor of its own dtype.

        Raises:
            ValueError: if the file ends before them.
        """
        values = torch.empty(count, dtype=FLOAT_DTYPES[self.dtype])
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start + start * self.value_bytes)
            _read_into(file, raw_bytes(values), self.file)
        return values

    def read_bytes(self) -> Iterator[memoryview]:
        """Yield its bytes as they are, in parts of some megabytes. The next part takes the place of the one before."""
        buffer = memoryview(bytearray(min(self.num_bytes, BUFFER_BYTES)))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            for start in range(0, self.num_bytes, BUFFER_BYTES):
                part = buffer[: min(BUFFER_BYTES, self.num_bytes - start)]
                _read_into(file, part, self.file)
                yield part

    def bytes_sha256(self) -> str:
        """Return the sha256 of its bytes as they are."""
        digest = hashlib.sha256()
        for part in self.read_bytes():
            digest.update(part)
        return digest.hexdigest()


def raw_bytes(values: torch.Tensor) -> memoryview:
    """Return the bytes of a flat, contiguous tensor on the CPU, not a copy of them."""
    return values.view(torch.uint8).numpy().data


def _read_into(file: Any, buffer: memoryview, path: Path) -> None:
    filled = 0
    while filled < len(buffer):
        num_bytes = file.readinto(buffer[filled:])
        if not num_bytes:
            raise ValueError(f"{path} ended while it was read: something else is writing to it.")
        filled += num_bytes


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return where every tensor of a safetensors file lies, and the file's own metadata.

    Raises:
        ValueError: if it is not a whole safetensors file.
    """
    try:
        # checks that the tensors fill the file without gaps, and that their sizes agree with their shapes
        with safe_open(path, framework="pt"), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}). Download or save it again.") from None
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors, metadata


def write_header(file: Any, tensors: Mapping[str, StoredTensor], metadata: dict[str, str]) -> None:
    """Write the beginning of a safetensors file that will hold the bytes of `tensors`, in that order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    file.write(len(data).to_bytes(8, "little") + data)


class Checkpoint:
    """The safetensors files of a model's folder, as transformers finds them: one file, or an index and its shards.

    Args:
        folder: a local folder.

    Attributes:
        files: the name of the file that holds it, by the tensor's name.
        config: the content of `config.json`; empty where there is none.

    Raises:
        ValueError: if the folder has no safetensors checkpoint, if its index or configuration is broken, or if files
            are missing.
    """

    folder: Path
    files: dict[str, str]
    config: dict[str, Any]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        # in the order in which transformers looks for them
        if (folder / WEIGHTS_NAME).is_file():
            self.files = dict.fromkeys(self._header(WEIGHTS_NAME), WEIGHTS_NAME)
        elif (folder / INDEX_NAME).is_file():
            self.files = self._read_index()
        else:
            raise ValueError(
                f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}, so there is no checkpoint to merge into. Give "
                "the folder of a model. One in another format is converted with "
                "AutoModelForCausalLM.from_pretrained(folder, dtype='auto').save_pretrained(new_folder)."
            )
        config = folder / "config.json"
        try:
            self.config = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{config} is not readable ({error}). Download or save it again.") from None

    @property
    def shards(self) -> list[str]:
        """Names of the files that hold tensors, sorted."""
        return sorted(set(self.files.values()))

    @property
    def has_index(self) -> bool:
        return self.shards != [WEIGHTS_NAME]

    def tensor(self, name: str) -> StoredTensor:
        """Return where a tensor lies.

        Raises:
            ValueError: if its file is broken, or does not hold it although the index says so.
        """
        shard = self.files[name]
        header = self._header(shard)
        if name not in header:
            raise ValueError(
                f"{self.folder / INDEX_NAME} says that {name} is in {shard}, which does not hold it. Download or save "
                "the model again."
            )
        return header[name]

    def _header(self, shard: str) -> dict[str, StoredTensor]:
        if shard not in self._headers:
            self._headers[shard], _ = read_header(self.folder / shard)
        return self._headers[shard]

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX_NAME
        try:
            files = {str(name): str(shard) for name, shard in json.loads(path.read_bytes())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not an index of shards ({type(error).__name__}: {error}). Download or save it again."
            ) from None
        shards = sorted(set(files.values()))
        climbing = [shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")]
        if climbing:
            raise ValueError(
                f"{path} names {climbing[0]!r}: expected a safetensors file in the same folder. Download it again."
            )
        missing = [shard for shard in shards if not (self.folder / shard).is_file()]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}, of "
                f"{len(shards)} files that its index names. Download the rest first."
            )
        return files


def local_folder(name: str | os.PathLike[str], revision: str | None = None, only: list[str] | None = None) -> Path:
    """Return a folder as it is, or that of a Hub repository in huggingface_hub's cache, downloading what is missing.

    Args:
        name: a local folder, or the id of a repository on the Hub.
        revision: branch, tag or commit of the repository.
        only: names of the files wanted; `None` means all but weights in other formats than safetensors.

    Raises:
        ValueError: if it is neither, or if a revision is given with a folder.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} has no meaning for a local folder ({name}).")
        return Path(name).resolve()
    ignored = [pattern for pattern in OTHER_WEIGHTS if pattern != "*.safetensors"]
    try:
        return Path(
            snapshot_download(str(name), revision=revision, allow_patterns=only, ignore_patterns=ignored)
        ).resolve()
    except (ValueError, OSError) as error:  # huggingface_hub's own errors are of these kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} is no folder here, and was not found on the Hub or in its cache: {reason}") from None
