"""The index of a safetensors checkpoint: which file holds which tensor. Loads no model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .safetensors_file import StoredTensor, read_header

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
# weights in other formats: a merge does not edit them
OTHER_WEIGHTS = ("*.bin", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "*.safetensors")


class Checkpoint:
    """The index of a model's safetensors files: one file, or several with an index, as transformers reads them.

    If the model is on the Hub, each file is downloaded when it is first needed.

    Args:
        model: a local folder, or the id of a model on the Hub.
        revision: branch, tag or commit on the Hub.

    Attributes:
        name: the given `model`, for messages.
        folder: the model's folder, or its snapshot in the Hub's cache.
        files: name of the file that holds each tensor, by tensor name.
        config: content of `config.json`; empty if there is no such file.

    Raises:
        ValueError: if the model has no safetensors checkpoint, or its index or configuration is broken.
        OSError: if the Hub cannot be reached, or has no such model.
    """

    name: str
    folder: Path
    files: dict[str, str]
    config: dict[str, Any]

    def __init__(self, model: str | os.PathLike[str], revision: str | None = None) -> None:
        self.name = str(model)
        self._revision = revision
        self._is_local = Path(model).is_dir()
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        # transformers looks for them in this order
        single, index = self._file(WEIGHTS_NAME), None
        if single is None:
            index = self._file(INDEX_NAME)
        entry_file = single or index
        if entry_file is None and (Path(model) / "adapter_config.json").is_file():
            raise ValueError(f"{self.name} is an adapter: expected a model. The base comes first, then its adapters.")
        if entry_file is None:
            raise ValueError(
                f"{self.name} has neither {WEIGHTS_NAME} nor {INDEX_NAME}: expected a model in safetensors. "
                "Convert a model in another format with "
                "AutoModelForCausalLM.from_pretrained(folder, dtype='auto').save_pretrained(new_folder)."
            )
        self.folder = entry_file.parent
        if self.folder.parent.name == "snapshots" and not self._is_local:
            self._revision = self.folder.name  # read all files from one commit
        self.files = dict.fromkeys(self._header(WEIGHTS_NAME), WEIGHTS_NAME) if index is None else _read_index(index)
        config = self._file(CONFIG_NAME)
        try:
            self.config = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config} is not readable JSON ({error}). Download or save it again.") from None

    @property
    def shards(self) -> list[str]:
        """Names of the files that hold tensors, sorted."""
        return sorted(set(self.files.values()))

    @property
    def has_index(self) -> bool:
        return self.shards != [WEIGHTS_NAME]

    def tensor(self, name: str) -> StoredTensor:
        """Return where a tensor is stored.

        Raises:
            ValueError: if its file is missing or broken, or lacks the tensor.
        """
        shard = self.files[name]
        header = self._header(shard)
        if name not in header:
            raise ValueError(
                f"{self.folder / INDEX_NAME} says that {name} is in {shard}, but that file does not hold it. Download "
                "or save the model again."
            )
        return header[name]

    def check_shards(self) -> None:
        """Raise a ValueError if a file that the index names is missing."""
        missing = [shard for shard in self.shards if self._file(shard) is None]
        if missing:
            raise self._missing_shards(*missing)

    def _header(self, shard: str) -> dict[str, StoredTensor]:
        if shard not in self._headers:
            file = self._file(shard)
            if file is None:
                raise self._missing_shards(shard)
            self._headers[shard], _ = read_header(file)
        return self._headers[shard]

    def _missing_shards(self, *missing: str) -> ValueError:
        others = " and others" if len(missing) > 3 else ""
        return ValueError(
            f"{self.name} lacks {', '.join(missing[:3])}{others}: its index names {len(self.shards)} files. Download "
            "the missing files."
        )

    def _file(self, name: str) -> Path | None:
        if self._is_local:
            file = Path(self.name) / name
            return file if file.is_file() else None
        from transformers.utils import cached_file

        cached = cached_file(self.name, name, revision=self._revision, _raise_exceptions_for_missing_entries=False)
        return None if cached is None else Path(cached)


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = {str(name): str(shard) for name, shard in json.loads(path.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not an index of shards ({type(error).__name__}: {error}). Download or save it again."
        ) from None
    for shard in files.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{path} names {shard!r}: expected a safetensors file in the same folder. Download it again."
            )
    return files


def local_folder(name: str | os.PathLike[str], revision: str | None = None, only: list[str] | None = None) -> Path:
    """Return a local folder, or a Hub repository's folder in the cache, with its files downloaded.

    Args:
        name: a local folder, or the id of a repository on the Hub.
        revision: branch, tag or commit of the repository.
        only: patterns of the files to download; `None`: all except weights in other formats than safetensors.

    Raises:
        ValueError: if `name` is neither, or if a revision is given for a folder.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r}: {name} is a local folder, which has no revisions. Leave out the revision."
            )
        return Path(name).resolve()
    from huggingface_hub import snapshot_download

    ignored = [pattern for pattern in OTHER_WEIGHTS if pattern != "*.safetensors"]
    try:
        return Path(
            snapshot_download(str(name), revision=revision, allow_patterns=only, ignore_patterns=ignored)
        ).resolve()
    except (ValueError, OSError) as error:  # huggingface_hub's own errors are subclasses
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name} is not a local folder, and was not found on the Hub or in its cache: {reason}"
        ) from None
