"""A model and its tokenizer by name."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer


def load_model(model_name_or_path: str | os.PathLike[str], dtype: str = "auto", **source: Any) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        model_name_or_path: a folder or a name on the Hub.
        dtype: `"auto"` (as the checkpoint says), `"float32"`, `"bfloat16"` or `"float16"`.
        source: `revision` and `trust_remote_code`, as transformers knows them.

    Raises:
        OSError: if they cannot be loaded; the message names what was asked for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **source)
        return AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype=dtype, **source), tokenizer
    except OSError as error:
        # where there is no network, its message does not say what was asked for
        raise OSError(f"{model_name_or_path}: the base model and its tokenizer cannot be loaded: {error}") from error
