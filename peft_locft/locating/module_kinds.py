"""The kinds of modules that a location can be, recognised in any decoder layer by their shapes."""

from __future__ import annotations

from torch import nn

from ..tuner.config import ENTIRE_LAYER, LocFTConfig
from ..tuner.presets import Location, entire_layers, location_in_layers, projections_in
from ..tuner.structure import ATTENTION, DOWN, MLP, UP, find_decoder_layers, matrices_of, matrices_of_kind

# the five of arXiv 2509.22072, from fine to coarse
KINDS = (DOWN, UP, ATTENTION, MLP, ENTIRE_LAYER)


def location_of(model: nn.Module, kind: str, layer: int) -> Location:
    """Return the weights of one kind in one decoder layer.

    - `"attention"`: every matrix of the attention, or of the state space or convolution in its place.
    - `"mlp"`: every other matrix of the layer, including a router.
    - `"down"`: the MLP's down-projection, as in `LocFTConfig(layers_to_transform=[layer])` for a model without a
      published location: with experts that of the shared expert, without an MLP that of the state space or attention.
    - `"up"`: the matrix that makes the input of `"down"` from the hidden states; in a gated MLP, the matrix beside the
      gate, or the tensor that holds both.
    - `"entire-layer"`: every parameter of the layer, including norms.
    - anything else: the modules of the layer with this name, or whose name ends with it, such as `"o_proj"`.

    Args:
        model: a decoder-only language model.
        kind: one of the above.
        layer: index of the decoder layer, from 0.

    Raises:
        ValueError: if the decoder layers cannot be found, the layer does not exist, or it has nothing of that kind.

    Example:
        >>> location_of(model, "up", 5).target_modules
        ('model.layers.5.mlp.up_proj',)
    """
    stack_name, stack = find_decoder_layers(model)
    if not 0 <= layer < len(stack):
        raise ValueError(
            f"layer {layer}: the model has {len(stack)} decoder layers ({stack_name}); expected an index from 0 to "
            f"{len(stack) - 1}."
        )
    if kind == ENTIRE_LAYER:
        return entire_layers(model, [layer])
    matrices = matrices_of(stack[layer])
    if kind in (UP, DOWN):
        projections = projections_in(model, layer)
        found = list(projections.ups if kind == UP else projections.downs)
    else:
        found = matrices_of_kind(matrices, kind)
    if not found:
        names = ", ".join(dict.fromkeys(matrix.module for matrix in matrices))
        raise ValueError(
            f"modules: found {kind!r}, but {stack_name}.{layer} has no module of that kind or name. Expected one of "
            f"{', '.join(KINDS)}, or one of its modules: {names}."
        )
    return location_in_layers([(f"{stack_name}.{layer}", matrix) for matrix in found])


def band_of(model: nn.Module, kind: str, layer: int, num_layers: int) -> Location:
    """Return the weights of one kind in `num_layers` neighbouring decoder layers, from `layer` on.

    Raises:
        ValueError: as `location_of`, for each of the layers.
    """
    parts = [location_of(model, kind, each) for each in range(layer, layer + num_layers)]
    modules = [name for part in parts for name in part.target_modules]
    parameters = [name for part in parts for name in part.target_parameters]
    # some models run one block in several layers
    return Location(tuple(dict.fromkeys(modules)), tuple(dict.fromkeys(parameters)))


def config_of(location: Location) -> LocFTConfig:
    """Return the configuration that trains a location."""
    return LocFTConfig(
        target_modules=list(location.target_modules) or None,
        target_parameters=list(location.target_parameters) or None,
        task_type="CAUSAL_LM",
    )
