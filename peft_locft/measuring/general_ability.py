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
from torch.nn.functional import kl_div
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..running.decoding import evaluating
from ..running.model_state import check_vocabulary, max_length
from .bootstrap import Array, Bootstrap
from .evaluation_report import Result

CELLS = 2**20  # logits are compared so many at a time: what fits in a processor's cache goes four times as fast
LARGEST_LOSS = 700.0  # nats; a float has no room for the exp of more

Text: TypeAlias = str | os.PathLike[str] | Sequence[str] | datasets.Dataset


def text_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, window: int, max_tokens: int, model: nn.Module | None = None
) -> torch.Tensor:
    """Tokenise a text whole, and cut it into windows that do not overlap.

    Args:
        text: a UTF-8 file; a dataset with the column `text`, or its "owner/name" on the Hub (its split `test`); or
            texts, joined by blank lines.
        tokenizer: left as it is.
        window: tokens in a window, at least 2: the first is not predicted.
        max_tokens: of the text at most.
        model: the one that is to read them: it must have that many positions, and know the tokens.

    Returns:
        (windows, window) token ids; what is left of the text is not used.

    Raises:
        ValueError: if the text cannot be read, or has fewer tokens than a window; if a window is not of 2 to
            `max_tokens` tokens; if the model has fewer positions, or does not know a token.
    """
    if not 2 <= window <= max_tokens:
        raise ValueError(f"text: found a window of {window} tokens; expected 2 to {max_tokens}, which is all it reads")
    positions = None if model is None else max_length(model)
    if positions is not None and window > positions:
        raise ValueError(f"text: found a window of {window} tokens; the model has {positions} positions: lower it")
    joined = joined_text(text)
    # a text of megabytes is not tokenised for a few thousand tokens of it
    ids = tokenizer(joined[: 20 * max_tokens], verbose=False)["input_ids"][:max_tokens]
    if len(ids) < window:
        raise ValueError(f"text: found {len(ids)} tokens; expected a window of {window} at least: give more text")
    windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    if model is not None:
        check_vocabulary(model, windows)
    return windows


def joined_text(text: Text) -> str:
    """Read a text whole; arguments and errors as [`text_windows`]."""
    if isinstance(text, (str, os.PathLike)):
        if os.path.isfile(text):
            try:
                return Path(text).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{text}: found {error.reason} at byte {error.start}; expected UTF-8 text") from None
        try:
            text = datasets.load_dataset(str(text), split="test")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"text: found neither a file nor a dataset on the Hub named {str(text)[:80]!r} ({str(error)[:200]}). "
                "A text itself is given in a list."
            ) from error
    if isinstance(text, datasets.Dataset):
        if "text" not in text.column_names:
            raise ValueError(f"text: found the columns {', '.join(text.column_names)}; expected one named text")
        text = text["text"]
    texts = list(text)
    for number, each in enumerate(texts):
        if not isinstance(each, str):
            raise ValueError(f"text: found {type(each).__name__} as number {number} of the texts; expected strings")
    return "\n\n".join(texts)


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
    kept: list[torch.Tensor] | None = None,
) -> TextMeasured:
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
    return TextMeasured(table[:, :1], None) if table.shape[1] == 1 else TextMeasured(table[:, :2], table[:, 2])


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
