"""Reads a few tensors out of a base model's checkpoint, without the others and without building the model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..tuner.arithmetic import compose_weight, tensor_sha256
from .reading import CheckedAdapter

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BaseTensors:
    """The tensors of a base model's safetensors files. From the Hub, only the files that are asked for are downloaded.

    Args:
        base: the base model: a folder or a name on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: if it has no safetensors files.
        OSError: if the Hub cannot be reached, or has no such model.
    """

    def __init__(self, base: str | os.PathLike[str], revision: str | None = None) -> None:
        self.base, self.revision = base, revision
        index = self._file(SAFE_WEIGHTS_INDEX_NAME)
        if index is not None:
            self.files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            return
        single = self._file(SAFE_WEIGHTS_NAME)
        if single is None:
            raise ValueError(
                f"{base} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}. Expected a base model in "
                "safetensors: load it with transformers and save it with save_pretrained."
            )
        with safe_open(single, framework="pt") as file:
            self.files = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)

    def _file(self, name: str) -> str | None:
        return cached_file(self.base, name, revision=self.revision, _raise_exceptions_for_missing_entries=False)

    def name_of(self, parameter: str) -> str:
        """Return the checkpoint's name of a parameter of the model; they differ where the checkpoint has no prefix.

        Raises:
            ValueError: if the checkpoint has no such tensor.
        """
        if parameter in self.files:
            return parameter
        found = [name for name in self.files if f".{name}".endswith(f".{parameter}") or parameter.endswith(f".{name}")]
        if len(found) != 1:
            raise ValueError(
                f"{self.base} has {'several tensors' if found else 'no tensor'} that could be {parameter}. Expected "
                "one: a checkpoint may hold a fused parameter in parts, which transformers puts together on loading. "
                "Give the adapter's own base model; where it is that, load it, merge the adapter with "
                "merge_and_unload and save the model."
            )
        return found[0]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor by its name in the checkpoint, in its own dtype or as a model loaded in `dtype` has it.

        Raises:
            ValueError: if its file is missing or cannot be read, or if the tensor is not of a float dtype.
        """
        file = self._file(self.files[name])
        if file is None:
            raise ValueError(f"{self.base} has no {self.files[name]}, which its index names. Download it again.")
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: torch.Tensor = opened.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file ({error}). Download it again.") from None
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{file}: {name} is {str(tensor.dtype).removeprefix('torch.')}, as in a quantized model. Expected one "
                f"of {', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS)}: give the base model that is "
                "not quantized."
            )
        return tensor if dtype is None else tensor.to(dtype)

    def others_beside(self, parameter: str) -> dict[str, str]:
        """Return the checkpoint's name of every other tensor of a parameter's module, by its name in the model."""
        own = self.name_of(parameter)
        module, module_here = (name.rpartition(".")[0] for name in (parameter, own))
        return {
            f"{module}{name.removeprefix(module_here)}": name
            for name in self.files
            if name.startswith(f"{module_here}.") and name != own
        }


def weights_and_deltas(
    adapter: CheckedAdapter, base: BaseTensors, dtype: torch.dtype | None = None, *, force: bool = False
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield each edited parameter's name, base weight and delta, one in memory at a time.

    Args:
        adapter: a LocFT adapter.
        base: the base model that it belongs to.
        dtype: in which the base is loaded; `None` is the checkpoint's own.
        force: also yield base weights that are not those that the adapter was trained on.

    Raises:
        ValueError: if the base does not have a tensor, has it in another shape or quantized, or, unless `force`, with
            other values than the adapter was trained on; if a delta is not finite.
    """
    config: Any = adapter.config
    recorded = config.base_sha256 or {}
    for parameter in adapter.deltas:
        weight = base.read(base.name_of(parameter), dtype)
        delta = adapter.read_delta(parameter)
        if delta.shape != weight.shape:
            raise ValueError(
                f"{parameter} is {_sizes(weight)} in {base.base} and {_sizes(delta)} in {adapter.weights_file}: the "
                f"adapter belongs to another model. Give its own base, {config.base_model_name_or_path or 'unnamed'}."
            )
        if not force and recorded.get(parameter, tensor_sha256(weight)) != tensor_sha256(weight):
            raise ValueError(
                f"{parameter} in {base.base} has other values than the one that {adapter.folder} was trained on. Give "
                f"its own base, {config.base_model_name_or_path or 'unnamed'}, at the revision and dtype that it was "
                "trained on, or force it, and expect other answers than it was evaluated with."
            )
        yield parameter, weight, delta


def edited_tensors(
    adapter: CheckedAdapter, base: BaseTensors, dtype: torch.dtype | None = None, *, force: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each edited weight by the name of its parameter; arguments and errors as in `weights_and_deltas`."""
    config: Any = adapter.config
    for parameter, weight, delta in weights_and_deltas(adapter, base, dtype, force=force):
        yield parameter, compose_weight(weight, [(delta, config.scale)])


def _sizes(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
