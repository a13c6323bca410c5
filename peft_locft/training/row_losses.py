"""The losses of training rows, each by its kind: towards a target, or towards what the base says."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data.training_rows import TrainingRows
from ..encoding import EncodedEdits
from ..objectives import LossAveraging, log_probabilities, row_counts, token_losses
from ..recipe import BreadthFirstConfig
from ..running.edit_runner import EditRunner, MicroBatch
from ..running.tail import logits_at
from .base_distributions import BaseDistributions


class BatchWeight(NamedTuple):
    """What the losses of a batch are divided by: the weight of its targets, and the number of its kept rows."""

    targets: float
    kept: int


class RowLosses:
    """Computes losses of rows, and what they count.

    Args:
        rows: which rows are of which kind.
        runner: runs the model on them.
        num_scored: (rows,) the scored tokens of each.
        loss_averaging: what counts the same in a batch.
        variant_weight: of a variant of an edit, beside 1 of the edit.
        kept_weight: of the mean loss of a batch's kept rows, beside 1 of the mean of its targets.
        to_base: kept rows are held to what the base says next; otherwise they have targets, too.
    """

    def __init__(
        self,
        rows: TrainingRows,
        runner: EditRunner,
        num_scored: torch.Tensor,
        loss_averaging: LossAveraging,
        variant_weight: float,
        kept_weight: float,
        to_base: bool,
    ) -> None:
        self.rows = rows
        self.runner = runner
        self.num_scored = num_scored
        self.kept_weight = kept_weight
        weights = torch.ones(len(num_scored))
        weights[rows.num_edits : rows.first_kept] = variant_weight
        self.counts = row_counts(num_scored, loss_averaging, weights)
        self.to_base = to_base and rows.num_kept > 0
        self.base: BaseDistributions | None = None

    @classmethod
    def of(cls, encoded: EncodedEdits, rows: TrainingRows, args: BreadthFirstConfig) -> RowLosses:
        """Return the losses that a recipe asks for.

        Args:
            encoded: all rows.
            rows: which of them are of which kind.
            args: the recipe, and which of the processes this is.
        """
        own = torch.arange(min(args.process_index, len(encoded) - 1), len(encoded), args.world_size)
        runner = EditRunner(encoded, own, args.objective, args.max_tokens_per_micro_batch, args.device)
        return cls(
            rows,
            runner,
            encoded.lengths - (1 if args.objective == "full" else encoded.target_starts),
            args.loss_averaging or "edit",
            args.variant_weight,
            args.kept_weight or 0.0,
            to_base=args.kept_loss == "kl",
        )

    @torch.no_grad()
    def ask_base(self, model: nn.Module, disabled: AbstractContextManager[Any]) -> None:
        """Keep what the base says on the kept rows.

        Args:
            model: the model, in evaluation mode.
            disabled: makes it answer as its base.
        """
        own = self.runner.own[self.runner.own >= self.rows.first_kept]
        if not self.to_base or not len(own):
            return
        with disabled:
            while self.base is None:
                base = BaseDistributions(own, self.num_scored[own])
                try:
                    for piece in self.runner.pieces(own):
                        with self.runner.running(piece) as batch:
                            base.keep(piece, logits_at(model, *batch.where, batch.inputs).logits)
                    self.base = base
                except RuntimeError as error:
                    if not self.runner.halve(error):
                        raise

    def weight(self, indices: torch.Tensor) -> BatchWeight:
        targets = indices[indices < self.rows.first_kept]
        return BatchWeight(float(self.counts[targets].sum()), len(indices) - len(targets))

    def __call__(
        self, model: nn.Module, indices: torch.Tensor, return_outputs: bool = False
    ) -> tuple[torch.Tensor, Any]:
        """Return the mean loss over each row's scored tokens, (B,) for a micro-batch, and the outputs.

        Args:
            model: the model.
            indices: (B,) numbers of rows, of any kind.
            return_outputs: leave the logits in the outputs as they are.
        """
        with self.runner.running(indices) as batch:
            outputs = logits_at(model, *batch.where, batch.inputs)
        logits = outputs.logits.clone() if return_outputs else outputs.logits
        if self.base is None or not (indices >= self.rows.first_kept).any():
            sums = token_losses(logits, batch.labels, batch.scored).sum(dim=1)
        else:
            losses = self._losses_beside_base(self.base, indices, batch, logits)
            sums = torch.zeros(len(indices), device=losses.device).index_add(0, batch.scored.rows, losses)
        return sums / self.num_scored[indices].to(logits.device), outputs

    def _losses_beside_base(
        self, base: BaseDistributions, indices: torch.Tensor, batch: MicroBatch, logits: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of every scored token, (positions,), where some rows are held to the base: one softmax."""
        rows = indices[indices >= self.rows.first_kept]
        of_base = base.tokens(rows)
        is_kept = (indices >= self.rows.first_kept).to(logits.device)[batch.scored.rows]
        # a target is one token, and stands in every column of its row
        tokens = batch.labels[batch.scored.rows, batch.scored.columns].unsqueeze(1).repeat(1, of_base.shape[1])
        tokens[is_kept] = of_base
        log_probs = log_probabilities(logits, tokens)
        return (-log_probs[:, 0]).masked_scatter(is_kept, base.divergences(rows, log_probs[is_kept]))

    def figures(self, losses: torch.Tensor, indices: torch.Tensor, weight: BatchWeight) -> torch.Tensor:
        """Return the shares of a micro-batch in the loss of its batch, and how many of its edits are not learned yet.

        An edit is learned where its whole target is more probable than all else together.

        Args:
            losses: (B,) from a call, on any device.
            indices: (B,)
            weight: of the batch.

        Returns:
            (3,): the share of targets, that of what is kept, and the number, where forwards run.
        """
        losses = losses.to(self.runner.device)
        is_target, is_edit = indices < self.rows.first_kept, indices < self.rows.num_edits
        targets = (losses[is_target] * self.counts[indices[is_target]].to(losses.device)).sum()
        kept = losses[~is_target].sum()
        of_edits = losses[is_edit] * self.num_scored[indices[is_edit]].to(losses.device)
        unlearned = (of_edits.detach() >= math.log(2)).sum()
        return torch.stack([targets / (weight.targets or 1), self.kept_weight * kept / (weight.kept or 1), unlearned])
