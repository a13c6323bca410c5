"""The weights of a base module: their full shape, whether they are here, a forward with others, quantized ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, resolve_quantization_backend
from torch import nn
from torch.distributed.tensor import DTensor


def has_own_weight(module: nn.Module) -> bool:
    """Whether the module has a parameter `weight` of its own, which a delta can be added to."""
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    # ZeRO-3 leaves an empty tensor and keeps the shape here
    return getattr(parameter, "ds_shape", parameter.shape)


def is_whole(tensor: torch.Tensor, shape: torch.Size) -> bool:
    """Whether all values are here: not offloaded to the meta device, and not the local shard of a larger tensor."""
    return not (tensor.is_meta or isinstance(tensor, DTensor)) and tensor.shape == shape


@contextmanager
def substituted(module: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let `module` compute with `tensors` instead of its parameters of those names.

    Python finds an instance attribute before a registered parameter, so the module's own forward, with its hooks,
    reads the given tensor. (`torch.func.functional_call` swaps the registered parameter instead. FSDP swaps it back in
    its pre-forward, and the edit would be lost without an error.)

    Raises:
        RuntimeError: if the module's forward replaced one of `tensors`.
    """
    own = module.__dict__
    before = {name: own[name] for name in tensors if name in own}
    own.update(tensors)
    try:
        yield
        overwritten = [name for name, tensor in tensors.items() if own.get(name) is not tensor]
    finally:
        for name in tensors:
            own.pop(name, None)
        own.update(before)
    if overwritten:
        raise RuntimeError(
            f"{type(module).__name__} computes its {', '.join(overwritten)} anew in every forward (a hook such as "
            "torch.nn.utils.weight_norm?), so a delta has no effect. Remove that hook first."
        )


def called_with(
    module: nn.Module, function: Callable[..., Any], tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Call a module, or a method of it, with `tensors` in place of its parameters."""
    with substituted(module, tensors):
        return function(*args, **kwargs)


def quantization_backend(base: nn.Module, kwargs: dict[str, Any]) -> Any:
    """Return PEFT's backend for a quantized module; `None` for one that is not quantized."""
    try:
        return resolve_quantization_backend(base, **kwargs)
    except ValueError:
        # quantized by torchao itself, not through transformers: PEFT cannot tell how to quantize it again
        return ForwardOnlyQuantizationBackend("torchao")


def edited_copy(backend: Any, original: nn.Module, delta: torch.Tensor) -> nn.Module:
    """Return a copy of `original` with its weight dequantized, `delta` added, and quantized again.

    Warns with the size of the rounding, which is often that of the edit itself.
    """
    holder = _Holder(copy.deepcopy(original))
    with torch.no_grad():
        weight = backend.get_base_weight(original)
        edited = weight.float() + delta
        backend.set_base_weight(holder, edited.to(weight.dtype))
        error = (backend.get_base_weight(holder.base_layer).float() - edited).norm()
    warnings.warn(
        f"Merged into a {backend.backend_name} weight: quantizing it again moved the weight by {error:.3g} "
        f"(norm of the delta: {delta.norm():.3g}). To deploy the edit as it was evaluated, merge into the unquantized "
        "base model, or keep the adapter unmerged.",
        stacklevel=2,
    )
    return holder.base_layer


class _Holder:
    """Stands in for the tuner layer while a backend writes: some change the base module, some replace it."""

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    def get_base_layer(self) -> nn.Module:
        return self.base_layer
