"""Load a model and its tokenizer by name."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
AUTO_CLASSES = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}


def load_model(model_name_or_path: str | os.PathLike[str], dtype: str = "auto", **source: Any) -> tuple[Any, Any]:
    """Return a decoder-only model and its fast tokenizer.

    A model that reads images beside text is loaded whole, to be edited as a language model.

    Args:
        model_name_or_path: a folder or a name on the Hub.
        dtype: `"auto"` (the checkpoint's), `"float32"`, `"bfloat16"` or `"float16"`.
        source: `revision` and `trust_remote_code`, for `from_pretrained`.

    Raises:
        ValueError: if it is not a decoder-only language model; if its checkpoint lacks weights of one; if it has no
            fast tokenizer; if transformers does not know its kind. The message names the model.
        OSError: if they cannot be loaded; the message names the model.
    """
    try:
        auto_class = auto_class_of(load_config(model_name_or_path, **source), model_name_or_path)
        tokenizer = _load_tokenizer(model_name_or_path, **source)
        model, loaded = auto_class.from_pretrained(model_name_or_path, dtype=dtype, output_loading_info=True, **source)
    except (OSError, SafetensorError) as error:
        # without network, transformers' message does not name the model
        raise OSError(f"{model_name_or_path}: the base model and its tokenizer cannot be loaded: {error}") from error
    _check_complete(model, loaded["missing_keys"], model_name_or_path)
    return model, tokenizer


def load_config(model_name_or_path: str | os.PathLike[str], **source: Any) -> Any:
    """Return a model's configuration.

    Raises:
        ValueError: if transformers does not know the kind of model; the message names it.
        OSError: if it cannot be loaded.
    """
    if not isinstance(model_name_or_path, (str, os.PathLike)):
        found = f"found a {type(model_name_or_path).__name__}"
        advice = "for a model in memory use edit(model, tokenizer, …), BreadthFirstTrainer or evaluate_edits"
        raise ValueError(f"model_name_or_path: {found}; expected a folder or a name on the Hub: {advice}")
    folder = Path(model_name_or_path)
    if folder.is_file():
        advice = "Are the model and the edits swapped?" if folder.suffix != ".gguf" else "Convert it first."
        raise ValueError(f"{folder}: found a file; expected the folder or the name of a whole model. {advice}")
    if not folder.exists() and HUB_NAME.fullmatch(str(model_name_or_path)) is None:
        expected = "expected the folder or the name of a whole model"
        raise ValueError(f"{folder}: found no such folder; {expected}.{_near(folder)}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        found = "an adapter" if is_adapter else "no config.json"
        raise ValueError(f"{folder}: found {found}; expected the folder or the name of a whole model")
    try:
        return AutoConfig.from_pretrained(model_name_or_path, **source)
    except ValueError as error:
        # what follows the first paragraph is advice to install other versions
        reason = str(error).partition("\n\n")[0]
        raise ValueError(f"{model_name_or_path}: the configuration cannot be loaded: {reason}") from error


def _near(folder: Path) -> str:
    """Return a question about a folder with a similar name, with a space before it; empty without one."""
    beside = [each.name for each in folder.parent.iterdir() if each.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, beside, n=1)
    return f" Did you mean {folder.parent / near[0]}?" if near else ""


def auto_class_of(config: Any, name: str | os.PathLike[str]) -> Any:
    """Return the class that loads a decoder-only language model, with or without images as inputs.

    Args:
        config: the model's configuration.
        name: the model's name, for the message.

    Raises:
        ValueError: if transformers has no decoder-only language model of this configuration.
    """
    found = f"{name}: found {type(config).__name__} (model_type {config.model_type!r})"
    advice = "Choose a model that transformers loads with AutoModelForCausalLM, such as Llama or Qwen."
    if getattr(config, "is_encoder_decoder", False):
        # BART's decoder alone loads too, with new random weights for its head
        raise ValueError(f"{found}, an encoder-decoder; expected a decoder-only language model. {advice}")
    own_code = getattr(config, "auto_map", None) or {}
    for auto_class, mapping in AUTO_CLASSES.items():
        if type(config) in mapping or auto_class.__name__ in own_code:
            return auto_class
    raise ValueError(f"{found}; expected a decoder-only language model. {advice}")


def task_type_of(model: Any) -> str | None:
    """Return PEFT's task type of a model, with which its Auto classes load an adapter and the right base.

    PEFT has none for models that read images; without one, `AutoPeftModel` loads the recorded class.
    """
    kind = type(model.config)
    reads_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return None if reads_images else "CAUSAL_LM"


def _load_tokenizer(name: str | os.PathLike[str], **source: Any) -> Any:
    expected = (
        "expected a fast tokenizer, a file tokenizer.json beside the model: save it there with "
        "AutoTokenizer.from_pretrained(other_name).save_pretrained(folder)"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except (OSError, ImportError):
        raise
    except Exception as error:  # tokenizers raises a plain Exception for a file that it cannot read
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: the tokenizer cannot be loaded ({reason}); {expected}") from error
    if not tokenizer.is_fast:
        found = f"found only the slow {type(tokenizer).__name__}, which has no offsets of its tokens"
        raise ValueError(f"{name}: {found}; {expected}")
    return tokenizer


def _check_complete(model: Any, missing: Any, name: str | os.PathLike[str]) -> None:
    """Refuse a model with new random weights, such as the head of a checkpoint that was saved without one."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    new = sorted(key for key in missing if key in parameters)
    if new:
        raise ValueError(
            f"{name}: the checkpoint lacks {len(new)} weights of {type(model).__name__}, such as {new[0]}; it would "
            "have random values. Expected a whole language model: choose a checkpoint with its head."
        )
