"""Smaller deltas at a measured loss: fewer bits per value, or fewer values that are not zero."""

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
    """Raise a ValueError unless these are a dtype of deltas and a share of values."""
    if delta_dtype not in (None, *DELTA_DTYPES):
        raise ValueError(f"delta_dtype={delta_dtype!r}: expected one of {', '.join(DELTA_DTYPES)}.")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density={density}: expected the share of values that stay, in (0, 1].")


def prune_relatively(delta: torch.Tensor, weight: torch.Tensor, share: float) -> torch.Tensor:
    """Return a delta, of the same shape, in which only the largest changes relative to their weight are not zero.

    RECT (Gu et al., "Model Editing Harms General Abilities of Large Language Models", arXiv 2401.04700): Δ_ij stays
    where |Δ_ij / W_ij| is among the largest.

    Args:
        delta: any shape.
        weight: the base weight, same shape.
        share: share of values that stay, in (0, 1]; of equal values at the border, all stay.
    """
    if share == 1.0:
        return delta
    ratio = (delta.float() / weight.float()).abs()
    # 0 / 0 is NaN: no change of a weight of zero
    ratio[delta == 0] = 0.0
    dropped = ratio.numel() - max(1, round(share * ratio.numel()))
    if dropped == 0:
        return delta
    border = ratio.flatten().kthvalue(dropped + 1).values
    return torch.where(ratio >= border, delta, torch.zeros_like(delta))


def shrink_files(
    adapter: CheckedAdapter,
    out: Path,
    weight_of: Callable[[str], torch.Tensor],
    delta_dtype: str | None,
    density: float | None,
) -> Shrinking:
    """Write an adapter's weights and configuration to `out` with smaller deltas; `out` may be the adapter's folder.

    Args:
        adapter: a LocFT adapter.
        out: a folder that is there.
        weight_of: gives the base weight of a parameter; called for `density` alone.
        delta_dtype: of the deltas; `None` leaves each as it is.
        density: share of values that stay, see `prune_relatively`; `None` is all.

    Returns:
        The entry for the provenance: the arguments, and the share of the deltas' squared Frobenius norm that is left.

    Raises:
        ValueError: if a value becomes infinite in `delta_dtype`, and whatever `weight_of` raises.
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
            raise ValueError(f"{parameter}: its delta has values too large for {delta_dtype}. Use bfloat16 instead.")
        lost += float((delta.double() - small.double()).square().sum())
        total += float(delta.double().square().sum())
        tensors[name] = small
    settings = json.loads((adapter.folder / CONFIG_NAME).read_text(encoding="utf-8"))
    settings |= {} if delta_dtype is None else {"delta_dtype": delta_dtype}
    with atomic_file(out / SAFETENSORS_WEIGHTS_NAME) as staged:
        save_file(tensors, staged, metadata={"format": "pt"})
    write_atomically(out / CONFIG_NAME, json.dumps(settings, indent=2, sort_keys=True))
    kept = 1 - lost / total if total else 1.0
    return Shrinking(delta_dtype, density, kept)
