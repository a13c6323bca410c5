"""What an edit did to the model at large: perplexity and next-token KL on any text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import kl_div
from tqdm.auto import tqdm

from ..engine.model_state import evaluating
from .intervals import Array, Bootstrap
from .report import MetricResult

CELLS = 2**20  # logits are compared so many at a time: what fits in a processor's cache goes four times as fast
LARGEST_LOSS = 700.0  # nats; a float has no room for the exp of more


@dataclass(frozen=True)
class TextMeasurement:
    """What models say to windows of text.

    Args:
        losses: (windows, models) mean -log p of a window's tokens, the edited model first, then its base.
        divergences: (windows,) mean KL(base || edited) of its tokens, in nats; `None` without a base.
    """

    losses: Array
    divergences: Array | None

    def results(self, num_resamples: int, confidence: float, seed: int) -> dict[str, MetricResult]:
        """Return perplexity and KL, with the interval of a bootstrap over windows."""

        def perplexity(loss: Array) -> Array:
            return np.exp(np.minimum(loss, LARGEST_LOSS))

        columns = [*self.losses.T, *([] if self.divergences is None else [self.divergences])]
        bootstrap = Bootstrap(np.stack(columns, axis=1), num_resamples, confidence, seed)
        after = bootstrap.statistic(lambda means: perplexity(means[..., 0]))
        before = change = None
        if self.divergences is not None:
            before = bootstrap.statistic(lambda means: perplexity(means[..., 1]))
            change = bootstrap.statistic(lambda means: perplexity(means[..., 0]) - perplexity(means[..., 1]))
        assert after is not None
        meaning = "exp of the mean -log p of a text's tokens"
        found = {"perplexity": MetricResult(meaning, after, before, change, len(self.losses), "windows")}
        divergence = None if self.divergences is None else bootstrap.statistic(lambda means: means[..., 2])
        if divergence is not None:
            meaning = "mean KL divergence of the edited model's next token from the base's on the text, in nats"
            found["kl_from_base"] = MetricResult(meaning, divergence, None, None, len(self.losses), "windows")
        return found


def measure_text(
    model: nn.Module,
    windows: torch.Tensor,
    base: nn.Module | None = None,
    disabled: Callable[[], AbstractContextManager[Any]] | None = None,
    progress: bool = True,
    kept: list[torch.Tensor] | None = None,
) -> TextMeasurement:
    """Read windows of text with a model and its base.

    Args:
        model: the edited model.
        windows: (windows, window) token ids.
        base: what its base is to be had from.
        disabled: makes the base answer as such; `None`: there is no base.
        progress: show a progress bar.
        kept: where the base's logits of each window are kept, (window - 1, V), for the next model on the same windows;
            empty at first.

    Raises:
        FloatingPointError: if the logits of a model are NaN or infinite.
    """
    measured = []
    bar = tqdm(windows, desc="reading text", leave=False, disable=not progress or len(windows) < 4)
    for number, window in enumerate(bar):
        logits = [_logits(model, window)]
        if kept is not None and number < len(kept):
            logits.append(kept[number])
        elif disabled is not None and base is not None:
            with disabled():
                logits.append(_logits(base, window))
            if kept is not None:
                kept.append(logits[-1])
        measured.append(_compare(logits, window[1:]))
        del logits  # before there are those of the next window
    table = np.array(measured)
    return TextMeasurement(table[:, :1], None) if table.shape[1] == 1 else TextMeasurement(table[:, :2], table[:, 2])


def _logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Return the logits of every next token, (window - 1, V), as the model gives them."""
    with evaluating(model):
        device = model.get_input_embeddings().weight.device
        logits: torch.Tensor = model(input_ids=window[None].to(device), use_cache=False).logits[0, :-1]
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise FloatingPointError(
            "The model's logits are NaN or infinite on the text, so that it has no perplexity. Load it in float32 or "
            "bfloat16, and check that its weights, and the adapter's, are finite."
        )
    return logits


def _compare(logits: list[torch.Tensor], targets: torch.Tensor) -> list[float]:
    """Return the mean -log p of a window by the edited model and its base, if there is one, and then their KL."""
    device = logits[0].device
    targets = targets[:, None].to(device)
    total = torch.zeros(len(logits) * 2 - 1, dtype=torch.float64, device=device)
    num_rows = max(1, CELLS // logits[0].shape[1])
    for begin in range(0, len(targets), num_rows):
        rows = slice(begin, begin + num_rows)
        log_probs = [each[rows].to(device, torch.float32).log_softmax(dim=-1) for each in logits]
        sums = [-each.gather(1, targets[rows]).sum() for each in log_probs]
        if len(log_probs) == 2:
            edited, base = log_probs
            sums.append(kl_div(edited, base, reduction="sum", log_target=True))
        total += torch.stack(sums)
    return (total / len(targets)).tolist()
