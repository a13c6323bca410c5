"""The losses, as pure functions of logits and labels."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

Objective = Literal["target_new", "prompt_last", "full"]
LossAveraging = Literal["edit", "token"]

IGNORED = -100
ROWS = 16  # of logits that are computed together


def labels_for(
    objective: Objective, input_ids: torch.Tensor, attention_mask: torch.Tensor, target_start: torch.Tensor
) -> torch.Tensor:
    """Return the token ids that an objective scores, (B, T), and -100 everywhere else.

    Args:
        objective: `"full"` scores every token, `"target_new"` and `"prompt_last"` only the target.
        input_ids: (B, T) token ids, padded on the right.
        attention_mask: (B, T), 0 on padding.
        target_start: (B,) position of the first target token.

    Returns:
        (B, T) token ids.
    """
    if objective == "full":
        # nothing predicts the first token
        scored = attention_mask.bool() & (torch.arange(input_ids.shape[1], device=input_ids.device) > 0)
    else:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        scored = attention_mask.bool() & (positions >= target_start.unsqueeze(1))
    return input_ids.masked_fill(~scored, IGNORED)


class Scored(NamedTuple):
    """Which logits score which tokens: the token at (rows, columns) by the logits at (rows, sources)."""

    rows: torch.Tensor
    columns: torch.Tensor
    sources: torch.Tensor


def scored_positions(labels: torch.Tensor, objective: Objective) -> Scored:
    """Return the positions that an objective scores, row by row.

    `"target_new"` (LocFT-BF with EOS, FT-M without) and `"full"` are autoregressive: the token at position t is scored
    by the logits at t - 1. `"prompt_last"` (FT-L) scores every target token by the logits of the last prompt token, as
    EasyEdit does: -log p(y_t | x). For targets of two or more tokens that is no likelihood of a language model; it
    is here as a baseline of the field.

    Args:
        labels: (B, T) token ids, -100 where nothing is scored; position 0 is never scored.

    Returns:
        Three tensors, (scored tokens,) each.
    """
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    columns = columns + 1
    last_of_prompt = (labels != IGNORED).int().argmax(dim=1) - 1
    return Scored(rows, columns, last_of_prompt[rows] if objective == "prompt_last" else columns - 1)


def token_losses(logits: torch.Tensor, labels: torch.Tensor, scored: Scored) -> torch.Tensor:
    """Return -log p of every scored token, (B, T), in float32.

    Args:
        logits: (scored tokens, V), at `scored.sources`; float32 logits of a model are overwritten.
        labels: (B, T) token ids, -100 where nothing is scored.
        scored: from [`scored_positions`].

    Returns:
        (B, T) losses, 0 where nothing is scored.
    """
    losses = -log_probabilities(logits, labels[scored.rows, scored.columns].unsqueeze(1)).squeeze(1)
    return torch.zeros(labels.shape, device=logits.device).index_put((scored.rows, scored.columns), losses)


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of k tokens at every position, (positions, k), in float32.

    Args:
        logits: (positions, V); float32 logits of a model are overwritten.
        tokens: (positions, k) token ids, int64.

    Returns:
        (positions, k)
    """
    if logits.is_leaf:
        logits = logits.clone()  # the caller's own
    return _LogProbabilities.apply(logits, tokens)


class _LogProbabilities(torch.autograd.Function):
    """`logits.float().log_softmax(-1).gather(-1, tokens)` in one buffer, the float32 logits themselves.

    torch's functions allocate three more of that size, the largest tensors of a step, and their sums are less exact.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        # if the function that made the logits needs them for its backward, autograd raises an error
        powers = logits.detach().float()
        log_probs, sums = [], []
        for rows, of_rows in zip(powers.split(ROWS), tokens.split(ROWS), strict=True):
            rows -= rows.amax(dim=1, keepdim=True)
            chosen = rows.gather(1, of_rows)
            sums.append(rows.exp_().sum(dim=1, keepdim=True))
            log_probs.append(chosen - sums[-1].log())
        ctx.of_logits, ctx.tokens, ctx.sums, ctx.dtype = powers, tokens, torch.cat(sums), logits.dtype
        return torch.cat(log_probs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_probs: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = ctx.of_logits.mul_(-of_log_probs.sum(dim=1, keepdim=True) / ctx.sums)
        gradient.scatter_add_(1, ctx.tokens, of_log_probs)
        del ctx.of_logits  # overwritten, so that there is no second backward
        return gradient.to(ctx.dtype), None


def row_counts(
    num_scored: torch.Tensor, loss_averaging: LossAveraging, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weight of each row's mean loss in the loss of a batch, (B,).

    The loss of a batch is Σ_b c_b l_b / Σ_b c_b, where l_b = (1/|y_b|) Σ_t -log p(y_b,t). With `"edit"` every row has
    the same weight (the published loss), with `"token"` every scored token has.

    Args:
        num_scored: (B,) scored tokens of every row, |y_b|.
        loss_averaging: `"edit"` or `"token"`.
        weights: (B,) a factor for each row; `None`: 1.

    Returns:
        (B,) c_b, float32.
    """
    counts = torch.ones(len(num_scored)) if loss_averaging == "edit" else num_scored.float()
    return counts if weights is None else counts * weights
