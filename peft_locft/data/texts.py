"""Text from a file, a dataset or a list, as one string or as windows of tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

import datasets
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..engine.model_state import check_vocabulary, max_length
from .text_files import read_text

TextSource: TypeAlias = str | os.PathLike[str] | Sequence[str] | datasets.Dataset


def text_windows(
    text: TextSource, tokenizer: PreTrainedTokenizerBase, window: int, max_tokens: int, model: nn.Module | None = None
) -> torch.Tensor:
    """Tokenize a text and cut it into windows that do not overlap.

    Args:
        text: a UTF-8 file; a dataset with a column `text`, or its "owner/name" on the Hub (split `test`); or a list of
            texts, joined by blank lines.
        tokenizer: it is not changed.
        window: number of tokens in a window, at least 2, since the first is not predicted.
        max_tokens: number of tokens of the text to use at most.
        model: the model that reads the windows, to check its positions and vocabulary.

    Returns:
        (windows, window) token ids; the rest of the text is not used.

    Raises:
        ValueError: if the text cannot be read or has fewer tokens than a window; if `window` is not in 2 to
            `max_tokens`; if the model has fewer positions or a smaller vocabulary.
    """
    if not 2 <= window <= max_tokens:
        raise ValueError(f"text: found a window of {window} tokens; expected 2 to max_tokens={max_tokens}")
    positions = None if model is None else max_length(model)
    if positions is not None and window > positions:
        raise ValueError(f"text: found a window of {window} tokens; the model has only {positions} positions")
    joined = joined_text(text)
    # do not tokenize megabytes of text for a few thousand tokens
    ids = tokenizer(joined[: 20 * max_tokens], verbose=False)["input_ids"][:max_tokens]
    if len(ids) < window:
        raise ValueError(f"text: found {len(ids)} tokens; expected at least a window of {window}: give more text")
    windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    if model is not None:
        check_vocabulary(model, windows)
    return windows


def joined_text(text: TextSource) -> str:
    """Return a text as one string; arguments and errors as in [`text_windows`]."""
    if isinstance(text, (str, os.PathLike)):
        if os.path.isfile(text):
            return read_text(text)
        try:
            text = datasets.load_dataset(str(text), split="test")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"text: found neither a file nor a dataset on the Hub named {str(text)[:80]!r} ({str(error)[:200]}). "
                "To pass a text itself, put it into a list."
            ) from error
    if isinstance(text, datasets.Dataset):
        if "text" not in text.column_names:
            raise ValueError(f"text: found the columns {', '.join(text.column_names)}; expected one named text")
        text = text["text"]
    texts = list(text)
    for number, each in enumerate(texts):
        if not isinstance(each, str):
            raise ValueError(f"text[{number}]: found {type(each).__name__}; expected a string")
    return "\n\n".join(texts)
