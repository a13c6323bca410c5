"""Combining the deltas of several adapters into one, with PEFT's own merge methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties

from .config import LocFTConfig

COMBINATIONS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def combine_deltas(
    terms: list[tuple[torch.Tensor, float]],
    combination_type: str,
    density: float | None,
    majority_sign_method: Literal["total", "frequency"],
) -> torch.Tensor:
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


def check_combination(
    configs: Mapping[str, LocFTConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
) -> None:
    """Raise a ValueError if the adapters cannot be combined as asked."""
    if not adapters or any(adapter not in configs for adapter in adapters):
        raise ValueError(f"adapters={adapters}: expected names out of {sorted(configs)}.")
    if adapter_name in configs:
        raise ValueError(f"Adapter '{adapter_name}' exists already: delete it first, or choose another name.")
    if len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters but {len(weights)} weights: expected one weight an adapter.")
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type={combination_type!r}: expected one of {', '.join(COMBINATIONS)}.")
    if combination_type != "linear" and (density is None or not 0 < density <= 1):
        raise ValueError(f"density={density!r}: {combination_type} needs the share of values to keep, in (0, 1].")
    for adapter in adapters:
        if configs[adapter].modules_to_save or configs[adapter].trainable_token_indices:
            raise ValueError(
                f"Adapter '{adapter}' has modules_to_save or trainable_token_indices. They are whole weights and not "
                "deltas, so they cannot be combined."
            )


def combined_config(configs: Sequence[LocFTConfig], modules: list[str], parameters: list[str]) -> LocFTConfig:
    """Return the configuration of the combination of adapters at all of their locations."""
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
