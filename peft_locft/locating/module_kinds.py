"""The kinds of modules that a location can be, recognised in any decoder layer by their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..tuner.config import ENTIRE_LAYER, LocFTConfig
from ..tuner.presets import Location, entire_layers, find_decoder_layers

ATTENTION, MLP, UP, DOWN = "attention", "mlp", "up", "down"
# the five kinds of arXiv 2509.22072, from fine to coarse
KINDS = (DOWN, UP, ATTENTION, MLP, ENTIRE_LAYER)


@dataclass(frozen=True)
class _Matrix:
    """A parameter that maps `inputs` features to `outputs` features, of one or more experts."""

    module: str
    key: str
    inputs: int
    outputs: int

    @property
    def in_attention(self) -> bool:
        return "attn" in self.module or "attention" in self.module


def location_of(model: nn.Module, kind: str, layer: int) -> Location:
    """Return the weights of one kind in one decoder layer.

    - `"attention"`: every matrix of the attention.
    - `"mlp"`: every other matrix of the layer, including a router.
    - `"down"`: the last of these that writes into the residual stream.
    - `"up"`: the last of these that reads the residual stream and feeds `"down"`; in a gated MLP, the matrix beside
      the gate, or the tensor that holds both.
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
    matching = _of_kind(_matrices(stack[layer]), kind)
    if not matching:
        names = ", ".join(dict.fromkeys(matrix.module for matrix in _matrices(stack[layer])))
        raise ValueError(
            f"modules: found {kind!r}, but {stack_name}.{layer} has no module of that kind or name. Expected one of "
            f"{', '.join(KINDS)}, or one of its modules: {names}."
        )
    prefix = f"{stack_name}.{layer}"
    modules = [f"{prefix}.{matrix.module}" for matrix in matching if matrix.key == "weight"]
    parameters = [f"{prefix}.{matrix.module}.{matrix.key}" for matrix in matching if matrix.key != "weight"]
    return Location(tuple(dict.fromkeys(modules)), tuple(parameters))


def config_of(location: Location) -> LocFTConfig:
    """Return the configuration that trains a location."""
    return LocFTConfig(
        target_modules=list(location.target_modules) or None,
        target_parameters=list(location.target_parameters) or None,
        task_type="CAUSAL_LM",
    )


def _of_kind(matrices: Sequence[_Matrix], kind: str) -> list[_Matrix]:
    attention = [matrix for matrix in matrices if matrix.in_attention]
    mlp = [matrix for matrix in matrices if not matrix.in_attention]
    if kind == ATTENTION:
        return attention
    if kind == MLP:
        return mlp
    if kind in (UP, DOWN):
        pair = _up_and_down(mlp)
        return [] if pair is None else [pair[kind == DOWN]]
    return [matrix for matrix in matrices if f".{matrix.module}".endswith(f".{kind}")]


def _up_and_down(mlp: Sequence[_Matrix]) -> tuple[_Matrix, _Matrix] | None:
    """Return the last two matrices of which the second maps the first's outputs back to the first's inputs."""
    for index, down in reversed(list(enumerate(mlp))):
        for up in reversed(mlp[:index]):
            # with a fused gate, up has twice as many outputs
            if up.inputs == down.outputs and up.outputs % down.inputs == 0:
                return up, down
    return None


def _matrices(layer: nn.Module) -> list[_Matrix]:
    return [
        _Matrix(name, key, *_features(module, tuple(parameter.shape)))
        for name, module in layer.named_modules()
        for key, parameter in module._parameters.items()
        if name and parameter is not None and parameter.ndim > 1
    ]


def _features(module: nn.Module, shape: Sequence[int]) -> tuple[int, int]:
    """Return the input and output features of a weight: (…, out, in), but (in, out) in a Conv1D."""
    return (shape[-2], shape[-1]) if isinstance(module, Conv1D) else (shape[-1], shape[-2])
