"""How many tokens a micro-batch may have in the memory that is free."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from .tail import Tail


def most_tokens(device: torch.device) -> int:
    """Return the tokens beyond which a forward gains nothing: they fill a CPU's cache, or keep an accelerator busy."""
    return 384 if device.type == "cpu" else 8192


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return torch.accelerator.get_memory_info(device)[0]


def bytes_per_token(tail: Tail, vocabulary_size: int) -> int:
    """Estimate what forward and backward keep for one token.

    The input and output of every matrix in the tail, half as much again for what is between them, and the token's
    logits and their gradient, counted in float32.
    """
    kept = 0.0
    for layer in tail.layers[tail.first :]:
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                kept += 1.5 * sum(parameter.shape[-2:]) * parameter.itemsize
    return int(kept) + 2 * 4 * vocabulary_size


def fitting_tokens(model: Any, tail: Tail, device: torch.device) -> int:
    """Return how many tokens a micro-batch should have: as many as are of use, in half of the memory that is free."""
    vocabulary_size = model.get_input_embeddings().weight.shape[0]
    return max(1, min(most_tokens(device), free_memory(device) // 2 // bytes_per_token(tail, vocabulary_size)))
