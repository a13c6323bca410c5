"""The trained tensors of one adapter at one module, and PEFT's ways to combine those of several adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import nn

from .config import LocFTConfig

COMBINATIONS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")

Result = TypeVar("Result")
DeltaTensors = dict[str, torch.Tensor]


class Delta(nn.Module):
    """The trained tensors of one adapter at one module, under the names of the base parameters that they change.

    `weight`, `bias` if biases are trained too, or the parameters named by `target_parameters`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: tuple[str, ...] = ()

    def add(self, shapes: Mapping[str, torch.Size], config: LocFTConfig) -> None:
        for name, shape in shapes.items():
            tensor = torch.zeros(shape, dtype=getattr(torch, config.delta_dtype or "float32"))
            if not config.init_weights:
                nn.init.normal_(tensor, std=0.1)
            self.register_parameter(name, nn.Parameter(tensor))
        self.names = tuple(dict.fromkeys([*self.names, *shapes]))

    def tensors(self) -> DeltaTensors:
        return {name: getattr(self, name) for name in self.names}

    def forward(self, use: Callable[[DeltaTensors], Result]) -> Result:
        """Call `use` with the tensors.

        They are used inside this forward because they are whole only there: FSDP (if its wrap policy makes every delta
        a unit) and accelerate's offloading gather before it and shard after it.
        """
        return use(self.tensors())


def with_deltas(deltas: Sequence[nn.Module], use: Callable[[list[DeltaTensors]], Result]) -> Result:
    """Return `use` of the tensors of all `deltas`, called inside all their forwards."""

    def inside(found: list[DeltaTensors]) -> Result:
        if len(found) == len(deltas):
            return use(found)
        return deltas[len(found)](lambda tensors: inside([*found, tensors]))

    return inside([])


def add_to_delta_gradients(deltas: Sequence[tuple[torch.Tensor, float]], composed: torch.Tensor) -> None:
    """Add the gradient of a composed weight to its deltas, as backward through `compose_weight` would."""
    assert composed.grad is not None
    wide = composed.grad.to(torch.promote_types(composed.dtype, torch.float32))
    composed.grad = None
    for delta, scale in deltas:
        gradient = (wide if scale == 1.0 else scale * wide).to(device=delta.device, dtype=delta.dtype)
        delta.grad = gradient.clone() if delta.grad is None else delta.grad.add_(gradient)


def check_finite(merged: DeltaTensors, deltas: Mapping[str, DeltaTensors]) -> None:
    """Raise a ValueError if a merged tensor is not finite. It names the adapters whose `deltas` are not, if any."""
    bad = [name for name, tensor in merged.items() if not torch.isfinite(tensor).all()]
    if bad:
        broken = [name for name, own in deltas.items() if not all(torch.isfinite(t).all() for t in own.values())]
        # the first words are PEFT's own, which its users match
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(broken or deltas)} seems to be broken: it "
            f"would put NaN or infinite values into {', '.join(bad)}. Nothing was merged. Run `locft inspect` to see "
            "the adapter's content."
        )


def check_combination(
    configs: Mapping[str, LocFTConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
) -> None:
    """Raise a ValueError if the adapters cannot be combined with these arguments."""
    if not adapters or any(adapter not in configs for adapter in adapters):
        raise ValueError(f"adapters={adapters}: expected names from {sorted(configs)}.")
    if adapter_name in configs:
        raise ValueError(f"Adapter '{adapter_name}' exists already: delete it first, or choose another name.")
    if len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters but {len(weights)} weights: expected one weight per adapter.")
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type={combination_type!r}: expected one of {', '.join(COMBINATIONS)}.")
    if combination_type != "linear" and (density is None or not 0 < density <= 1):
        raise ValueError(f"density={density!r}: {combination_type} needs the share of values to keep, in (0, 1].")
    for adapter in adapters:
        if configs[adapter].modules_to_save or configs[adapter].trainable_token_indices:
            raise ValueError(
                f"Adapter '{adapter}' has modules_to_save or trainable_token_indices. These are whole weights, not "
                "deltas, and cannot be combined. Leave this adapter out."
            )


def combined_config(configs: Sequence[LocFTConfig], modules: list[str], parameters: list[str]) -> LocFTConfig:
    """Return the configuration of the combined adapter, at all locations of the adapters."""
    return replace(
        configs[0],
        target_modules=modules,
        target_parameters=parameters or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        train_bias=any(config.train_bias for config in configs),
        scale=1.0,
        base_sha256=None,
    )


def combine_deltas(
    terms: list[tuple[torch.Tensor, float]],
    combination_type: str,
    density: float | None,
    majority_sign_method: Literal["total", "frequency"],
) -> torch.Tensor:
    """Return the combination of pairs of a delta and its weight, of the deltas' shape."""
    deltas = [delta for delta, _ in terms]
    weights = torch.tensor([weight for _, weight in terms], device=deltas[0].device)
    if combination_type == "linear":
        return task_arithmetic(deltas, weights)
    assert density is not None  # checked before any work
    if combination_type == "ties":
        return ties(deltas, weights, density, majority_sign_method)
    if combination_type == "dare_ties":
        return dare_ties(deltas, weights, density, majority_sign_method)
    return (dare_linear if combination_type == "dare_linear" else magnitude_prune)(deltas, weights, density)
