"""The trained tensors, and what can be known of the base weight that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, resolve_quantization_backend
from torch import nn

from .config import LocFTConfig


class Delta(nn.Module):
    """The trained tensors of one adapter at one location: `weight`, and `bias` where the bias is trained too."""

    def __init__(self, weight_shape: torch.Size, bias_shape: torch.Size | None, config: LocFTConfig) -> None:
        super().__init__()
        dtype = getattr(torch, config.delta_dtype)
        self.weight = nn.Parameter(torch.zeros(weight_shape, dtype=dtype))
        self.bias = None if bias_shape is None else nn.Parameter(torch.zeros(bias_shape, dtype=dtype))
        if not config.init_weights:
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.1)


def quantization_backend(base: nn.Module, kwargs: dict[str, Any]) -> Any:
    try:
        return resolve_quantization_backend(base, **kwargs)
    except ValueError:
        # quantized by torchao itself, not through transformers: PEFT cannot tell how to quantize it again
        return ForwardOnlyQuantizationBackend("torchao")


def full_shape(parameter: torch.Tensor) -> torch.Size:
    # ZeRO-3 leaves an empty tensor and keeps the shape here
    return getattr(parameter, "ds_shape", parameter.shape)


def check_finite(tensors: dict[str, torch.Tensor], adapters: Sequence[str]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"Merging {', '.join(adapters)} would put NaN or infinite values into {name}: the adapter seems to be "
                "broken. Nothing was merged. `locft inspect` shows what it holds."
            )
