"""What an edit did to the model at large: perplexity and next-token KL on any text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .bootstrap import Array, Bootstrap
from .decoding import evaluating
from .evaluation_report import Result

ROWS = 64  # logits are compared so many at a time

Text: TypeAlias = str | os.PathLike[str] | Sequence[str] | datasets.Dataset


def text_windows(text: Text, tokenizer: PreTrainedTokenizerBase, window: int, max_tokens: int) -> torch.Tensor:
    """Tokenise a text whole, and cut it into windows that do not overlap.

    Args:
        text: a UTF-8 file; a dataset with the column `text`, or its "owner/name" on the Hub (its split `test`); or
            texts, joined by blank lines.
        tokenizer: left as it is.
        window: tokens in a window, at least 2: the first is not predicted.
        max_tokens: of the text at most.

    Returns:
        (windows, window) token ids; what is left of the text is not used.

    Raises:
        ValueError: if the text cannot be read, or has fewer tokens than a window.
    """
    joined = _read(text)
    # a text of megabytes is not tokenised for a few thousand tokens of it
    ids = tokenizer(joined[: 20 * max_tokens], verbose=False)["input_ids"][:max_tokens]
    if len(ids) < window:
        raise ValueError(f"text: found {len(ids)} tokens; expected a window of {window} at least: give more text")
    return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)


def _read(text: Text) -> str:
    if isinstance(text, (str, os.PathLike)):
        path = Path(text)
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: found {error.reason} at byte {error.start}; expected UTF-8 text") from None
        try:
            text = datasets.load_dataset(str(text), split="test")
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{path}: found neither a text file nor a dataset on the Hub: {error}") from error
    if isinstance(text, datasets.Dataset):
        if "text" not in text.column_names:
            raise ValueError(f"text: found the columns {', '.join(text.column_names)}; expected one named text")
        text = text["text"]
    return "\n\n".join(text)


@dataclass(frozen=True)
class TextMeasured:
    """What models say to windows of text.

    Args:
        losses: (windows, models) mean -log p of a window's tokens, the edited model first, then its base.
        divergences: (windows,) mean KL(base || edited) of its tokens, in nats; `None` without a base.
    """

    losses: Array
    divergences: Array | None

    def results(self, num_resamples: int, confidence: float, seed: int) -> dict[str, Result]:
        """Return perplexity and KL, with the interval of a bootstrap over windows."""
        columns = [*self.losses.T, *([] if self.divergences is None else [self.divergences])]
        bootstrap = Bootstrap(np.stack(columns, axis=1), num_resamples, confidence, seed)
        after = bootstrap.statistic(lambda means: np.exp(means[..., 0]))
        before = change = None
        if self.divergences is not None:
            before = bootstrap.statistic(lambda means: np.exp(means[..., 1]))
            change = bootstrap.statistic(lambda means: np.exp(means[..., 0]) - np.exp(means[..., 1]))
        assert after is not None
        meaning = "exp of the mean -log p of a text's tokens"
        found = {"perplexity": Result(meaning, after, before, change, len(self.losses), "windows")}
        divergence = None if self.divergences is None else bootstrap.statistic(lambda means: means[..., 2])
        if divergence is not None:
            meaning = "mean KL divergence of the edited model's next token from the base's on the text, in nats"
            found["kl_from_base"] = Result(meaning, divergence, None, None, len(self.losses), "windows")
        return found


def measure_text(
    model: nn.Module,
    windows: torch.Tensor,
    base: nn.Module | None = None,
    disabled: Callable[[], AbstractContextManager[Any]] | None = None,
    progress: bool = True,
) -> TextMeasured:
    """Read windows of text with a model and its base.

    Args:
        model: the edited model.
        windows: (windows, window) token ids.
        base: what its base is to be had from.
        disabled: makes the base answer as such; `None`: there is no base.
        progress: show a progress bar.

    Raises:
        FloatingPointError: if the logits of a model are NaN or infinite.
    """
    losses, divergences = [], []
    bar = tqdm(windows, desc="reading text", leave=False, disable=not progress or len(windows) < 4)
    for window in bar:
        edited = _log_probs(model, window)
        row = [_loss(edited, window)]
        if disabled is not None and base is not None:
            with disabled():
                original = _log_probs(base, window)
            row.append(_loss(original, window))
            pairs = zip(original.split(ROWS), edited.split(ROWS), strict=True)
            total = sum(float((one.exp() * (one - other)).sum()) for one, other in pairs)
            divergences.append(total / len(original))
        losses.append(row)
    return TextMeasured(np.array(losses), np.array(divergences) if divergences else None)


def _log_probs(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Return log p of every next token, (window - 1, V), in float32."""
    with evaluating(model):
        device = model.get_input_embeddings().weight.device
        logits = model(input_ids=window[None].to(device), use_cache=False).logits[0, :-1].float()
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise FloatingPointError(
            "The model's logits are NaN or infinite on the text, so that it has no perplexity. Load it in float32 or "
            "bfloat16, and check that its weights, and the adapter's, are finite."
        )
    return logits.log_softmax(dim=-1)


def _loss(log_probs: torch.Tensor, window: torch.Tensor) -> float:
    return -float(log_probs.gather(1, window[1:, None].to(log_probs.device)).mean())
