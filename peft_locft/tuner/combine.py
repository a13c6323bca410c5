"""Combining the deltas of several adapters into one, with PEFT's own merge methods."""

from __future__ import annotations

from typing import Literal

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties

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
