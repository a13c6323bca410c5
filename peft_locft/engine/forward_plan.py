"""How a model runs on edits: laid out packed or padded, from which layer on, and with how little of the last layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .narrowing import narrowed
from .packed_attention import packed_attention
from .prefix_tree import Pack, PrefixTree
from .tail import Tail, entering, skipped

# packed: every distinct prefix once, (1, N). padded: on the right, (B, T), without a mask. masked: with a mask.
# single: one edit at a time, unpadded, (1, T).
Layout = Literal["packed", "padded", "masked", "single"]


@dataclass(frozen=True)
class ForwardPlan:
    """How a model runs on edits.

    Args:
        tail: where the model is cut.
        tree: the prefixes of the edits.
        device: where forwards run.
        states: (nodes, hidden), the states that enter the tail, one row for each distinct prefix. `None`: every
            forward runs the trunk.
        layout: how edits are laid out.
        narrow: modules of the last layer that are computed for the scored tokens only, if packed.
    """

    tail: Tail
    tree: PrefixTree
    device: torch.device
    states: torch.Tensor | None = None
    layout: Layout = "packed"
    narrow: tuple[nn.Module, ...] = ()

    @property
    def packed(self) -> bool:
        return self.layout == "packed"

    def inputs(self, pack: Pack) -> dict[str, Any]:
        """Return the arguments of a forward on some edits."""
        if self.packed:
            tensors = {"input_ids": pack.token_ids.unsqueeze(0), "position_ids": pack.positions.unsqueeze(0)}
        else:
            tensors = {"input_ids": pack.token_ids[pack.slots]}
        # under a causal mask, padding on the right changes nothing to its left, so most models need no mask
        if self.layout in ("masked", "single"):
            columns = torch.arange(pack.slots.shape[1])
            tensors["attention_mask"] = (columns < pack.lengths.unsqueeze(1)).long()
        return {name: values.to(self.device) for name, values in tensors.items()} | {"use_cache": False}

    def output_places(
        self, pack: Pack, rows: torch.Tensor, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row and column in that forward's output, of the tokens at (rows, columns) of the edits."""
        if not self.packed:
            return rows, columns
        columns = pack.slots.to(columns.device)[rows, columns]
        return torch.zeros_like(columns), columns

    @contextmanager
    def applied(self, pack: Pack, columns: torch.Tensor | None = None) -> Iterator[None]:
        """Set the model up for forward and backward on these edits.

        Args:
            pack: the edits.
            columns: where the scored tokens are, from `output_places`; `None`: all tokens.
        """
        with ExitStack() as stack:
            if self.states is not None:
                nodes = pack.nodes if self.packed else pack.nodes[pack.slots].flatten()
                states = self.states[nodes]
                stack.enter_context(skipped(self.tail.trunk, self.tail.num_outputs))
                stack.enter_context(
                    entering(self.tail.entry_layer, lambda arriving: states.to(arriving.device).view_as(arriving))
                )
            if self.packed:
                stack.enter_context(packed_attention(self.tail.layers, pack))
                if columns is not None:
                    stack.enter_context(narrowed(self.narrow, columns.unique()))
            yield
