"""Attention between the tokens of edits of which every distinct prefix was computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .prefix_tree import Pack

NAME = "locft_packed"

# (module, query, key, value, **what the family gives it) to (1, N, heads, d)
Attention = Callable[..., torch.Tensor]

# by the configuration that an attention module looks its implementation up in; backward may run in another thread
_attending: dict[int, Attention] = {}


@contextmanager
def attending(layers: nn.ModuleList, attention: Attention) -> Iterator[None]:
    """Let the layers attend as told, while their states are (1, N, hidden), a row a distinct prefix.

    Everything else in a decoder layer treats a token by itself, so that this is all a layer needs to know. It holds
    for families that look their attention up in transformers' `AttentionInterface`; try it before you rely on it.
    """
    AttentionInterface.register(NAME, _attend)
    configs = {id(config): config for layer in layers for config in _configs(layer)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for key, config in configs.items():
        config._attn_implementation = NAME
        _attending[key] = attention
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
            del _attending[key]


def packed_attention(layers: nn.ModuleList, pack: Pack) -> Any:
    """Let the layers attend within each edit; a context, see [`attending`]."""
    return attending(layers, partial(attend_within, pack))


def _configs(layer: nn.Module) -> Iterator[Any]:
    for module in layer.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            yield module.config


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    return _attending[id(module.config)](module, query, key, value, **kwargs), None


def attend_within(
    pack: Pack,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Lay queries, keys and values, (1, heads, N, d), out as edits, attend, and return (1, N, heads, d)."""
    # measured on a processor alone; elsewhere each band would be more kernels to launch
    layout = pack.bands if query.device.type == "cpu" else pack.whole
    # backward through short rows of half precision takes a processor six times as long
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
    """Return `rows[indices]`; an embedding's backward is many times faster than that of an index."""
    return F.embedding(indices, rows.flatten(1)).unflatten(-1, rows.shape[1:])
