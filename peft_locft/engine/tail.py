"""Where a model is cut into trunk and tail, and ways to run only a part of it.

Nothing here depends on the model family. The model's own forward always runs; modules in it get other states or fewer
rows, or are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..tuner.presets import find_decoder_layers


class CacheUnusableError(Exception):
    """The states that enter the tail cannot replace the trunk; the message says why."""


@dataclass(frozen=True)
class Tail:
    """Where a model is cut: the decoder layers before `first` are the trunk, the rest is the tail.

    Args:
        layers: all decoder layers.
        first: the number of the first layer of the tail, the entry layer.
        why_no_trunk: if there is no trunk, the reason.
        num_outputs: the length of the tuples that layers return; 0: they return the states alone.
    """

    layers: nn.ModuleList
    first: int
    why_no_trunk: str | None = None
    num_outputs: int = 0

    @property
    def trunk(self) -> list[nn.Module]:
        return list(self.layers[: self.first])

    @property
    def entry_layer(self) -> nn.Module:
        return self.layers[self.first]


def find_tail(model: nn.Module) -> Tail:
    """Cut a model before the first decoder layer that has a trainable parameter.

    Raises:
        CacheUnusableError: if there is no stack of decoder layers.
    """
    try:
        name, layers = find_decoder_layers(model)
    except ValueError as error:
        raise CacheUnusableError(str(error)) from None
    first = len(layers)
    before_stack = True
    for key, parameter in model.named_parameters():
        in_stack = key.startswith(f"{name}.")
        before_stack = before_stack and not in_stack
        if not parameter.requires_grad:
            continue
        if before_stack:
            return Tail(layers, 0, f"{key} is trained and comes before the decoder layers")
        if in_stack:
            first = min(first, int(key[len(name) + 1 :].split(".")[0]))
    if first == 0:
        return Tail(layers, 0, f"layer 0 of {name} is trained")
    return Tail(layers, min(first, len(layers) - 1))


@contextmanager
def entering(layer: nn.Module, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Call `change` with the states that enter a layer, (B, T, hidden); states that it returns enter instead."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not args and "hidden_states" not in kwargs:
            raise CacheUnusableError("the layers take their states by another name than hidden_states")
        states = change(args[0] if args else kwargs["hidden_states"])
        if states is None:
            return None
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def skipped(layers: list[nn.Module], num_outputs: int = 0) -> Iterator[None]:
    """Let layers return their input unchanged: alone, or as the first of `num_outputs` values of a tuple."""

    def return_input(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *[None] * (num_outputs - 1)) if num_outputs else hidden_states

    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = return_input  # an instance's `forward` comes before its class's
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:  # accelerate's hooks set one
                layer.forward = forward


def logits_at(model: nn.Module, rows: torch.Tensor, columns: torch.Tensor, inputs: dict[str, Any]) -> Any:
    """Run a forward and return its outputs, with logits, (positions, V), only at (rows, columns).

    The model's own head, and its scaling or soft-capping, run on those positions only: with a vocabulary of 50,000 to
    260,000, logits of all positions are the largest cost of a step.
    """
    unwrapped: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    head = unwrapped.get_output_embeddings()
    selected = False

    def select(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        nonlocal selected
        if args[0].shape[:-1] != inputs["input_ids"].shape:  # a head over several streams
            return None
        selected = True
        device = args[0].device
        return (args[0][rows.to(device), columns.to(device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        outputs = model(**inputs)
    finally:
        if handle is not None:
            handle.remove()
    # not indexed: the backward of an index would write all logits once more
    outputs.logits = outputs.logits.squeeze(0) if selected else outputs.logits[rows, columns]
    return outputs
