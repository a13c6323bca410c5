"""Batches of rows of different lengths, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the indices of rows in batches, shortest rows first, each of at most `max_tokens` tokens when padded.

    A row of more than `max_tokens` is a batch by itself.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or (len(batches[-1]) + 1) * lengths[index] > max_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def pad_right(rows: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B rows of token ids padded to the longest, and their attention mask with 1 on tokens; both (B, T)."""
    input_ids = pad_sequence(list(rows), batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return input_ids.to(device), mask.to(device)
