"""The checkpoint of a model in safetensors: an index that says which file holds which tensor. Builds no model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .safetensors_file import StoredTensor, read_header

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
# weights in other forms: an edit of the safetensors files does not reach them
OTHER_WEIGHTS = ("*.bin", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "*.safetensors")


class Checkpoint:
    """The index of a model's safetensors files, as transformers finds them: one file, or several with an index.

    Of a model on the Hub, each file is downloaded when it is first needed.

    Args:
        model: a local folder, or the id of a model on the Hub.
        revision: branch, tag or commit on the Hub.

    Attributes:
        name: the model as it was given, for messages.
        folder: the model's folder; of a model on the Hub, its snapshot in the cache.
        files: name of the file that holds a tensor, by the tensor's name.
        config: content of `config.json`; empty where there is none.

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
        # in transformers' order
        single, index = self._file(WEIGHTS_NAME), None
        if single is None:
            index = self._file(INDEX_NAME)
        found = single or index
        if found is None:
            raise ValueError(
                f"{self.name} has neither {WEIGHTS_NAME} nor {INDEX_NAME}: expected a model in safetensors. "
                "Convert one in another format with "
                "AutoModelForCausalLM.from_pretrained(folder, dtype='auto').save_pretrained(new_folder)."
            )
        self.folder = found.parent
        if self.folder.parent.name == "snapshots" and not self._is_local:
            self._revision = self.folder.name  # all files of one commit
        self.files = dict.fromkeys(self._header(WEIGHTS_NAME), WEIGHTS_NAME) if index is None else _read_index(index)
        config = self._file(CONFIG_NAME)
        try:
            self.config = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
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
        """Return where a tensor is stored.

        Raises:
            ValueError: if its file is missing or broken, or does not hold it although the index says so.
        """
        shard = self.files[name]
        header = self._header(shard)
        if name not in header:
            raise ValueError(
                f"{self.folder / INDEX_NAME} says that {name} is in {shard}, which does not hold it. Download or save "
                "the model again."
            )
        return header[name]

    def check_shards(self) -> None:
        """Raise a ValueError if a file that the index names is missing."""
        missing = [shard for shard in self.shards if self._file(shard) is None]
        if missing:
            raise self._lacks(*missing)

    def _header(self, shard: str) -> dict[str, StoredTensor]:
        if shard not in self._headers:
            file = self._file(shard)
            if file is None:
                raise self._lacks(shard)
            self._headers[shard], _ = read_header(file)
        return self._headers[shard]

    def _lacks(self, *missing: str) -> ValueError:
        others = " and others" if len(missing) > 3 else ""
        return ValueError(
            f"{self.name} lacks {', '.join(missing[:3])}{others}, of {len(self.shards)} files that its index names. "
            "Download the rest first."
        )

    def _file(self, name: str) -> Path | None:
        if self._is_local:
            file = Path(self.name) / name
            return file if file.is_file() else None
        from transformers.utils import cached_file

        found = cached_file(self.name, name, revision=self._revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)


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
    """Return a local folder, or that of a Hub repository in the cache, with all of its files downloaded.

    Args:
        name: a local folder, or the id of a repository on the Hub.
        revision: branch, tag or commit of the repository.
        only: patterns of the files to download; `None` is all but weights in other formats than safetensors.

    Raises:
        ValueError: if it is neither, or if a revision is given with a folder.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} has no meaning for a local folder ({name}).")
        return Path(name).resolve()
    from huggingface_hub import snapshot_download

    ignored = [pattern for pattern in OTHER_WEIGHTS if pattern != "*.safetensors"]
    try:
        return Path(
            snapshot_download(str(name), revision=revision, allow_patterns=only, ignore_patterns=ignored)
        ).resolve()
    except (ValueError, OSError) as error:  # huggingface_hub's own errors are of these kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name} is not a folder here, and was not found on the Hub or in its cache: {reason}"
        ) from None
