"""Keys and values of the tokens before, for answers that are under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .questions import Answer


@dataclass
class Running:
    """An answer under way: where its tokens' keys and values are kept, but for the last."""

    number: int
    answer: Answer
    history: list[int]


class Kept:
    """Keys and values of tokens, by layer, (capacity, heads, d): written at the end, moved together when full."""

    def __init__(self) -> None:
        self.layers: dict[nn.Module, list[torch.Tensor]] = {}
        self.used = 0
        self.capacity = 0

    def make_room(self, num_tokens: int, running: Sequence[Running]) -> None:
        if self.used + num_tokens <= self.capacity:
            return
        slots = torch.tensor([slot for row in running for slot in row.history], dtype=torch.int64)
        live, inverse = torch.unique(slots, return_inverse=True)
        moved = iter(inverse.tolist())
        for row in running:
            row.history = [next(moved) for _ in row.history]
        self.used = len(live)
        self.capacity = max(self.capacity, 2 * (self.used + num_tokens))
        for kept in self.layers.values():
            for index, tensor in enumerate(kept):
                kept[index] = tensor.new_empty(self.capacity, *tensor.shape[1:])
                kept[index][: self.used] = tensor[live.to(tensor.device)]

    def write(self, module: nn.Module, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Keep a layer's keys and values, each (1, heads, N, d), behind the others; return all that it has."""
        rows = [tensor[0].transpose(0, 1) for tensor in states]
        if module not in self.layers:
            self.layers[module] = [tensor.new_empty(self.capacity, *tensor.shape[1:]) for tensor in rows]
        for kept, tensor in zip(self.layers[module], rows, strict=True):
            kept[self.used : self.used + len(tensor)] = tensor
        return self.layers[module]
