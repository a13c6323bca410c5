"""Shrinks deltas with a measured loss: fewer bits per value, or fewer nonzero values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..io.files import atomic_file, write_atomically
from ..tuner.config import DELTA_DTYPES
from .provenance import Shrinking
from .reading import CheckedAdapter


def check_shrinking(delta_dtype: str | None, density: float | None) -> None:
    """Raise a ValueError if the dtype or the share of values is out of range."""
    if delta_dtype not in (None, *DELTA_DTYPES):
        raise ValueError(f"delta_dtype={delta_dtype!r}: expected one of {', '.join(DELTA_DTYPES)}.")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density={density}: expected the share of values to keep, in (0, 1].")


def prune_relatively(delta: torch.Tensor, weight: torch.Tensor, share: float) -> torch.Tensor:
    """Return a delta of the same shape that keeps only the largest values relative to their weight, else zero.

    RECT (Gu et al., "Model Editing Harms General Abilities of Large Language Models", arXiv 2401.04700): keep Δ_ij
    if |Δ_ij / W_ij| is among the largest.

    Args:
        delta: any shape.
        weight: the base weight, same shape.
        share: share of values to keep, in (0, 1]; equal ratios at the threshold are all kept.
    """
    if share == 1.0:
        return delta
    ratio = (delta.float() / weight.float()).abs()
    # 0 / 0 is NaN: a zero change of a zero weight counts as 0
    ratio[delta == 0] = 0.0
    dropped = ratio.numel() - max(1, round(share * ratio.numel()))
    if dropped == 0:
        return delta
    threshold = ratio.flatten().kthvalue(dropped + 1).values
    return torch.where(ratio >= threshold, delta, torch.zeros_like(delta))


def shrink_files(
    adapter: CheckedAdapter,
    out: Path,
    weight_of: Callable[[str], torch.Tensor],
    delta_dtype: str | None,
    density: float | None,
) -> Shrinking:
    """Write an adapter's weights and configuration with smaller deltas, and return the entry for the provenance.

    Args:
        adapter: a LocFT adapter.
        out: an existing folder; it may be the adapter's own.
        weight_of: returns the base weight of a parameter; called only if `density` is given.
        delta_dtype: new dtype of the deltas; `None`: unchanged.
        density: share of values to keep, see `prune_relatively`; `None`: all.

    Returns:
        The arguments, and the share of the deltas' squared Frobenius norm that is kept.

    Raises:
        ValueError: if a value becomes infinite in `delta_dtype`. Errors of `weight_of` pass through.
    """
    tensors = {name: adapter.read(name) for name in adapter.tensors.keys() - set(adapter.deltas.values())}
    lost = total = 0.0
    for parameter, name in adapter.deltas.items():
        delta = small = adapter.read(name)
        if density is not None:
            small = prune_relatively(delta, weight_of(parameter), density)
        if delta_dtype is not None:
            small = small.to(getattr(torch, delta_dtype))
        if not torch.isfinite(small).all():
            raise ValueError(
                f"{parameter}: its delta has values that are too large for {delta_dtype}. Use bfloat16 instead."
            )
        lost += float((delta.double() - small.double()).square().sum())
        total += float(delta.double().square().sum())
        tensors[name] = small
    settings = json.loads((adapter.folder / CONFIG_NAME).read_text(encoding="utf-8"))
    settings |= {} if delta_dtype is None else {"delta_dtype": delta_dtype}
    with atomic_file(out / SAFETENSORS_WEIGHTS_NAME) as staged:
        save_file(tensors, staged, metadata={"format": "pt"})
    write_atomically(out / CONFIG_NAME, json.dumps(settings, indent=2, sort_keys=True))
    share_kept = 1 - lost / total if total else 1.0
    return Shrinking(delta_dtype, density, share_kept)
