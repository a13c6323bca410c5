"""Under which name statistics of a text are kept: a hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import transformers
from torch import nn

from ..running.residency import ParkedLayer
from ..tuner.arithmetic import tensor_sha256
from ..tuner.presets import find_decoder_layers
from ..tuner.provenance import clean_name

# of a model's configuration: where it lies, and what only generation reads
WITHOUT_EFFECT = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")


def layer_numbers(model: nn.Module, locations: Sequence[str]) -> tuple[nn.ModuleList | None, dict[str, int | None]]:
    """Return the decoder layers, and in which of them each location lies; `None` where it is in none."""
    try:
        stack_name, layers = find_decoder_layers(model)
    except ValueError:
        return None, dict.fromkeys(locations)
    prefix = f"{clean_name(stack_name)}."
    return layers, {
        name: int(name[len(prefix) :].split(".")[0]) if name.startswith(prefix) else None for name in locations
    }


def cache_keys(model: nn.Module, locations: Sequence[str], text: Sequence[torch.Tensor]) -> dict[str, str]:
    """Return a sha256 for each location, of its name, the text, and the base model as far as the location's layer.

    An adapter is no part of it, so that runs on one base share what they keep.

    Args:
        model: with or without an adapter.
        locations: names of modules in the base model.
        text: rows of token ids, and of weights.

    Raises:
        ValueError: if a weight is not there to be read.
    """
    layers, numbers = layer_numbers(model, locations)
    stack = list(layers or [])
    inside = {id(tensor) for layer in stack for _, tensor in _tensors(layer)}
    outside = [(name, tensor) for name, tensor in _tensors(model) if id(tensor) not in inside]
    digest = _sha256(transformers.__version__, _configuration(model), *_described(outside))
    by_layer = {}
    for number in range(1 + max((len(stack) - 1 if n is None else n for n in numbers.values()), default=-1)):
        digest = _sha256(digest, *_described(_tensors(stack[number])))
        by_layer[number] = digest
    lengths = torch.tensor([len(row) for row in text])
    read = [tensor_sha256(lengths), *(tensor_sha256(row) for row in text)]
    # what lies in no layer may come after all of them
    return {name: _sha256(name, digest if n is None else by_layer[n], *read) for name, n in numbers.items()}


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a module without those of an adapter."""
    whole = module.parked[0] if isinstance(module, ParkedLayer) else module
    for name, tensor in chain(whole.named_parameters(), whole.named_buffers()):
        if "locft_" not in name and "lora_" not in name:
            yield clean_name(name), tensor


def _described(tensors: Sequence[tuple[str, torch.Tensor]] | Iterator[tuple[str, torch.Tensor]]) -> Iterator[str]:
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ValueError(
                f"Statistics are kept by the weights that they depend on, and {name} is offloaded. Leave the cache "
                "folder out, or load the model without offloading."
            )
        yield f"{name} {tensor.dtype} {tensor_sha256(tensor)}"


def _configuration(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {
        key: value for key, value in settings.items() if key not in WITHOUT_EFFECT and not key.endswith("_token_id")
    }
    return json.dumps(kept, sort_keys=True, default=str)


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
