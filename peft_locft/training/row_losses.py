"""The losses of training rows: towards a target, or towards the base's next-token distribution."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data.encoding import EncodedEdits
from ..engine.activation_storage import SharedActivations
from ..engine.tail import logits_at
from .config import BreadthFirstConfig
from .edit_runner import EditRunner, MicroBatch
from .objectives import LossAveraging, log_probabilities, row_counts, token_losses
from .training_rows import TrainingRows

K = 64


class BaseDistributions:
    """The base's next-token distributions at every scored position of some rows.

    Each stores the `k` most probable tokens; all others are one outcome together. 64 tokens hold nearly all the
    probability in 512 bytes a position; a full distribution over 150,000 tokens takes 600,000.

    Args:
        rows: (rows,) indices of the rows, in rising order.
        counts: (rows,) scored positions of each.
        k: number of tokens that are stored one by one.
    """

    def __init__(self, rows: torch.Tensor, counts: torch.Tensor, k: int = K) -> None:
        self._rows = rows
        self._begins = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self._k = k
        self._log_probs: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None

    def _positions(self, rows: torch.Tensor) -> torch.Tensor:
        numbers = torch.searchsorted(self._rows, rows)
        ranges = zip(self._begins[numbers].tolist(), self._begins[numbers + 1].tolist(), strict=True)
        return torch.cat([torch.arange(begin, end) for begin, end in ranges])

    def store(self, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Store the base's distributions on some rows.

        Args:
            rows: (B,) indices of rows.
            logits: (positions, V) of the base, row by row.
        """
        log_probs, tokens = logits.float().log_softmax(-1).topk(min(self._k, logits.shape[-1]))
        if self._log_probs is None or self._tokens is None:
            shape = (int(self._begins[-1]), log_probs.shape[-1])
            self._log_probs = torch.empty(shape, device=logits.device)
            self._tokens = torch.empty(shape, dtype=torch.int32, device=logits.device)
        positions = self._positions(rows).to(logits.device)
        self._log_probs[positions], self._tokens[positions] = log_probs, tokens.int()

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the stored tokens at every scored position of some rows.

        Args:
            rows: (B,) indices of stored rows.

        Returns:
            (positions, k) token ids, row by row.
        """
        assert self._tokens is not None
        return self._tokens[self._positions(rows).to(self._tokens.device)].long()

    def divergences(self, rows: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        """Return KL(base || model) at every scored position of some rows, in nats.

        Computed over the stored tokens and one outcome for all others: a lower bound of the full KL.

        Args:
            rows: (B,) indices of stored rows.
            log_probs: (positions, k) of the model, for [`tokens`], row by row.

        Returns:
            (positions,)
        """
        assert self._log_probs is not None
        base = self._log_probs[self._positions(rows).to(log_probs.device)]
        others, base_others = _log_of_others(log_probs), _log_of_others(base)
        return (base.exp() * (base - log_probs)).sum(-1) + base_others.exp() * (base_others - others)


def _log_of_others(log_probs: torch.Tensor) -> torch.Tensor:
    # rounding may make this negative
    return torch.log((1 - log_probs.exp().sum(-1)).clamp_min(1e-6))


class BatchWeight(NamedTuple):
    """What the losses of a batch are divided by: the weight of its targets, and the number of its retained rows."""

    targets: float
    retained: int


class RowLosses:
    """Computes the losses of rows, and their shares in the loss of a batch.

    Args:
        rows: which rows are of which kind.
        runner: runs the model on them.
        num_scored: (rows,) scored tokens of each.
        loss_averaging: what has the same weight in a batch, see `row_counts`.
        variant_weight: weight of a variant; an edit has 1.
        retained_weight: weight of the mean loss of a batch's retained rows; the mean of its targets has 1.
        to_base: retained rows are trained towards the base's distributions; otherwise towards targets.
    """

    def __init__(
        self,
        rows: TrainingRows,
        runner: EditRunner,
        num_scored: torch.Tensor,
        loss_averaging: LossAveraging,
        variant_weight: float,
        retained_weight: float,
        to_base: bool,
    ) -> None:
        self.rows = rows
        self.runner = runner
        self.num_scored = num_scored
        self.retained_weight = retained_weight
        weights = torch.ones(len(num_scored))
        weights[rows.num_edits : rows.first_retained] = variant_weight
        self.counts = row_counts(num_scored, loss_averaging, weights)
        self.to_base = to_base and rows.num_retained > 0
        self.base: BaseDistributions | None = None

    @classmethod
    def of(
        cls,
        encoded: EncodedEdits,
        rows: TrainingRows,
        args: BreadthFirstConfig,
        shared: SharedActivations | None = None,
    ) -> RowLosses:
        """Make the losses of a recipe.

        Args:
            encoded: all rows.
            rows: which rows are of which kind.
            args: the recipe, and the index of this process.
            shared: see `EditRunner`.
        """
        own = torch.arange(min(args.process_index, len(encoded) - 1), len(encoded), args.world_size)
        runner = EditRunner(encoded, own, args.objective, args.max_tokens_per_micro_batch, args.device, shared)
        return cls(
            rows,
            runner,
            encoded.lengths - (1 if args.objective == "full" else encoded.target_starts),
            args.loss_averaging or "edit",
            args.variant_weight,
            args.retained_weight or 0.0,
            to_base=args.retained_loss == "kl",
        )

    def store_base(self, model: nn.Module, disabled: AbstractContextManager[Any]) -> None:
        """Store the base's distributions on the retained rows of this process.

        Args:
            model: the model, in evaluation mode.
            disabled: a context in which it is its base.
        """
        own = self.runner.own[self.runner.own >= self.rows.first_retained]
        if self.to_base and len(own) and self.base is None:
            with disabled:
                self.base = self.runner.halving(lambda: self._base_distributions(model, own))

    @torch.no_grad()
    def _base_distributions(self, model: nn.Module, rows: torch.Tensor) -> BaseDistributions:
        base = BaseDistributions(rows, self.num_scored[rows])
        for indices in self.runner.micro_batches(rows):
            with self.runner.micro_batch(indices) as batch:
                base.store(indices, logits_at(model, *batch.where, batch.inputs).logits)
        return base

    def weight(self, indices: torch.Tensor) -> BatchWeight:
        targets = indices[indices < self.rows.first_retained]
        return BatchWeight(float(self.counts[targets].sum()), len(indices) - len(targets))

    def __call__(self, model: nn.Module, batch: MicroBatch, keep_logits: bool = False) -> tuple[torch.Tensor, Any]:
        """Return the mean loss over each row's scored tokens, (B,), and the model's outputs.

        Args:
            model: the model.
            batch: (B,) rows of any kind, from `EditRunner.micro_batch`.
            keep_logits: do not overwrite the logits in the outputs.
        """
        indices = batch.indices
        outputs = logits_at(model, *batch.where, batch.inputs)
        logits = outputs.logits.clone() if keep_logits else outputs.logits
        if self.base is None or not (indices >= self.rows.first_retained).any():
            sums = token_losses(logits, batch.labels, batch.scored).sum(dim=1)
        else:
            losses = self._losses_beside_base(self.base, batch, logits)
            sums = torch.zeros(len(indices), device=losses.device).index_add(0, batch.scored.rows, losses)
        return sums / self.num_scored[indices].to(logits.device), outputs

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Return whether each target is the greedy answer, 0 or 1, and its log-probability, (B, 2) float32.

        Args:
            model: the model.
            batch: (B,) rows of edits.
        """
        scored, logits = batch.scored, logits_at(model, *batch.where, batch.inputs).logits
        tokens = batch.labels[scored.rows, scored.columns]
        # with the objective "full" the prompt is scored, too
        in_target = (
            scored.columns >= self.runner.edits.target_starts[batch.indices].to(scored.rows.device)[scored.rows]
        )
        misses = ((logits.argmax(-1) != tokens) & in_target).float()
        log_probs = log_probabilities(logits, tokens.unsqueeze(1)).squeeze(1) * in_target
        sums = torch.zeros(len(batch.indices), 2, device=logits.device)
        sums.index_add_(0, scored.rows, torch.stack([misses, log_probs], dim=1))
        sums[:, 0] = (sums[:, 0] == 0).float()
        return sums

    def _losses_beside_base(self, base: BaseDistributions, batch: MicroBatch, logits: torch.Tensor) -> torch.Tensor:
        """Return the loss of every scored token, (positions,), of targets and retained rows in one softmax."""
        retained = batch.indices >= self.rows.first_retained
        rows = batch.indices[retained]
        of_base = base.tokens(rows)
        is_retained = retained.to(logits.device)[batch.scored.rows]
        # a target token fills every column of its row
        tokens = batch.labels[batch.scored.rows, batch.scored.columns].unsqueeze(1).repeat(1, of_base.shape[1])
        tokens[is_retained] = of_base
        log_probs = log_probabilities(logits, tokens)
        return (-log_probs[:, 0]).masked_scatter(is_retained, base.divergences(rows, log_probs[is_retained]))

    def batch_shares(self, losses: torch.Tensor, indices: torch.Tensor, weight: BatchWeight) -> torch.Tensor:
        """Return the shares of some rows in the loss of their batch, and the number of edits not learned yet.

        An edit is learned once its whole target is more probable than everything else together.

        Args:
            losses: (B,) from a call.
            indices: (B,) the rows.
            weight: of the batch.

        Returns:
            (3,): the share of targets, the share of retained rows, the number of unlearned edits.
        """
        losses = losses.to(self.runner.device)
        is_target, is_edit = indices < self.rows.first_retained, indices < self.rows.num_edits
        targets = (losses[is_target] * self.counts[indices[is_target]].to(losses.device)).sum()
        retained = losses[~is_target].sum()
        of_edits = losses[is_edit] * self.num_scored[indices[is_edit]].to(losses.device)
        unlearned = (of_edits.detach() >= math.log(2)).sum()
        return torch.stack(
            [targets / (weight.targets or 1), self.retained_weight * retained / (weight.retained or 1), unlearned]
        )
