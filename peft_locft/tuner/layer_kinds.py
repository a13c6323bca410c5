"""The tuner layers for the kinds of modules, and which of them wraps a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .base_weights import full_shape, quantization_backend
from .config import LocFTConfig
from .layer import LocFTLayer


class Linear(LocFTLayer):
    """A Linear, a quantized linear or transformers' Conv1D. (PEFT's "all-linear" looks for this class name.)"""

    works_by_rows = True

    def _features(self) -> tuple[int | None, int | None]:
        base = self.get_base_layer()
        return tuple(full_shape(base.weight)) if isinstance(base, Conv1D) else super()._features()  # type: ignore[return-value]

    def _delta_output(self, x: torch.Tensor, **delta: torch.Tensor) -> torch.Tensor:
        weight, bias = delta["weight"], delta.get("bias")
        if isinstance(self.get_base_layer(), Conv1D):
            weight = weight.T
        return F.linear(x.to(weight.dtype), weight, bias)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # LoRA has no place for a delta of the bias
        return adapter_name not in self.locft_delta or self._delta(adapter_name).names == ("weight",)


class Embedding(LocFTLayer):
    def _features(self) -> tuple[int | None, int | None]:
        base: Any = self.get_base_layer()
        return base.num_embeddings, base.embedding_dim

    def _delta_output(self, x: torch.Tensor, **delta: torch.Tensor) -> torch.Tensor:
        output = F.embedding(x, delta["weight"])
        scale = self._get_embed_scale()
        return output if scale is None else output * scale.to(output)


class Convolution(LocFTLayer):
    def _delta_output(self, x: torch.Tensor, **delta: torch.Tensor) -> torch.Tensor:
        base: Any = self.get_base_layer()
        return base._conv_forward(x.to(delta["weight"].dtype), delta["weight"], delta.get("bias"))


class ParamWrapper(LocFTLayer):
    """A module with parameters that `target_parameters` names. (PEFT looks for this class name.)"""

    # PEFT nests one wrapper per parameter and compares this name. Here one wrapper serves all parameters of a module,
    # so that the saved keys do not depend on their order in target_parameters.
    parameter_name = None


def wrap(
    target: nn.Module, adapter_name: str, config: LocFTConfig, parameter_name: str | None, **kwargs: Any
) -> LocFTLayer:
    """Return the tuner layer for a module of the base model, or for one of its parameters.

    Raises:
        ValueError: if the module has no such parameter of a float dtype, or it is packed by quantization.
    """
    if parameter_name is not None:
        if parameter_name == "weight" and quantization_backend(target, kwargs) is not None:
            raise ValueError(
                f"target_parameters names the weight of a quantized {type(target).__name__}, which is packed. Put the "
                "module into target_modules instead."
            )
        return ParamWrapper(target, adapter_name, config, parameter_name)
    layer_class: type[LocFTLayer]
    if isinstance(target, nn.Linear | Conv1D) or quantization_backend(target, kwargs) is not None:
        layer_class = Linear
    elif isinstance(target, nn.Embedding):
        layer_class = Embedding
    elif isinstance(target, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        layer_class = Convolution
    else:
        layer_class = LocFTLayer
    return layer_class(target, adapter_name, config, **kwargs)
