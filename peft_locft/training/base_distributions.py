"""What the base says next at chosen positions, kept so that training can hold the edited model to it."""

from __future__ import annotations

import torch

K = 64


class BaseDistributions:
    """The base's next-token distributions at every scored position of some rows.

    Of each there are the `k` most probable tokens; all the others are one outcome together. 64 of them hold nearly all
    the probability, and take 512 bytes a position, where a whole distribution over 150,000 tokens takes 600,000.

    Args:
        rows: (rows,) the numbers of the rows, in rising order.
        counts: (rows,) how many scored positions each has.
        k: outcomes kept by themselves.
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

    def keep(self, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Keep what the base says on some rows.

        Args:
            rows: (B,) numbers of rows.
            logits: (positions, V) the base's, row by row.
        """
        log_probs, tokens = logits.float().log_softmax(-1).topk(min(self._k, logits.shape[-1]))
        if self._log_probs is None or self._tokens is None:
            shape = (int(self._begins[-1]), log_probs.shape[-1])
            self._log_probs = torch.empty(shape, device=logits.device)
            self._tokens = torch.empty(shape, dtype=torch.int32, device=logits.device)
        positions = self._positions(rows).to(logits.device)
        self._log_probs[positions], self._tokens[positions] = log_probs, tokens.int()

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the tokens that are outcomes by themselves at every scored position of some rows.

        Args:
            rows: (B,) numbers of rows that were kept.

        Returns:
            (positions, k) token ids, row by row.
        """
        assert self._tokens is not None
        return self._tokens[self._positions(rows).to(self._tokens.device)].long()

    def divergences(self, rows: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        """Return KL(base || model) at every scored position of some rows, in nats.

        Over the outcomes that are kept and one for all the others, so that it is a lower bound of the whole KL.

        Args:
            rows: (B,) numbers of rows that were kept.
            log_probs: (positions, k) the model's, of [`tokens`], row by row.

        Returns:
            (positions,)
        """
        assert self._log_probs is not None
        base = self._log_probs[self._positions(rows).to(log_probs.device)]
        others, base_others = _log_of_others(log_probs), _log_of_others(base)
        return (base.exp() * (base - log_probs)).sum(-1) + base_others.exp() * (base_others - others)


def _log_of_others(log_probs: torch.Tensor) -> torch.Tensor:
    # rounding may leave less than nothing
    return torch.log((1 - log_probs.exp().sum(-1)).clamp_min(1e-6))
