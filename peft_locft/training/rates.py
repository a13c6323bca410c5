"""Learning rates that fit the weights: relative to the size of each trained tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..io.parameter_names import clean_name
from ..tuner.layer import LocFTLayer
from ..tuner.presets import published_rate
from .config import BreadthFirstConfig

OTHER_METHODS = 5e-4  # for LoRA and the like, whose tensors begin at zero or have no weight's size
NUM_PROBES = 64  # random inputs that measure a weight which cannot be read


def fitting_rates(model: nn.Module, args: BreadthFirstConfig) -> dict[str, float]:
    """Return the learning rate of each trained tensor for `learning_rate="auto"`.

    Adam moves every value of a tensor by about the learning rate in each step, so that the effect of a step depends
    on the rate relative to the weight. Rates relative to the weight transfer between models, locations and modules;
    absolute ones do not. The rate is `args.relative_learning_rate` times the root mean square of the base weight.

    Args:
        model: the model with its trainable parameters, before anything shards it.
        args: the recipe.

    Returns:
        By parameter name: the published rate, if it was published for this very model and location; the relative one
        for other LocFT deltas and for unfrozen weights; `OTHER_METHODS` for another PEFT method.

    Raises:
        ValueError: if no base weight can be measured.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    published = published_rate(model) if args.recipe == "published" else None
    if published is not None:
        return dict.fromkeys(trained, published)
    sizes = _base_sizes(model)
    if not sizes and isinstance(model, PeftModel):
        return dict.fromkeys(trained, OTHER_METHODS)
    sizes |= {name: _size(parameter) for name, parameter in trained.items() if ".locft_delta." not in name}
    known = [size for name, size in sizes.items() if name in trained and size > 0]
    if not known:
        raise ValueError(
            "BreadthFirstConfig.learning_rate='auto' depends on the size of the trained weights, and none of them can "
            "be measured: they are all zero, or not on this process. Pass a number."
        )
    # a bias or a norm that is all zero says nothing about its scale
    return {name: (args.relative_learning_rate or 0.0) * (sizes.get(name) or min(known)) for name in trained}


def _size(tensor: torch.Tensor) -> float:
    """Return the root mean square of a tensor; 0 if its values are not here."""
    if tensor.is_meta or not tensor.numel():
        return 0.0
    return float(tensor.detach().float().square().mean().sqrt())


def _base_sizes(model: nn.Module) -> dict[str, float]:
    """Return the root mean square of the base tensor of each LocFT delta, by the delta's parameter name."""
    sizes = {}
    for name, layer in model.named_modules():
        for adapter in layer.active_adapters if isinstance(layer, LocFTLayer) else ():
            found = {key: _size(tensor) for key, tensor in layer.base_tensors(adapter).items()}
            if layer.quantization_backend is not None or "weight" not in found:
                found["weight"] = _probed_size(layer.base_layer)
            sizes.update({f"{name}.locft_delta.{adapter}.{key}": size for key, size in found.items()})
    return sizes


@torch.no_grad()
def _probed_size(linear: Any) -> float:
    """Return the root mean square of a linear's weight from its outputs: it is quantized or offloaded."""
    if not hasattr(linear, "in_features"):
        return 0.0
    tensor = next(linear.parameters())
    dtype = tensor.dtype if tensor.is_floating_point() else torch.bfloat16
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(NUM_PROBES, linear.in_features, generator=generator).to(device, dtype)
    outputs = linear(probes).float() - linear(torch.zeros_like(probes)).float()
    return float(outputs.square().mean().sqrt()) / linear.in_features**0.5


def set_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Give each trained tensor of an optimizer its own learning rate.

    Args:
        optimizer: of the model; it has taken no step.
        model: the model, perhaps wrapped.
        rates: learning rates by parameter name. A tensor without one, such as several that FSDP made one, gets the
            smallest.
    """
    names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    own = {clean_name(name): rate for name, rate in rates.items()}
    groups = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rate = own.get(names.get(id(parameter), ""), min(own.values()))
            groups.append({**group, "params": [parameter], "lr": rate})
    optimizer.param_groups[:] = groups
