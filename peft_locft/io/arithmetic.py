"""The arithmetic of an edited weight, and the sha256 of a base weight: functions of tensors.

The tuner and merges on disk use them. This file needs neither PEFT nor transformers, so a merge starts fast.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

HASHED_AT_ONCE = 1 << 22  # values; a float32 copy of a whole tensor would double its memory


def compose_weight(weight: torch.Tensor, deltas: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Return `(W.float() + Σ scale · delta.float()).to(W.dtype)`, in the weight's shape.

    The unmerged forward, the merge and the merge on disk all call this function, so their results are equal bit for
    bit. It rounds to the base's dtype once, at the end.

    Args:
        weight: the base weight, any shape and float dtype (float64 is computed in float64).
        deltas: pairs of a delta, of the weight's shape, and its scale.

    Returns:
        A tensor of the weight's shape, dtype and device. Gradients flow to the deltas.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = weight.to(wide)
    for delta, scale in deltas:
        step = delta.to(device=weight.device, dtype=wide)
        total = total + (step if scale == 1.0 else scale * step)
    return total.to(weight.dtype)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's values, in row-major order.

    Float tensors are hashed as float32 (float64 as float64), so a bfloat16 checkpoint has the same hash after loading
    as float32. Other tensors, such as quantized ones, are hashed as raw bytes. A tensor that wraps others (torchao) is
    hashed by their hashes.
    """
    if is_traceable_wrapper_subclass(tensor):
        inside = [tensor_sha256(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
        return hashlib.sha256("".join(inside).encode()).hexdigest()
    return values_sha256(tensor.detach().cpu().contiguous().reshape(-1).split(HASHED_AT_ONCE))


def values_sha256(slices: Iterable[torch.Tensor]) -> str:
    """Return the `tensor_sha256` of values that come in flat, contiguous slices on the CPU."""
    digest = hashlib.sha256()
    for values in slices:
        if values.is_floating_point() and values.dtype != torch.float64:
            values = values.to(torch.float32)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread only, and restore the number of threads afterwards.

    In a container with fewer cores than torch counts, its threads wait for each other, and work that also waits for
    files takes several times as long.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
