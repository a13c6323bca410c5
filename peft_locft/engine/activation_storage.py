"""Where the states that leave the trunk are stored: in memory, in a scratch file, or in a file for later runs."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..io.arithmetic import tensor_sha256
from ..io.disk_space import reserve
from ..io.files import atomic_file, remove_abandoned
from .fingerprint import layer_digests, sha256_of
from .prefix_tree import PrefixTree
from .tail import Tail

logger = logging.getLogger(__name__)

NAME = "states"
STAGED = ".*.safetensors-*"  # how `atomic_file` names a file that is being written


@dataclass(frozen=True)
class SharedActivations:
    """A folder of states that trainings on one frozen base share, such as the trials of a location search.

    Args:
        folder: holds a file for each location and list of edits. Its owner may delete it afterwards.
        layers: the decoder layers that will be trained, counted from 0: a run through one of them stores the states
            that enter it, too.
    """

    folder: Path
    layers: Sequence[int]
    _hashes: dict[int, tuple[torch.Tensor, str]] = field(default_factory=dict)

    def sha256(self, tensor: torch.Tensor) -> str:
        """Return the hash of a tensor, computed once if it is frozen."""
        if tensor.requires_grad:
            return tensor_sha256(tensor)
        if id(tensor) not in self._hashes:
            # with the tensor itself, so that no other gets its id
            self._hashes[id(tensor)] = (tensor, tensor_sha256(tensor))
        return self._hashes[id(tensor)][1]


@dataclass(frozen=True)
class StateStorage:
    """Where states are stored.

    Args:
        place: `"memory"`, `"disk"`, or `"auto"`: in memory if the states need less than half of the free memory.
        scratch_dir: the folder of a scratch file; `None`: the system's folder for temporary files. The file has no
            name, so the system frees its space when the process ends, even if it is killed.
        cache_dir: a folder for a file that later runs use, if model, edits and location are the same.
        shared: a folder shared with other trainings on this base; used if `cache_dir` is not given.
        progress: show a progress bar while the states are computed.
    """

    place: str
    scratch_dir: str | None
    cache_dir: str | None = None
    shared: SharedActivations | None = None
    progress: bool = True

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return an empty tensor for states, (nodes, hidden), in memory or in a scratch file.

        Raises:
            DiskFullError: if the disk has no room for the scratch file.
        """
        num_values = shape[0] * shape[1]
        place = self.place
        if place == "auto":
            place = "memory" if num_values * dtype.itemsize < psutil.virtual_memory().available / 2 else "disk"
        if place == "memory":
            return torch.empty(shape, dtype=dtype)
        folder = self.scratch_dir or tempfile.gettempdir()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".activation-cache-") as file:
            reserve(file, folder, num_values * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=num_values, dtype=dtype).view(shape)


def state_files(
    folder: str | Path,
    model: nn.Module,
    tail: Tail,
    tree: PrefixTree,
    device: torch.device,
    shared: SharedActivations | None = None,
) -> list[Path]:
    """Return the file of the states that enter each layer, from layer 0 to the first layer of the tail.

    A file is named by the sha256 of all that its states depend on: the weights before the layer, the configuration,
    the dtype, and the edits' tokens.

    Raises:
        ValueError: if a weight is on the meta device.
    """
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    inputs = [str(autocast), *(tensor_sha256(tensor) for tensor in (tree.token_ids, tree.positions, tree.nodes))]
    sha256 = tensor_sha256 if shared is None else shared.sha256
    digests = layer_digests(
        model, list(tail.layers), tail.first, "activation_cache_dir", with_adapters=True, sha256=sha256
    )
    return [Path(folder, f"{sha256_of(digest, *inputs)}.safetensors") for digest in digests]


def load_states(path: Path, num_nodes: int) -> torch.Tensor | None:
    """Return the states in a file, (num_nodes, hidden), memory-mapped; `None` if there is no complete file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            states: torch.Tensor = file.get_tensor(NAME)
    except (SafetensorError, OSError) as error:
        logger.warning("%s is not a complete activation cache (%s). It is computed again.", path, error)
        return None
    if states.shape[0] != num_nodes:
        logger.warning("%s has %d states, expected %d. It is computed again.", path, states.shape[0], num_nodes)
        return None
    logger.info("Using the activations of the frozen layers from %s.", path)
    return states


@contextmanager
def new_states_file(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield a memory-mapped tensor for states, (nodes, hidden); on success it becomes the safetensors file `path`.

    Raises:
        DiskFullError: if the disk has no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent.glob(STAGED))
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    # safetensors writes headers of tensors only, so take the dtype's name from the header of an empty one
    empty = save({NAME: torch.empty(0, dtype=dtype)})
    dtype_name = json.loads(empty[8:])[NAME]["dtype"]
    header = json.dumps({NAME: {"dtype": dtype_name, "shape": list(shape), "data_offsets": [0, num_bytes]}}).encode()
    header += b" " * (-len(header) % 8)
    with atomic_file(path) as staged:
        with staged.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            reserve(file, path.parent, 8 + len(header) + num_bytes)
        content = torch.from_file(str(staged), shared=True, size=8 + len(header) + num_bytes, dtype=torch.uint8)
        yield content[8 + len(header) :].view(dtype).view(shape)
