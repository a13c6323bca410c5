"""The sha256 of a model's configuration and weights, layer by layer: what cached files are named by."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any

import torch
import transformers
from torch import nn

from ..io.arithmetic import tensor_sha256
from ..io.parameter_names import clean_name
from .offload import whole_layer

# configuration that no hidden state depends on; the weights' dtype is hashed with the weights
WITHOUT_EFFECT = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")
ADAPTER_NAMES = ("locft_", "lora_")
HASHING_THREADS = 8


def layer_digests(
    model: nn.Module,
    layers: Sequence[nn.Module],
    num_layers: int,
    option: str,
    *,
    with_adapters: bool = False,
    sha256: Callable[[torch.Tensor], str] = tensor_sha256,
) -> list[str]:
    """Return `num_layers + 1` sha256; number i covers all that the states entering layer i depend on.

    That is: the version of transformers, the configuration, the weights outside of the decoder layers, and the weights
    of layers 0 to i - 1. Offloaded layers are read too.

    Args:
        model: with or without an adapter.
        layers: its decoder layers.
        num_layers: how many of them to hash.
        option: the option that needs the digests, for the error.
        with_adapters: hash adapters too; without them, all adapters on one base have the same digests.
        sha256: hashes a tensor.

    Raises:
        ValueError: if a weight is on the meta device, and so cannot be read.
    """
    inside = {id(tensor) for layer in layers for _, tensor in _tensors(layer)}
    outside = ((name, tensor) for name, tensor in _tensors(model) if id(tensor) not in inside)
    parts = [outside, *(_tensors(layer) for layer in layers[:num_layers])]
    digests, digest = [], sha256_of(transformers.__version__, configuration_of(model))
    with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as pool:
        hashed = [_described(part, pool, option, with_adapters, sha256) for part in parts]
        for described in hashed:
            lines = [f"{name} {tensor.dtype} {found.result()}" for name, tensor, found in described]
            digest = sha256_of(digest, *lines)
            digests.append(digest)
    return digests


def _described(
    part: Iterable[tuple[str, torch.Tensor]],
    pool: ThreadPoolExecutor,
    option: str,
    with_adapters: bool,
    sha256: Callable[[torch.Tensor], str],
) -> list[tuple[str, torch.Tensor, Future[str]]]:
    """Return the name, the tensor and the hash, which is still being computed, of each tensor in a part."""
    described = []
    for name, tensor in part:
        if with_adapters or not any(adapter in name for adapter in ADAPTER_NAMES):
            if tensor.is_meta:
                raise ValueError(
                    f"{option}: the file is named by the sha256 of the model's weights, and {name} is offloaded (on "
                    f"the meta device). Unset {option}, or load the model without offloading."
                )
            described.append((name, tensor, pool.submit(sha256, tensor)))
    return described


def sha256_of(*parts: str) -> str:
    """Return the sha256 of some texts, one a line."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    whole = whole_layer(module)
    for name, tensor in chain(whole.named_parameters(), whole.named_buffers()):
        yield clean_name(name), tensor


def configuration_of(model: nn.Module) -> str:
    """Return the settings that hidden states depend on, as JSON."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    with_effect = {
        key: value for key, value in settings.items() if key not in WITHOUT_EFFECT and not key.endswith("_token_id")
    }
    return json.dumps(with_effect, sort_keys=True, default=str)
