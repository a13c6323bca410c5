"""Every distinct prefix of the edits, once: the same tokens before give the same hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

SORTED_LEVELS = 16  # how many first tokens decide which edits are neighbours
SAVED_BY_A_CUT = 0.25  # the smallest share of the padded places for which one more rectangle pays


class Layout(NamedTuple):
    """Edits laid out as rectangles.

    Args:
        slots: for each rectangle, (B, T), the index in a pack's `nodes` of every token; on padding, of the edit's last
            token.
        places: (N,) for each node, an index in all rectangles, flattened and concatenated, where it is no padding.
    """

    slots: Sequence[torch.Tensor]
    places: torch.Tensor


@dataclass(frozen=True)
class Pack:
    """Some edits, with each of their distinct prefixes once.

    Args:
        nodes: (N,) the distinct prefixes, as nodes of their tree.
        token_ids: (N,) the last token of each prefix.
        positions: (N,) the position of that token.
        slots: (B, T) the index in `nodes` of each token of each edit; on padding, of the edit's last token.
        lengths: (B,) the number of tokens of each edit.
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
        """Edits of similar length in one rectangle each: more rectangles, far less padding."""
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
    """Cut rows, sorted from short to long, where this leaves the least padding, until a cut saves too little."""
    ordered, number = lengths[rows], torch.arange(1, len(rows))
    padded = number * ordered[:-1] + (len(rows) - number) * ordered[-1]
    if not len(padded) or padded.min() > (1 - SAVED_BY_A_CUT) * len(rows) * ordered[-1]:
        return [rows]
    first = int(padded.argmin()) + 1
    return _bands(lengths, rows[:first]) + _bands(lengths, rows[first:])


@dataclass(frozen=True)
class PrefixTree:
    """All distinct prefixes of some edits, without the last token of each edit, which predicts nothing.

    Args:
        nodes: (total tokens,) the node of every token, in the order of the tokens. The last token of an edit has the
            node of the token before it.
        token_ids: (nodes,) the last token of each prefix.
        positions: (nodes,) the position of that token.
        offsets: (edits + 1,) where each edit begins in `nodes`.
        rank: (edits,) the place of each edit in an order in which edits that begin alike are neighbours.
        marks: (nodes,) the marks of these tokens, if they have marks.
    """

    nodes: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    rank: torch.Tensor
    marks: torch.Tensor | None = None

    @classmethod
    def of(
        cls, token_ids: torch.Tensor, offsets: torch.Tensor, indices: torch.Tensor, marks: torch.Tensor | None = None
    ) -> PrefixTree:
        """Find the distinct prefixes, token position by token position.

        Args:
            token_ids: (total,) the concatenated tokens of all edits.
            offsets: (edits + 1,) where each edit begins, and the total; each edit has 2 tokens or more.
            indices: the edits to use; `nodes` and `rank` of the others are not defined.
            marks: (total,) bool. Tokens share a node only if they, and those before them, have the same marks.
        """
        if marks is not None:
            token_ids = token_ids.long() * 2 + marks
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
        # lexsort sorts by its last key first
        rank[indices[torch.from_numpy(np.lexsort([level.numpy() for level in reversed(order)]))]] = torch.arange(
            len(indices)
        )
        columns = torch.cat(known, dim=1)
        if marks is None:
            return cls(nodes, columns[0], columns[1], offsets, rank)
        return cls(nodes, columns[0] // 2, columns[1], offsets, rank, columns[0] % 2 == 1)

    def __len__(self) -> int:
        return len(self.token_ids)

    def pack(self, indices: torch.Tensor) -> Pack:
        """Return some edits with their distinct prefixes."""
        begin = self.offsets[indices]
        lengths = self.offsets[indices + 1] - begin - 1
        columns = torch.minimum(torch.arange(int(lengths.max())), lengths.unsqueeze(1))
        nodes, slots = torch.unique(self.nodes[begin.unsqueeze(1) + columns], return_inverse=True)
        return Pack(nodes, self.token_ids[nodes], self.positions[nodes], slots, lengths)
