"""The kinds of modules that a location can be in any decoder layer, told by their shapes."""

from __future__ import annotations

from torch import nn

from ..tuner.config import ENTIRE_LAYER, LocFTConfig
from ..tuner.presets import (
    ATTENTION,
    DOWN,
    MLP,
    UP,
    Location,
    entire_layers,
    find_decoder_layers,
    location_in_layers,
    matrices_of,
    matrices_of_kind,
)

# the five of arXiv 2509.22072, from fine to coarse
KINDS = (DOWN, UP, ATTENTION, MLP, ENTIRE_LAYER)


def location_of(model: nn.Module, kind: str, layer: int) -> Location:
    """Return the weights of one kind in one decoder layer.

    - `"attention"`: every matrix of the attention.
    - `"mlp"`: every other matrix of the layer; of a mixture of experts, the router's too.
    - `"down"`: of these, the last that writes into the residual stream.
    - `"up"`: the last before it that reads the residual stream and makes what it takes (in gated MLPs the one beside
      the gate; where both are one tensor, that).
    - `"entire-layer"`: everything with a weight, norms too.
    - anything else: the modules of the layer with this name, or whose name ends with it, such as `"o_proj"`.

    Args:
        model: a decoder-only language model.
        kind: one of these.
        layer: counted from 0.

    Raises:
        ValueError: if the decoder layers cannot be found, there is no such layer, or nothing of that kind in it.

    Example:
        >>> location_of(model, "up", 5).target_modules
        ('model.layers.5.mlp.up_proj',)
    """
    stack_name, stack = find_decoder_layers(model)
    if not 0 <= layer < len(stack):
        raise ValueError(
            f"layer {layer}: the model has {len(stack)} decoder layers ({stack_name}), counted from 0. Expected "
            f"numbers up to {len(stack) - 1}."
        )
    if kind == ENTIRE_LAYER:
        return entire_layers(model, [layer])
    matrices = matrices_of(stack[layer])
    found = matrices_of_kind(matrices, kind)
    if not found:
        names = ", ".join(dict.fromkeys(matrix.module for matrix in matrices))
        raise ValueError(
            f"modules: found {kind!r}, and nothing of that kind or name in {stack_name}.{layer}, which has {names}. "
            f"Expected some of {', '.join(KINDS)}, or names of these."
        )
    return location_in_layers([(f"{stack_name}.{layer}", matrix) for matrix in found])


def config_of(location: Location) -> LocFTConfig:
    """Return the configuration that trains a location."""
    return LocFTConfig(
        target_modules=list(location.target_modules) or None,
        target_parameters=list(location.target_parameters) or None,
        task_type="CAUSAL_LM",
    )
