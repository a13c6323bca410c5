"""Run the trunk once over all the edits, keep the states that enter the tail, and replay them.

Nothing here knows a model family. The model's own forward runs every time, with its own masks, positions, layer types,
embedding scale and soft-capping; while it runs, the decoder layers of the trunk hand their input on unchanged, and the
first layer of the tail is given the states that were kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from tqdm.auto import tqdm

from .tuner.presets import find_decoder_layers


class CacheUnusable(Exception):
    """Why the states before the first trained layer cannot stand for the trunk."""


class _Reached(Exception):
    """Ends a forward at the door of a layer."""


@dataclass(frozen=True)
class Tail:
    """Where a model is cut: the decoder layers before `first` are the trunk, everything after them is the tail."""

    layers: nn.ModuleList
    first: int

    @property
    def door(self) -> nn.Module:
        return self.layers[self.first]


def find_tail(model: nn.Module) -> Tail:
    """Cut a model before the first decoder layer that has a trainable parameter.

    Raises:
        CacheUnusable: if there is no stack of decoder layers, if something before the stack is trained, or if its
            first layer is.
    """
    try:
        name, layers = find_decoder_layers(model)
    except ValueError as error:
        raise CacheUnusable(str(error)) from None
    first = len(layers)
    before_stack = True
    for key, parameter in model.named_parameters():
        in_stack = key.startswith(f"{name}.")
        before_stack = before_stack and not in_stack
        if not parameter.requires_grad:
            continue
        if before_stack:
            raise CacheUnusable(f"{key} is trained and comes before the decoder layers")
        if in_stack:
            first = min(first, int(key[len(name) + 1 :].split(".")[0]))
    if first == 0:
        raise CacheUnusable(f"layer 0 of {name} is trained, so that there is no trunk before it")
    return Tail(layers, min(first, len(layers) - 1))


@contextmanager
def entering(layer: nn.Module, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Show `change` the states that come to a layer, (B, T, hidden); what it returns goes in instead."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
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
def passed_over(layers: list[nn.Module]) -> Iterator[None]:
    """Let layers hand their input on unchanged. An instance's `forward` is found before its class's."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _hand_on
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:  # accelerate's hooks put one there
                layer.forward = forward


def _hand_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


@dataclass(frozen=True)
class ActivationCache:
    """The states that enter the tail, unpadded.

    Args:
        states: (total tokens, hidden), edit after edit.
        offsets: (edits + 1,) where each edit begins, and the total.
    """

    tail: Tail
    states: torch.Tensor
    offsets: torch.Tensor

    def padded(self, indices: torch.Tensor, length: int, device: torch.device) -> torch.Tensor:
        """Return the states of some edits as (B, length, hidden); what stands on padding does not matter."""
        begin, end = self.offsets[indices], self.offsets[indices + 1]
        rows = torch.minimum(begin.unsqueeze(1) + torch.arange(length), end.unsqueeze(1) - 1)
        return self.states[rows.reshape(-1)].view(len(indices), length, -1).to(device, non_blocking=True)

    @contextmanager
    def replayed(self, indices: torch.Tensor) -> Iterator[None]:
        """Let the model's forward on these edits, padded on the right, cost its tail alone."""

        def states_for(arriving: torch.Tensor) -> torch.Tensor:
            return self.padded(indices, arriving.shape[1], arriving.device)

        with ExitStack() as stack:
            stack.enter_context(passed_over(list(self.tail.layers[: self.tail.first])))
            stack.enter_context(entering(self.tail.door, states_for))
            yield


def cache_trunk(
    model: nn.Module,
    offsets: torch.Tensor,
    batches: Sequence[torch.Tensor],
    inputs: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    place: str,
    folder: str,
) -> ActivationCache:
    """Run the trunk over all the edits and keep the states that leave it.

    Args:
        model: the model, in evaluation mode.
        offsets: (edits + 1,) where the tokens of each edit begin, and the total.
        batches: indices of edits, each edit once.
        inputs: from indices to the arguments of a forward, padded on the right.
        place: `"memory"`, `"disk"`, or `"auto"`: memory where the states take less than half of what is free.
        folder: where a scratch file on the disk goes; it is removed when the process ends.

    Raises:
        CacheUnusable: if the states cannot stand for the trunk in this model.
    """
    tail = find_tail(model)
    states: torch.Tensor | None = None

    def keep(arriving: torch.Tensor) -> None:
        nonlocal states
        if states is None:
            states = _allocate((int(offsets[-1]), arriving.shape[-1]), arriving.dtype, place, folder)
        for row, index in enumerate(batch.tolist()):
            begin, end = offsets[index : index + 2].tolist()
            states[begin:end] = arriving[row, : end - begin]
        raise _Reached

    with torch.no_grad(), entering(tail.door, keep):
        for batch in tqdm(batches, desc="running the frozen layers once", leave=False, disable=len(batches) < 20):
            try:
                model(**inputs(batch), use_cache=False)
            except _Reached:
                continue
            raise CacheUnusable("its first trained layer is not reached by a forward")
    assert states is not None
    cache = ActivationCache(tail, states, offsets)
    _check(cache, model, batches[0][:4], inputs)
    return cache


def _allocate(shape: tuple[int, int], dtype: torch.dtype, place: str, folder: str) -> torch.Tensor:
    num_values = shape[0] * shape[1]
    if place == "auto":
        place = "memory" if num_values * dtype.itemsize < psutil.virtual_memory().available / 2 else "disk"
    if place == "memory":
        return torch.empty(shape, dtype=dtype)
    # without a name: the space is free again when the process ends, however it ends
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".activation-cache-") as file:
        return torch.from_file(file.name, shared=True, size=num_values, dtype=dtype).view(shape)


@torch.no_grad()
def _check(
    cache: ActivationCache,
    model: nn.Module,
    indices: torch.Tensor,
    inputs: Callable[[torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    """Compare a replay with the whole model's forward: a family may hand on more than its states."""
    batch = inputs(indices)
    real = batch["attention_mask"].bool()
    whole = model(**batch, use_cache=False).logits[real].float()
    with cache.replayed(indices):
        replayed = model(input_ids=batch["input_ids"], use_cache=False).logits[real].float()
    tolerance = 1e-3 if cache.states.dtype == torch.float32 else 5e-2
    if not (whole - replayed).abs().max() <= tolerance * whole.abs().max():
        raise CacheUnusable("its later layers take more from the earlier ones than their states")


def logits_at(model: nn.Module, rows: torch.Tensor, columns: torch.Tensor, inputs: dict[str, Any]) -> Any:
    """Run a forward whose logits are (positions, V), those at (rows, columns) alone.

    The model's own head and whatever scaling or soft-capping follows it are used, on those positions only: with a
    vocabulary of 50,000 to 260,000 the logits of all positions are the largest cost of a step.
    """
    unwrapped: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    head = unwrapped.get_output_embeddings()
    selected = False

    def select(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal selected
        selected = True
        return (args[0][rows, columns].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        outputs = model(**inputs)
    finally:
        if handle is not None:
            handle.remove()
    outputs.logits = outputs.logits[0] if selected else outputs.logits[rows, columns]
    return outputs
