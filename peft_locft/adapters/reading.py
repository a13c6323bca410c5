"""Reads untrusted adapter folders: everything is checked before use, and nothing is unpickled."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from ..io.json_checks import is_sha256
from ..io.safetensors_file import DTYPES, StoredTensor, check_tensors, read_header
from ..io.untrusted_json import json_object, one_line, shortened
from .claims import check_config, delta_names
from .provenance import PROVENANCE_NAME, Provenance

# PEFT's names, repeated here to read an adapter without importing PEFT
CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
# enough for 50,000 tensors of 150 bytes each; an adapter has some hundreds
MAX_HEADER_BYTES = 8_000_000
MAX_CONFIG_BYTES = 4_000_000
MAX_PROVENANCE_BYTES = 16_000_000  # depth-first runs record one loss per edit
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
# files of transformers' Trainer beside an adapter; never opened here
TRAINER_FILES = ("optimizer.bin", "optimizer.pt", "scaler.pt", "scheduler.pt", "training_args.bin")
FINITE_CHECK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """A checked adapter folder. Values are read and checked one tensor at a time.

    Attributes:
        folder: the folder.
        config: its configuration: the fields of `LocFTConfig` for LocFT, PEFT's configuration for other methods.
        tensors: the tensors of its weights file, by name.
        deltas: name of every delta in the weights file, by the name of its base parameter; empty for other methods.
        num_bytes: size of the weights file.
        provenance: its provenance; empty if it has no `locft_provenance.json`.
    """

    folder: Path
    config: Any
    tensors: dict[str, StoredTensor]
    deltas: dict[str, str]
    num_bytes: int
    provenance: Provenance
    _identity: tuple[int, ...]

    @property
    def weights_file(self) -> Path:
        return self.folder / SAFETENSORS_WEIGHTS_NAME

    @property
    def delta_tensors(self) -> dict[str, StoredTensor]:
        """Where every delta is stored, by the name of its base parameter."""
        return {parameter: self.tensors[name] for parameter, name in self.deltas.items()}

    def refuse_all_but_deltas(self) -> None:
        """Raise a ValueError if the adapter holds other tensors than deltas."""
        others = sorted(self.tensors.keys() - self.deltas.values())
        if others:
            raise ValueError(
                f"{self.weights_file} holds {', '.join(others[:3])}; expected only deltas. Exports and merges on disk "
                "do not support modules_to_save and trainable_token_indices. Merge this adapter in memory: "
                "AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(out)."
            )

    def open_weights(self) -> BufferedReader:
        """Open the weights file.

        Raises:
            ValueError: if it was replaced or changed since the check.
        """
        file = open_inside(self.folder, SAFETENSORS_WEIGHTS_NAME)
        if _identity(file) != self._identity:
            file.close()
            raise ValueError(
                f"{self.weights_file} has changed since it was checked. Check it again when no program writes to it."
            )
        return file

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, with the dtype and shape from `tensors`.

        Args:
            name: its name in the weights file.

        Raises:
            ValueError: if the file has changed since the check, or a value is NaN or infinite.
        """
        stored = self.tensors[name]
        # not memory-mapped: if another program truncates a mapped file, this process is killed
        content = bytearray(stored.num_bytes)
        with self.open_weights() as file:
            file.seek(stored.start)
            if file.readinto(content) != len(content):
                raise ValueError(f"{self.weights_file} ended early. Check it again when no program writes to it.")
        dtype = DTYPES[stored.dtype]
        tensor = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        if not _is_finite(tensor):
            raise ValueError(
                f"{self.weights_file}: {name} holds NaN or infinite values, so the model would produce noise. "
                "Download the adapter again. If that does not help, train it again at a lower learning rate."
            )
        return tensor.reshape(stored.shape)

    def read_delta(self, parameter: str) -> torch.Tensor:
        """Return the delta of one base parameter, without the adapter's scale; see `read`."""
        return self.read(self.deltas[parameter])


def check_adapter(folder: str | os.PathLike[str], *, method: str | None = "LOCFT") -> CheckedAdapter:
    """Check an untrusted adapter folder, and return it. Tensor values are not read.

    A file may be a symbolic link inside the folder. In a snapshot of a Hub cache, it may also link to a blob of the
    same repository. The base model is not read, and no code from the folder is run.

    Args:
        folder: a local adapter folder.
        method: the expected PEFT method; `None`: any.

    Raises:
        ValueError: if a file is missing, too large, not a regular file, a link out of the folder, or a pickle; if the
            header of the weights is invalid or does not fit the file; if the configuration or the provenance is not
            JSON, has a field of a wrong type, or is of another method; if the configuration does not name the module
            of a tensor. The message says where, what was found, what was expected and what to do.

    Example:
        >>> adapter = check_adapter("out")
        >>> adapter.deltas
        {'model.layers.22.mlp.down_proj.weight': 'base_model.model.model.layers.22.mlp.down_proj.locft_delta.weight'}
        >>> adapter.read_delta("model.layers.22.mlp.down_proj.weight").shape
        torch.Size([4096, 14336])
    """
    folder = Path(folder)
    _check_complete(folder)
    _check_no_pickle(folder)
    settings = read_json(folder, CONFIG_NAME, MAX_CONFIG_BYTES)
    config = check_config(settings, folder / CONFIG_NAME, method)
    provenance = read_provenance(folder)
    with open_inside(folder, SAFETENSORS_WEIGHTS_NAME) as file:
        num_bytes, identity = file.seek(0, os.SEEK_END), _identity(file)
        # resolve the link once: later changes of the link have no effect
        weights = (folder / SAFETENSORS_WEIGHTS_NAME).resolve()
        where = folder / SAFETENSORS_WEIGHTS_NAME
        tensors, _ = read_header(weights, where=where, max_header_bytes=MAX_HEADER_BYTES)
        check_tensors(tensors, where)
    deltas = delta_names(tensors, config, folder / SAFETENSORS_WEIGHTS_NAME) if config.peft_type == "LOCFT" else {}
    return CheckedAdapter(folder, config, tensors, deltas, num_bytes, provenance, identity)


def read_adapter(folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Return the deltas of a LocFT adapter, by base parameter name, without the adapter's scale.

    All deltas are loaded at once. To read one at a time, use `check_adapter` and `CheckedAdapter.read_delta`.

    Raises:
        ValueError: as in `check_adapter`, and if a value is NaN or infinite.

    Example:
        >>> {name: delta.shape for name, delta in read_adapter("out").items()}
        {'model.layers.22.mlp.down_proj.weight': torch.Size([4096, 14336])}
    """
    adapter = check_adapter(folder)
    return {parameter: adapter.read_delta(parameter) for parameter in adapter.deltas}


def read_provenance(folder: Path) -> Provenance:
    """Return the provenance of the adapter in a folder; empty if it has no `locft_provenance.json`.

    Raises:
        ValueError: if `read_json` or `Provenance.from_dict` refuses the file.
    """
    if not os.path.lexists(folder / PROVENANCE_NAME):
        return Provenance()
    content = read_json(folder, PROVENANCE_NAME, MAX_PROVENANCE_BYTES)
    return Provenance.from_dict(content, folder / PROVENANCE_NAME)


def read_json(folder: Path, name: str, max_bytes: int) -> dict[str, Any]:
    """Return the JSON object in a file of the folder.

    Raises:
        ValueError: if the file is not a regular file in the folder, is larger than `max_bytes`, is not UTF-8 or not
            JSON, has a duplicate key, or does not hold an object.
    """
    return json_object(_content(folder, name, max_bytes), folder / name)


def read_lines(folder: Path, name: str, max_bytes: int) -> list[dict[str, Any]]:
    """Return the JSON objects in a file of the folder, one per line; raises as `read_json`."""
    lines = _content(folder, name, max_bytes).split(b"\n")
    return [json_object(line, f"{folder / name}, line {number}") for number, line in enumerate(lines, start=1) if line]


def _content(folder: Path, name: str, max_bytes: int) -> bytes:
    with open_inside(folder, name) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            raise ValueError(
                f"{folder / name} is not readable: found {num_bytes} bytes; expected at most {max_bytes}. Download or "
                "save it again."
            )
        return file.read(num_bytes)


def open_inside(folder: Path, name: str) -> BufferedReader:
    """Open a file of the folder for reading.

    Raises:
        ValueError: if it is missing, is not a regular file, or is a link out of the folder.
    """
    file = folder / name
    try:
        place = file.resolve(strict=True)
        if place.parent != folder.resolve() and not _is_blob(place, folder.resolve()):
            raise ValueError(
                f"{file} is a symbolic link to {place}, outside the adapter's folder. Do not use this adapter, unless "
                "you know that file. Then copy it into the folder."
            )
        # do not follow a link created since, and do not wait for a writer of a pipe
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(place, flags)
    except (OSError, RuntimeError) as error:  # RuntimeError: circular links, before Python 3.13
        raise ValueError(f"{file} cannot be opened ({one_line(error)}). Download or save it again.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{file} is not a regular file. Do not use this adapter.")
    return os.fdopen(descriptor, "rb")


def _is_blob(place: Path, folder: Path) -> bool:
    """Whether the folder is a snapshot in a Hub cache, and the file is a blob that its links may point to.

    The links point to `models--owner--name/blobs/<hash>`. With Xet, these point on to
    `blobs/<first two digits>/<hash>` beside all repositories.
    """
    for snapshots in folder.parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            shared = repository.parent / "blobs" / place.name[:2]
            return place.parent == repository / "blobs" or (place.parent == shared and is_sha256(place.name))
    return False


def _check_complete(folder: Path) -> None:
    missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not os.path.lexists(folder / name)]
    if missing:
        raise ValueError(
            f"{folder} is not an adapter folder: it has no {' and no '.join(missing)}. Give a folder written by "
            "`save_pretrained` or `locft train --output_dir`."
        )


def _check_no_pickle(folder: Path) -> None:
    for file_name in os.listdir(folder):
        name = file_name.lower()
        if name.endswith(PICKLES) and name not in TRAINER_FILES and not name.startswith("rng_state"):
            raise ValueError(
                f"{folder} holds {shortened(file_name)}, which may be a pickle; expected only safetensors. Loading a "
                "pickle can run code: do not load it, and remove it if you do not need it."
            )


def _identity(file: BufferedReader) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # in parts, since isfinite allocates; float8 has no isfinite
    wide = torch.float32 if tensor.itemsize == 1 else tensor.dtype
    return all(bool(torch.isfinite(part.to(wide)).all()) for part in tensor.split(FINITE_CHECK_ELEMENTS))
