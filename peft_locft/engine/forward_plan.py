"""How a model runs on edits: packed or padded, from which layer on, and with how little of the last layer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from .narrowing import find_narrowable, narrowed
from .packed_attention import packed_attention
from .prefix_tree import Pack, PrefixTree
from .tail import Tail, entering, logits_at, skipped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForwardPlan:
    """How a model runs on edits.

    Args:
        tail: where the model is cut.
        tree: the prefixes of the edits.
        device: where forwards run.
        states: (nodes, hidden), the states that enter the tail, one row for each distinct prefix. `None`: every
            forward runs the trunk.
        packed: compute every distinct prefix once, (1, N, hidden). Else edits are padded on the right, (B, T, hidden).
        narrow: modules of the last layer that are computed for the scored tokens only, if packed.
    """

    tail: Tail
    tree: PrefixTree
    device: torch.device
    states: torch.Tensor | None = None
    packed: bool = True
    narrow: tuple[nn.Module, ...] = ()

    def inputs(self, pack: Pack) -> dict[str, Any]:
        """Return the arguments of a forward on some edits.

        There is no mask: under a causal mask, padding on the right changes nothing to its left.
        """
        if self.packed:
            tensors = {"input_ids": pack.token_ids.unsqueeze(0), "position_ids": pack.positions.unsqueeze(0)}
        else:
            tensors = {"input_ids": pack.token_ids[pack.slots]}
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
                stack.enter_context(skipped(self.tail.trunk))
                stack.enter_context(
                    entering(self.tail.entry_layer, lambda arriving: states.to(arriving.device).view_as(arriving))
                )
            if self.packed:
                stack.enter_context(packed_attention(self.tail.layers, pack))
                if columns is not None:
                    stack.enter_context(narrowed(self.narrow, columns.unique()))
            yield


def find_packing(model: nn.Module, plan: ForwardPlan, trial: torch.Tensor, narrow: bool) -> ForwardPlan:
    """Return a plan with `packed` and `narrow` as this model allows, found by running it on a few edits.

    Args:
        model: the model, in evaluation mode.
        plan: with its tail, its tree and its device.
        trial: indices of a few edits, short and long.
        narrow: also look for modules that can do with the rows of the scored tokens.
    """
    try:
        packed = equals_whole_model(model, plan, trial)
    except Exception as error:  # a family's own code may raise anything on packed tokens
        if should_reduce_batch_size(error):
            raise
        logger.debug("not packed: %r", error)
        packed = False
    if not packed:
        logger.info("Edits are padded, not packed: this model does not use transformers' attention interface.")
        return replace(plan, packed=False)
    if not narrow:
        return plan
    pack = plan.tree.pack(trial)
    last = pack.slots[:, -1].unique().to(plan.device)  # each edit's last token that predicts
    inputs = plan.inputs(pack)

    def logits() -> torch.Tensor:
        return logits_at(model, torch.zeros_like(last), last, inputs).logits

    with plan.applied(pack):
        found = find_narrowable(plan.tail.layers[-1], logits, last, tolerance(model, plan.device))
    return replace(plan, narrow=tuple(found))


@torch.no_grad()
def equals_whole_model(model: nn.Module, plan: ForwardPlan, trial: torch.Tensor) -> bool:
    """Whether a plan gives the logits of the whole model's forward, padded and masked as usual.

    A family may pass more than states from layer to layer, or ignore positions.
    """
    pack = plan.tree.pack(trial)
    steps = plan.tree.offsets.diff()[trial] - 1
    mask = (torch.arange(pack.slots.shape[1]) < steps.unsqueeze(1)).long()
    whole = {"input_ids": pack.token_ids[pack.slots].to(plan.device), "attention_mask": mask.to(plan.device)}
    # each edit's last token, which sees all the others, and one in the middle
    rows = torch.arange(len(trial)).repeat(2).to(plan.device)
    columns = torch.cat([steps - 1, steps // 2]).to(plan.device)
    expected = logits_at(model, rows, columns, whole | {"use_cache": False}).logits.float()
    with plan.applied(pack):
        found = logits_at(model, *plan.output_places(pack, rows, columns), plan.inputs(pack)).logits.float()
    return bool((expected - found).abs().max() <= tolerance(model, plan.device) * expected.abs().max())


def tolerance(model: nn.Module, device: torch.device) -> float:
    """Return by how much two ways to compute the same values may differ, relative to the largest value."""
    # accelerate stores the original forward of a model that it runs in mixed precision
    is_mixed = torch.is_autocast_enabled(device.type) or "_original_forward" in vars(model)
    return 5e-2 if is_mixed or next(model.parameters()).itemsize < 4 else 1e-3
