"""The trained tensors, and what can be known of the base weight that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .config import LocFTConfig

Result = TypeVar("Result")
DeltaTensors = dict[str, torch.Tensor]


class Delta(nn.Module):
    """The trained tensors of one adapter at one module, by the names of the base parameters that they belong to.

    `weight`, `bias` where biases are trained too, or the parameters named by `target_parameters`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: tuple[str, ...] = ()

    def add(self, shapes: Mapping[str, torch.Size], config: LocFTConfig) -> None:
        for name, shape in shapes.items():
            tensor = torch.zeros(shape, dtype=getattr(torch, config.delta_dtype))
            if not config.init_weights:
                nn.init.normal_(tensor, std=0.1)
            self.register_parameter(name, nn.Parameter(tensor))
        self.names = tuple(dict.fromkeys([*self.names, *shapes]))

    def tensors(self) -> DeltaTensors:
        return {name: getattr(self, name) for name in self.names}

    def forward(self, use: Callable[[DeltaTensors], Result]) -> Result:
        """Call `use` with the tensors.

        They are used inside of this forward, not after it, because that is when they are whole: FSDP (where its wrap
        policy makes every delta a unit of its own) and accelerate's offloading gather before it and shard after it.
        """
        return use(self.tensors())


def with_deltas(deltas: Sequence[nn.Module], use: Callable[[list[DeltaTensors]], Result]) -> Result:
    """Return `use` of the tensors of all `deltas`, called inside of all their forwards."""

    def inside(found: list[DeltaTensors]) -> Result:
        if len(found) == len(deltas):
            return use(found)
        return deltas[len(found)](lambda tensors: inside([*found, tensors]))

    return inside([])


def full_shape(parameter: torch.Tensor) -> torch.Size:
    # ZeRO-3 leaves an empty tensor and keeps the shape here
    return getattr(parameter, "ds_shape", parameter.shape)


def is_whole(tensor: torch.Tensor, shape: torch.Size) -> bool:
    """Whether all values are here: not offloaded to the meta device, and not the local shard of something larger."""
    return not (tensor.is_meta or isinstance(tensor, DTensor)) and tensor.shape == shape


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], adapters: Sequence[str]) -> None:
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"Merging {', '.join(adapters)} would put NaN or infinite values into {name}: the adapter seems to be "
                "broken. Nothing was merged. `locft inspect` shows what it holds."
            )
