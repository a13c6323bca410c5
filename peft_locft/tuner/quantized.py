"""Quantized linears: PEFT's backend for one, and a copy of one with an edited weight."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, resolve_quantization_backend
from torch import nn


def quantization_backend(base: nn.Module, kwargs: dict[str, Any]) -> Any:
    try:
        return resolve_quantization_backend(base, **kwargs)
    except ValueError:
        # quantized by torchao itself, not through transformers: PEFT cannot tell how to quantize it again
        return ForwardOnlyQuantizationBackend("torchao")


class _Holder:
    """Stands in for the tuner layer while a backend writes: some change the base module, some replace it."""

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    def get_base_layer(self) -> nn.Module:
        return self.base_layer


def edited_copy(backend: Any, original: nn.Module, delta: torch.Tensor) -> nn.Module:
    """Return a copy of `original` whose weight is the dequantized one plus `delta`, quantized again.

    Warns with the size of the rounding, which is often that of the edit itself.
    """
    holder = _Holder(copy.deepcopy(original))
    with torch.no_grad():
        weight = backend.get_base_weight(original)
        edited = weight.float() + delta
        backend.set_base_weight(holder, edited.to(weight.dtype))
        error = (backend.get_base_weight(holder.base_layer).float() - edited).norm()
    warnings.warn(
        f"Merged into a {backend.backend_name} weight: rounding to the quantized values moved it by {error:.3g}, "
        f"where the delta's own norm is {delta.norm():.3g}. To deploy the edit as it was evaluated, merge into the "
        "base model without quantization, or keep the adapter unmerged.",
        stacklevel=2,
    )
    return holder.base_layer
