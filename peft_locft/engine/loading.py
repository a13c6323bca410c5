"""Load a model and its tokenizer by name."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer


def load_model(model_name_or_path: str | os.PathLike[str], dtype: str = "auto", **source: Any) -> tuple[Any, Any]:
    """Return a model and its tokenizer.

    Args:
        model_name_or_path: a folder or a name on the Hub.
        dtype: `"auto"` (the checkpoint's), `"float32"`, `"bfloat16"` or `"float16"`.
        source: `revision` and `trust_remote_code`, for `from_pretrained`.

    Raises:
        OSError: if they cannot be loaded; the message names the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **source)
        return AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype=dtype, **source), tokenizer
    except OSError as error:
        # without network, transformers' message does not name the model
        raise OSError(f"{model_name_or_path}: the base model and its tokenizer cannot be loaded: {error}") from error
