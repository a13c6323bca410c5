"""Attention within edits whose distinct prefixes are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .offload import whole_layer
from .prefix_tree import Pack

NAME = "locft_packed"

# (module, query, key, value, **the family's arguments) to (1, N, heads, d)
Attention = Callable[..., torch.Tensor]

# by the id of the configuration that names a module's attention; no context variable: backward may be another thread
_attentions: dict[int, Attention] = {}


@contextmanager
def attending(layers: Iterable[nn.Module], attention: Attention) -> Iterator[None]:
    """Replace the layers' attention, for states (1, N, hidden) with one row for each distinct prefix.

    Everything else in a decoder layer works on each token by itself, so nothing else changes. This holds for families
    that use transformers' `AttentionInterface`; check a model before relying on it.
    """
    AttentionInterface.register(NAME, _attend)
    configs = attention_configs(layers)
    _attentions.update(dict.fromkeys(configs, attention))
    try:
        with named_attention(configs, NAME):
            yield
    finally:
        for key in configs:
            del _attentions[key]


@contextmanager
def named_attention(configs: Mapping[int, Any], name: str) -> Iterator[None]:
    """Let configurations name an attention that is registered with transformers."""
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def packed_attention(layers: nn.ModuleList, pack: Pack) -> Any:
    """Return a context in which the layers attend within each edit; see [`attending`]."""
    return attending(layers, partial(attend_within, pack))


def attention_configs(layers: Iterable[nn.Module]) -> dict[int, Any]:
    """Return the configurations that name the attention of some layers, by their id."""
    modules = (module for layer in layers for module in whole_layer(layer).modules())
    found = (getattr(module, "config", None) for module in modules)
    return {id(config): config for config in found if hasattr(config, "_attn_implementation")}


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is not None:
        raise NotImplementedError("a mask of the model's own does not fit packed edits")
    return _attentions[id(module.config)](module, query, key, value, **kwargs), None


def attend_within(
    pack: Pack,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Return the attention within each edit, (1, N, heads, d), from queries, keys and values, (1, heads, N, d)."""
    # faster on a CPU; on an accelerator, more rectangles are more kernels to launch
    layout = pack.bands if query.device.type == "cpu" else pack.whole
    # on a CPU, the backward through short rows takes six times as long in half precision
    in_float = query.device.type == "cpu" and query.itemsize < 4 and torch.is_grad_enabled()
    outputs = []
    for slots in (each.to(query.device) for each in layout.slots):
        length = slots.shape[1]
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device)
            mask = mask.tril().triu(1 - sliding_window)[None, None]
        laid_out = [take(states[0].transpose(0, 1), slots).transpose(1, 2) for states in (query, key, value)]
        if in_float:
            laid_out = [states.float() for states in laid_out]
        output, _ = sdpa_attention_forward(module, *laid_out, mask, **kwargs)
        outputs.append(output.flatten(0, 1).to(query.dtype))
    return take(torch.cat(outputs), layout.places.to(query.device)).unsqueeze(0)


def take(rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return `rows[indices]`, by an embedding: its backward is many times faster than indexing's."""
    return F.embedding(indices, rows.flatten(1)).unflatten(-1, rows.shape[1:])
