"""Text of any kind, read whole and cut into windows of tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import datasets
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..engine.model_state import check_vocabulary, max_length

TextSource: TypeAlias = str | os.PathLike[str] | Sequence[str] | datasets.Dataset


def text_windows(
    text: TextSource, tokenizer: PreTrainedTokenizerBase, window: int, max_tokens: int, model: nn.Module | None = None
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


def joined_text(text: TextSource) -> str:
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
