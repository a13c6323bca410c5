"""Keep the trunk off the training device: a layer is there while it runs, and nowhere to be seen while it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .tail import CacheUnusableError, Tail, find_tail


class OffloadedLayer(nn.Module):
    """Stands where a decoder layer was. The layer itself is not part of the model, so nothing moves it with the model.

    Args:
        layer: the decoder layer.
        device: where it runs; it goes back to where it is now.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.parked = [layer.eval()]  # a list, which torch does not look into
        self.device = device
        self.home = next(layer.parameters()).device
        self.is_resident = False

    def __getattr__(self, name: str) -> Any:
        # a model may ask its layers what kind they are
        return getattr(self.__dict__["parked"][0], name) if "parked" in self.__dict__ else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.resident():
            return self.parked[0](*args, **kwargs)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Keep the layer on the device for some forwards."""
        if self.is_resident:
            yield
            return
        self.parked[0].to(self.device)
        self.is_resident = True
        try:
            yield
        finally:
            self.is_resident = False
            self.parked[0].to(self.home)


@contextmanager
def trunk_offloaded(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have all of a model on a device but its trunk, of which one layer at a time is there when it runs.

    Afterwards everything is where it was.

    Raises:
        ValueError: if the model has no trunk, or its layers are on several devices already.
    """
    where = {parameter.device for parameter in model.parameters()}
    if len(where) > 1 or torch.device("meta") in where:
        raise ValueError(
            f"trunk_residency='layerwise' found the model on {', '.join(sorted(map(str, where)))}: expected one "
            "device. Load it without device_map; or leave trunk_residency on 'full' and let device_map do this."
        )
    try:
        tail = find_tail(model)
    except CacheUnusableError as reason:
        tail = Tail(nn.ModuleList(), 0, str(reason))
    if tail.why_whole is not None:
        raise ValueError(f"trunk_residency='layerwise' has nothing to keep off the device: {tail.why_whole}.")
    layers = tail.trunk
    for index, layer in enumerate(layers):
        tail.layers[index] = OffloadedLayer(layer, device)
    try:
        model.to(device)
        yield
    finally:
        for index, layer in enumerate(layers):
            tail.layers[index] = layer
        model.to(where.pop())
