"""The effect of an edit on the model as a whole: perplexity and next-token KL on any text."""

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
from .kinds import OF_TEXT_ONLY
from .metric_result import MetricResult

MAX_LOGITS = 2**20  # compared at a time: what fits into a processor's cache is four times as fast
LARGEST_LOSS = 700.0  # nats; exp of more overflows a float


@dataclass(frozen=True)
class TextMeasurement:
    """Losses on windows of text.

    Args:
        losses: (windows, models), mean -log p of a window's tokens in nats; the edited model first, then its base.
        divergences: (windows,), mean KL(base || edited) over a window's tokens in nats; `None` without a base.
    """

    losses: Array
    divergences: Array | None

    def metric_results(self, num_resamples: int, confidence: float, seed: int) -> dict[str, MetricResult]:
        """Return perplexity and KL, each with the interval of a bootstrap over windows."""

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
        meaning = "exp of the mean -log p of the text's tokens"
        unit = (len(self.losses), "windows", OF_TEXT_ONLY)
        metrics = {"perplexity": MetricResult(meaning, after, before, change, *unit, "PPL, perplexity")}
        divergence = None if self.divergences is None else bootstrap.statistic(lambda means: means[..., 2])
        if divergence is not None:
            meaning = "mean KL divergence of the next-token distribution from the base's on the text, in nats"
            metrics["kl_from_base"] = MetricResult(meaning, divergence, None, None, *unit, "KL")
        return metrics


def measure_text(
    model: nn.Module,
    windows: torch.Tensor,
    base: nn.Module | None = None,
    as_base: Callable[[], AbstractContextManager[Any]] | None = None,
    progress: bool = True,
    base_logits: list[torch.Tensor] | None = None,
) -> TextMeasurement:
    """Return the losses of a model and its base on windows of text.

    Args:
        model: the edited model.
        windows: (windows, window) token ids.
        base: the base, or the edited model if its adapter can be disabled.
        as_base: returns a context in which `base` answers as the base; `None` if there is no base.
        progress: show a progress bar.
        base_logits: cache of the base's logits, (window - 1, V) for each window, for further models on the same
            windows; pass an empty list at first.

    Raises:
        FloatingPointError: if the logits of a model are NaN or infinite.
    """
    measured = []
    bar = tqdm(windows, desc="measuring text", leave=False, disable=not progress or len(windows) < 4)
    for number, window in enumerate(bar):
        logits = [_logits(model, window)]
        if base_logits is not None and number < len(base_logits):
            logits.append(base_logits[number])
        elif as_base is not None and base is not None:
            with as_base():
                logits.append(_logits(base, window))
            if base_logits is not None:
                base_logits.append(logits[-1])
        measured.append(_compare(logits, window[1:]))
        del logits  # before the next window's are computed
    table = np.array(measured)
    return TextMeasurement(table[:, :1], None) if table.shape[1] == 1 else TextMeasurement(table[:, :2], table[:, 2])


def _logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Return the logits of every next token, (window - 1, V), in the model's dtype."""
    with evaluating(model):
        input_ids = window[None].to(model.get_input_embeddings().weight.device)
        outputs = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
        logits: torch.Tensor = outputs.logits[0, :-1]
    return finite_logits(logits, "the text")


def finite_logits(logits: torch.Tensor, source: str) -> torch.Tensor:
    """Return logits, (…, V), after a check that all are finite.

    Args:
        logits: the logits.
        source: what the model read, for the error.

    Raises:
        FloatingPointError: if a logit is NaN or infinite.
    """
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise FloatingPointError(
            f"The model's logits on {source} are NaN or infinite. Load the model in float32 or bfloat16, and check "
            "that its weights and the adapter's are finite."
        )
    return logits


def _compare(logits: list[torch.Tensor], targets: torch.Tensor) -> list[float]:
    """Return the mean -log p of a window's tokens for each model, then the KL if there are two."""
    device = logits[0].device
    targets = targets[:, None].to(device)
    total = torch.zeros(len(logits) * 2 - 1, dtype=torch.float64, device=device)
    num_rows = max(1, MAX_LOGITS // logits[0].shape[1])
    for begin in range(0, len(targets), num_rows):
        rows = slice(begin, begin + num_rows)
        log_probs = [each[rows].to(device, torch.float32).log_softmax(dim=-1) for each in logits]
        sums = [-each.gather(1, targets[rows]).sum() for each in log_probs]
        if len(log_probs) == 2:
            edited, base = log_probs
            sums.append(kl_div(edited, base, reduction="sum", log_target=True))
        total += torch.stack(sums)
    return (total / len(targets)).tolist()
