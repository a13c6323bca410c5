"""Tokens that follow the same tokens have the same states: every distinct prefix of the edits, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

SORTED_LEVELS = 16  # tokens by which edits are put next to those that begin alike
SAVED_BY_A_CUT = 0.25  # of the padded places, at the least


class Layout(NamedTuple):
    """Edits laid out as rectangles.

    Args:
        slots: (B, T) for each of these, where in a pack's `nodes` every token is; on padding, the edit's last.
        places: (N,) where in all of them, flattened and one after the other, each node occurs and is no padding.
    """

    slots: Sequence[torch.Tensor]
    places: torch.Tensor


@dataclass(frozen=True)
class Pack:
    """Some edits, each distinct prefix of them once.

    Args:
        nodes: (N,) the distinct prefixes, as nodes of the tree that they are from.
        token_ids: (N,) the last token of each.
        positions: (N,) how many tokens come before that.
        slots: (B, T) where in `nodes` each token of each edit is; on padding, the edit's last.
        lengths: (B,) tokens of each edit.
    """

    nodes: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor

    @cached_property
    def whole(self) -> Layout:
        """All edits as one rectangle."""
        return self._layout([torch.arange(len(self.slots))])

    @cached_property
    def bands(self) -> Layout:
        """Edits of about one length as a rectangle each: more of these, and far less padding."""
        return self._layout(_bands(self.lengths, torch.argsort(self.lengths, stable=True)))

    def _layout(self, bands: Sequence[torch.Tensor]) -> Layout:
        slots, is_token = [], []
        for rows in bands:
            columns = torch.arange(int(self.lengths[rows].max()))
            slots.append(self.slots[rows, : len(columns)])
            is_token.append((columns < self.lengths[rows].unsqueeze(1)).flatten())
        taken = torch.cat(is_token)
        places = torch.empty(len(self.nodes), dtype=torch.int64)
        places[torch.cat([each.flatten() for each in slots])[taken]] = taken.nonzero().squeeze(1)
        return Layout(slots, places)


def _bands(lengths: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
    """Cut rows, from short to long, where that leaves the least padding, until that saves too little."""
    ordered, number = lengths[rows], torch.arange(1, len(rows))
    padded = number * ordered[:-1] + (len(rows) - number) * ordered[-1]
    if not len(padded) or padded.min() > (1 - SAVED_BY_A_CUT) * len(rows) * ordered[-1]:
        return [rows]
    first = int(padded.argmin()) + 1
    return _bands(lengths, rows[:first]) + _bands(lengths, rows[first:])


@dataclass(frozen=True)
class PrefixTree:
    """All distinct prefixes of some edits. The last token of an edit predicts nothing and is not part of it.

    Args:
        nodes: (total tokens,) the node of every token; laid out as the tokens are. The last token of an edit has the
            node of the one before it.
        token_ids: (nodes,) the last token of each prefix.
        positions: (nodes,) how many tokens come before that.
        offsets: (edits + 1,) where in `nodes` each edit begins.
        rank: (edits,) the place of each edit in an order where those that begin alike are neighbours.
    """

    nodes: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    rank: torch.Tensor

    @classmethod
    def of(cls, token_ids: torch.Tensor, offsets: torch.Tensor, indices: torch.Tensor) -> PrefixTree:
        """Find the distinct prefixes, level by level.

        Args:
            token_ids: (total,) the tokens of all edits one after the other.
            offsets: (edits + 1,) where each edit begins, and the total; no edit is shorter than 2 tokens.
            indices: the edits that are asked for; what stands in `nodes` and `rank` of the others means nothing.
        """
        nodes = torch.zeros(len(token_ids), dtype=torch.int64)
        begin, steps = offsets[indices], offsets.diff()[indices] - 1
        vocabulary = int(token_ids.max()) + 1
        known, order = [], []
        above = torch.zeros(len(indices), dtype=torch.int64)
        num_nodes = 0
        for level in range(int(steps.max())):
            here = (steps > level).nonzero().flatten()
            keys = above[here] * vocabulary + token_ids[begin[here] + level]
            distinct, inverse = torch.unique(keys, return_inverse=True)
            above[here] = num_nodes + inverse
            nodes[begin[here] + level] = above[here]
            known.append(torch.stack([distinct % vocabulary, torch.full_like(distinct, level)]))
            if level < SORTED_LEVELS:
                order.append(above.clone())
            num_nodes += len(distinct)
        nodes[begin + steps] = nodes[begin + steps - 1]
        rank = torch.zeros(len(offsets) - 1, dtype=torch.int64)
        # the last key counts first
        rank[indices[torch.from_numpy(np.lexsort([level.numpy() for level in reversed(order)]))]] = torch.arange(
            len(indices)
        )
        columns = torch.cat(known, dim=1)
        return cls(nodes, columns[0], columns[1], offsets, rank)

    def __len__(self) -> int:
        return len(self.token_ids)

    def pack(self, indices: torch.Tensor) -> Pack:
        """Return the distinct prefixes of some edits."""
        begin = self.offsets[indices]
        lengths = self.offsets[indices + 1] - begin - 1
        columns = torch.minimum(torch.arange(int(lengths.max())), lengths.unsqueeze(1))
        nodes, slots = torch.unique(self.nodes[begin.unsqueeze(1) + columns], return_inverse=True)
        return Pack(nodes, self.token_ids[nodes], self.positions[nodes], slots, lengths)
