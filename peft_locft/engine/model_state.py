"""A model's state around training and evaluation: dropout, configuration, adapters, and checks of its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from ..tuner.layer import LocFTLayer
from ..tuner.structure import text_config


def check_model_and_tokenizer(model: Any, tokenizer: Any, where: str) -> None:
    """Raise a ValueError if they are something else, such as names, or swapped.

    Args:
        model: what is given as the model.
        tokenizer: what is given as its tokenizer.
        where: the function that they are given to, for the message.
    """
    if isinstance(model, PreTrainedTokenizerBase) and isinstance(tokenizer, nn.Module):
        raise ValueError(f"{where}: found a tokenizer as the model and a model as the tokenizer; swap them.")
    if not isinstance(model, nn.Module):
        advice = "load it with AutoModelForCausalLM.from_pretrained(name)"
        raise ValueError(f"{where}: found a {type(model).__name__} as the model; expected a model: {advice}.")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        found = f"found a {type(tokenizer).__name__} as the tokenizer"
        advice = "load it with AutoTokenizer.from_pretrained(name of the model)"
        raise ValueError(f"{where}: {found}; expected the tokenizer of the model: {advice}.")


def has_scope(model: nn.Module) -> bool:
    """Whether the model's deltas act at some tokens only, so that its layers need its own forward around them."""
    return any(isinstance(module, LocFTLayer) and module.gate is not None for module in model.modules())


def dropout_off(model: nn.Module) -> None:
    """Put a model into evaluation mode, but leave gradient checkpointing on."""
    model.eval()
    for module in model.modules():
        # checkpointing needs a layer in training mode; its children, and their dropout, stay in evaluation mode
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


@contextmanager
def configuration_unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the model's configuration afterwards: `Trainer` changes `use_cache` and the special tokens."""
    configurations: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
    if hasattr(configurations[0], "get_text_config"):
        configurations.append(configurations[0].get_text_config())
    before = [(vars(config), dict(vars(config))) for config in configurations if config is not None]
    try:
        yield
    finally:
        for attributes, original in before:
            attributes.clear()
            attributes.update(original)


def max_length(model: nn.Module) -> int | None:
    """Return the number of positions of a model; `None` if its configuration has none."""
    length = getattr(text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None  # some say -1


def check_vocabulary(model: Any, input_ids: torch.Tensor) -> None:
    """Raise a ValueError if a token id has no row in the model's embedding."""
    weight = model.get_input_embeddings().weight
    # ZeRO-3 leaves an empty tensor, and stores its shape here
    vocabulary_size = getattr(weight, "ds_shape", weight.shape)[0]
    largest = int(input_ids.max())
    if largest >= vocabulary_size:
        raise ValueError(
            f"The tokenizer gives token id {largest}, but the model's embedding has {vocabulary_size} rows: they do "
            "not belong together. Load both from one checkpoint."
        )


def check_trainable(model: nn.Module) -> None:
    """Check that an adapter, or a part of a model that was unfrozen on purpose, is what will be trained.

    Raises:
        ValueError: if no parameter is trainable; or if all are, and the model has no adapter.
    """
    parameters = list(model.parameters())
    add = "Add an adapter with get_peft_model(model, LocFTConfig())"
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"BreadthFirstTrainer: no parameter of the model is trainable. {add}, load one with is_trainable=True, or "
            "unfreeze the weights to edit."
        )
    if all(parameter.requires_grad for parameter in parameters) and not has_adapter(model):
        number = sum(parameter.numel() for parameter in parameters)
        raise ValueError(
            f"BreadthFirstTrainer: the model has no adapter, so all of its {number:,} parameters would be trained. "
            f"{add}; or freeze it with model.requires_grad_(False), and unfreeze the weights to edit."
        )


class TrainingDivergedError(RuntimeError):
    """The loss became NaN or infinite during training."""


def check_finite(loss: float, step: int, max_steps: int, learning_rate: float) -> None:
    """Raise an error if a loss is NaN or infinite.

    Args:
        loss: the loss before a step.
        step: the number of steps taken before.
        max_steps: the number of steps of the whole run.
        learning_rate: the learning rate of this step.

    Raises:
        RuntimeError: before the first step.
        TrainingDivergedError: later.
    """
    if math.isfinite(loss):
        return
    if step == 0:
        raise RuntimeError(
            f"The loss is {loss} before the first step: in its dtype, this model has no finite loss on these edits. "
            "Load it in float32 or bfloat16."
        )
    raise TrainingDivergedError(
        f"The loss became {loss} at step {step + 1} of {max_steps}: the learning rate, {learning_rate:g}, is too high "
        "for this model and location. Train with a lower learning rate."
    )


def check_gradient(loss: torch.Tensor, model: nn.Module) -> None:
    """Raise a ValueError if no trained weight has a gradient from a loss."""
    if not loss.requires_grad:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        raise ValueError(
            f"The loss of the edits does not depend on the trained weights: {', '.join(trained[:3])}. Expected "
            "weights that a forward on text uses, in a model that has gradients in evaluation mode. Choose another "
            "location, or another model."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients; afterwards restore its mode and configuration."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # a LocFT model computes W + delta once for all forwards
        with torch.no_grad(), configuration_unchanged(model), getattr(model, "composed_once", nullcontext)():
            yield
    finally:
        for module in was_training:
            module.training = True


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has an adapter that PEFT, or transformers' own integration of PEFT, can disable."""
    return isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Disable a model's adapters for a while, so that it answers as its base."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    elif has_adapter(model):
        model.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            model.enable_adapters()  # type: ignore[operator]
    else:
        yield
