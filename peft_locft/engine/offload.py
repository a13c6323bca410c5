"""Keep the trunk on the CPU, outside of the model; a layer is on the training device only while it runs.

accelerate's hooks leave a layer inside of the model, and `Accelerator.prepare` calls `model.to(device)`. This puts the
whole trunk on the device with `cpu_offload_with_hook`, and raises on the meta tensors of `AlignDevicesHook`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .tail import CacheUnusableError, Tail, find_tail

CPU = torch.device("cpu")


class OffloadedLayer(nn.Module):
    """Stands in a model for a decoder layer on the CPU, and moves the layer to a device for its forwards.

    Args:
        layer: the decoder layer. It is no submodule, so nothing moves it together with the model.
        device: where it runs.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.hidden = (layer.eval(),)  # torch does not look for modules in a tuple
        self.device = device
        self.is_resident = False

    def __getattr__(self, name: str) -> Any:
        # a model may read attributes of its layers, such as their kind of attention
        return getattr(self.__dict__["hidden"][0], name) if "hidden" in self.__dict__ else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.resident():
            return self.hidden[0](*args, **kwargs)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Keep the layer on the device over several forwards."""
        if self.is_resident:
            yield
            return
        self.hidden[0].to(self.device)
        self.is_resident = True
        try:
            yield
        finally:
            self.is_resident = False
            self.hidden[0].to(CPU)


def whole_layer(layer: nn.Module) -> nn.Module:
    """Return the decoder layer itself, which holds the weights, where a layer may be offloaded."""
    return layer.hidden[0] if isinstance(layer, OffloadedLayer) else layer


@contextmanager
def trunk_offloaded(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a model onto a device without its trunk, whose layers are there one at a time, while they run.

    Afterwards all weights are where they were.

    Raises:
        ValueError: if the model has no trunk, or is on more than one device.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(
            f"offload_trunk=True: found the model on {', '.join(sorted(map(str, devices)))}, expected one device. "
            "Load the model without device_map, or set offload_trunk=False and let device_map offload it."
        )
    try:
        tail = find_tail(model)
    except CacheUnusableError as reason:
        tail = Tail(nn.ModuleList(), 0, str(reason))
    if tail.why_no_trunk is not None:
        raise ValueError(
            f"offload_trunk=True: found no trunk to offload, since {tail.why_no_trunk}. Set offload_trunk=False, or "
            "choose a location in a later layer."
        )
    before, layers = devices.pop(), tail.trunk
    for index, layer in enumerate(layers):
        tail.layers[index] = OffloadedLayer(layer, device)
    try:
        if before != CPU:
            for layer in layers:
                layer.to(CPU)
        model.to(device)
        yield
    finally:
        for index, layer in enumerate(layers):
            tail.layers[index] = layer
        model.to(before)
