"""An adapter and its base: names in the base model, the sha256 of the weights that a delta belongs to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..io.arithmetic import tensor_sha256
from ..io.parameter_names import clean_name
from .config import LocFTConfig
from .layer import LocFTLayer


def locft_layers(model: nn.Module) -> Iterator[tuple[str, LocFTLayer]]:
    """Yield every tuner layer with the name that its base module has in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, LocFTLayer):
            yield clean_name(name), module


def base_sha256(model: nn.Module, adapter_name: str = "default") -> dict[str, str]:
    """Return the sha256 of every base tensor that has a delta of this adapter, by parameter name.

    The base is hashed as it is without edits, whether or not one is merged now. Tensors that are not here in full
    (offloaded, sharded) are left out.
    """
    return {
        f"{name}.{kind}": tensor_sha256(tensor)
        for name, layer in locft_layers(model)
        for kind, tensor in layer.base_tensors(adapter_name).items()
    }


def drop_base_weights(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Delete the weights of the edited base modules from a state dict of which an adapter is being saved.

    Where an embedding or the head is the location, PEFT would go on to save its base weight too, edited if an adapter
    is merged, and on loading put it in the place of the base model's own.
    """
    prefixes = tuple(f"{name}.base_layer." for name in _names_in_state_dict(model))
    for key in [key for key in state_dict if key.startswith(prefixes)]:
        del state_dict[key]


def delta_tensors(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the entries of a state dict that are deltas of an adapter.

    PEFT looks for them by the names that FSDP1's units have while it is wrapped around modules, and a gathered state
    dict has the model's own: it would find none and save an empty adapter.
    """
    prefixes = tuple(f"{name}.locft_delta.{adapter_name}." for name in _names_in_state_dict(model))
    return {key: tensor for key, tensor in state_dict.items() if key.startswith(prefixes)}


def _names_in_state_dict(model: nn.Module) -> list[str]:
    layers = [name for name, module in model.named_modules() if isinstance(module, LocFTLayer)]
    return [name.replace("_fsdp_wrapped_module.", "") for name in layers]


def differing_from_base(model: nn.Module, adapter_name: str, config: Any) -> list[str]:
    """Return the names of base tensors that are not those which an adapter's config says its deltas belong to.

    Args:
        model: with the adapter.
        adapter_name: which.
        config: its configuration; one of another PEFT method says nothing of the kind.
    """
    expected = getattr(config, "base_sha256", None)
    if not expected:
        return []
    found = base_sha256(model, adapter_name)
    return sorted(name for name, digest in found.items() if expected.get(name, digest) != digest)


def warn_of_other_base(model: nn.Module, adapter_name: str, config: LocFTConfig) -> None:
    """Warn if the base weights are not those that the adapter's config says its deltas belong to."""
    differing = differing_from_base(model, adapter_name, config)
    if differing:
        warnings.warn(
            f"Adapter '{adapter_name}' was trained on another base: {', '.join(differing[:3])} "
            f"{'and others ' if len(differing) > 3 else ''}differ from the weights that its deltas belong to. "
            f"Load it onto {config.base_model_name_or_path or 'its own base model'}, at the revision and dtype it was "
            "trained on, or expect other answers than it was evaluated with.",
            stacklevel=2,
        )
