"""Where the states that leave the trunk are kept: in memory, in a scratch file, or in a file for later runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import psutil
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from ..io.safetensors_file import DTYPE_NAMES
from ..tuner.arithmetic import tensor_sha256
from .offload import OffloadedLayer
from .prefix_tree import PrefixTree
from .shared_states import shared_states
from .tail import Tail

logger = logging.getLogger(__name__)

NAME = "states"
PARTIAL = ".partial-"
STALE = 24 * 3600  # seconds after which an unfinished file is nobody's any more


def allocate(shape: tuple[int, int], dtype: torch.dtype, place: str, folder: str) -> torch.Tensor:
    """Return room for states, (nodes, hidden).

    Args:
        place: `"memory"`, `"disk"`, or `"auto"`: memory where the states take less than half of what is free.
        folder: where a scratch file goes. It has no name: its space is free again when the process ends, however it
            ends.
    """
    num_values = shape[0] * shape[1]
    if place == "auto":
        place = "memory" if num_values * dtype.itemsize < psutil.virtual_memory().available / 2 else "disk"
    if place == "memory":
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".activation-cache-") as file:
        return torch.from_file(file.name, shared=True, size=num_values, dtype=dtype).view(shape)


def fingerprint(model: nn.Module, tail: Tail, tree: PrefixTree, device: torch.device) -> str:
    """Return the sha256 of all that the states depend on: the trunk's weights and configuration, and the edits.

    Raises:
        ValueError: if a weight is not there to be read.
    """
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    parts = [transformers.__version__, str(next(model.parameters()).dtype), str(autocast)]
    config = getattr(model, "config", None)
    parts.append(json.dumps(config.to_dict(), sort_keys=True, default=str) if config is not None else "")
    in_stack = {id(parameter) for layer in tail.layers for parameter in layer.parameters()}
    tensors: list[tuple[str, torch.Tensor]] = []
    tensors += [(name, tensor) for name, tensor in model.named_parameters() if id(tensor) not in in_stack]
    shared = shared_states()
    for index, layer in enumerate(tail.trunk):
        whole = layer.parked[0] if isinstance(layer, OffloadedLayer) else layer
        own = chain(whole.named_parameters(), whole.named_buffers())
        tensors += [(f"{index} {name}", tensor) for name, tensor in own]
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ValueError(
                f"activation_cache_dir needs the weights before the location, and {name} is offloaded. Leave it "
                "unset, or load the model without offloading."
            )
        found = tensor_sha256(tensor) if shared is None else shared.sha256(tensor, tensor_sha256)
        parts.append(f"{name} {found}")
    parts += [tensor_sha256(tree.token_ids), tensor_sha256(tree.positions), tensor_sha256(tree.nodes)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_states(path: Path, num_nodes: int) -> torch.Tensor | None:
    """Return the states in a file, memory-mapped; `None` where there is none, or one that is not whole."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            states: torch.Tensor = file.get_tensor(NAME)
    except (SafetensorError, OSError) as error:
        logger.warning("%s is no whole activation cache (%s): it is made anew.", path, error)
        return None
    if states.shape[0] != num_nodes:
        logger.warning("%s has %d states, not %d: it is made anew.", path, states.shape[0], num_nodes)
        return None
    logger.info("The states that leave the frozen layers are taken from %s.", path)
    return states


@contextmanager
def new_file(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Give memory-mapped room for states, (nodes, hidden), that is a safetensors file of this name when all went well.

    Until then it has another name, and it has none if something was raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{PARTIAL}*"):
        if time.time() - old.stat().st_mtime > STALE:  # of a run that was killed
            old.unlink(missing_ok=True)
    size = shape[0] * shape[1] * dtype.itemsize
    entry = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({NAME: entry}).encode()
    header += b" " * (-len(header) % 8)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=PARTIAL, delete=False) as file:
        try:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(file.tell() + size)
            file.flush()
            whole = torch.from_file(file.name, shared=True, size=8 + len(header) + size, dtype=torch.uint8)
            yield whole[8 + len(header) :].view(dtype).view(shape)
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
