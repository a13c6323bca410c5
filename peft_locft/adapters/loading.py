"""Loads adapters onto a model: what does not fit is a ValueError that names the adapter."""

from __future__ import annotations

import os
import warnings

from peft import PeftConfig, PeftModel
from torch import nn


def base_of(adapter: str | os.PathLike[str]) -> str:
    """Return the base model that an adapter names.

    Args:
        adapter: a local adapter folder, or a name on the Hub.

    Raises:
        ValueError: if there is no adapter, or it names no base.
    """
    try:
        name = PeftConfig.from_pretrained(os.fspath(adapter)).base_model_name_or_path
    except ValueError as error:
        raise ValueError(
            f"{adapter}: found no adapter ({error}); expected a folder that `locft train` wrote, or a name on the Hub."
        ) from None
    if not name:
        raise ValueError(f"{adapter}: the adapter does not name its base model. Pass model_name_or_path.")
    return str(name)


def load_adapter(
    model: nn.Module, adapter: str | os.PathLike[str], adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Return a model with an adapter, beside those that it has.

    The base is not compared with the one of the adapter's training: call `check_base` or `differing_from_base`.

    Args:
        model: the base; or a `PeftModel`, which gets one more adapter.
        adapter: a PEFT adapter of any method: a local folder or a name on the Hub.
        adapter_name: its name in the model.
        is_trainable: whether to train its weights.

    Raises:
        ValueError: if the adapter does not fit the model, or PEFT cannot load it.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was trained on another base")  # the caller compares
            if not isinstance(model, PeftModel):
                return PeftModel.from_pretrained(model, os.fspath(adapter), adapter_name, is_trainable=is_trainable)
            model.load_adapter(os.fspath(adapter), adapter_name, is_trainable=is_trainable)
            return model
    except RuntimeError as error:
        found = f"the adapter does not fit the base model {getattr(model, 'name_or_path', '')}: {_reason(error)}"
        raise ValueError(f"{adapter}: {found}. Pass the base that it was trained on.") from None
    except ValueError as error:
        raise ValueError(f"{adapter}: cannot load the adapter onto this model: {error}") from None


def _reason(error: RuntimeError) -> str:
    """Return the last line of torch's message about a state dict, which names a tensor and both shapes."""
    return str(error).strip().splitlines()[-1].strip().rstrip(".")
