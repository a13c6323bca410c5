"""Locations in a decoder-only model: the published ones, the default, and the weights of one kind in a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from .base_weights import has_own_weight
from .config import ALL_LINEAR, ENTIRE_LAYER, LocFTConfig

ATTENTION, MLP, UP, DOWN = "attention", "mlp", "up", "down"


@dataclass(frozen=True, slots=True)
class PublishedLocation:
    """A location from the paper (Yang et al., arXiv 2509.22072v4), found on a model with `num_layers` layers."""

    layer: int
    num_layers: int
    module: str
    learning_rate: float = 5e-4

    def layer_of(self, num_layers: int) -> int:
        """Return the layer at the same relative depth: layer 6 of 28 (the 7th) is layer 19 of 80 (the 20th)."""
        return max(round((self.layer + 1) * num_layers / self.num_layers) - 1, 0)


PUBLISHED = {
    "llama": PublishedLocation(layer=22, num_layers=32, module="mlp.down_proj"),  # Meta-Llama-3-8B-Instruct
    "qwen2": PublishedLocation(layer=6, num_layers=28, module="mlp.down_proj"),  # Qwen2.5-7B-Instruct
    "mistral": PublishedLocation(layer=23, num_layers=32, module=ENTIRE_LAYER, learning_rate=5e-5),  # Mistral-7B-v0.1
    "qwen2_moe": PublishedLocation(layer=20, num_layers=24, module="mlp.shared_expert.down_proj"),  # Qwen1.5-MoE-A2.7B
}
# the paper's rule of thumb, "later-layer down-projection", at the best depth of Llama
DEFAULT_DEPTH = PublishedLocation(layer=22, num_layers=32, module="")


@dataclass(frozen=True, slots=True)
class Location:
    """A location as full names, as in `named_modules` and `named_parameters`.

    `learning_rate` is the published one, or `None` if the location is not published.
    """

    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...] = ()
    learning_rate: float | None = None


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of the list of decoder layers in the model, and the list.

    It is found by structure, not by name: the `ModuleList` with the most parameters, of length `num_hidden_layers` if
    the model's configuration has that.

    Raises:
        ValueError: if the model has no such list.
    """
    text_config = _text_config(model)
    num_layers = getattr(text_config, "num_hidden_layers", None)
    stacks = [
        (sum(parameter.numel() for parameter in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and num_layers in (None, len(module))
    ]
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no list of {f'{num_layers} ' if num_layers else ''}decoder layers, so there "
            "is no default location. Name one: LocFTConfig(target_modules=[...])."
        )
    _, name, stack = max(stacks, key=lambda entry: entry[0])
    return name, stack


def default_location(model: nn.Module, layers: list[int] | None = None) -> Location:
    """Return the location of `LocFTConfig()` for a model.

    - Llama, Qwen2, Mistral and Qwen-MoE: the published module, at the same relative depth in every size.
    - Any other model: the MLP's down-projection (the last matrix of the layer outside of attention that reads or
      writes the residual stream), at two thirds of the depth.

    Args:
        model: a decoder-only language model.
        layers: decoder layers to use instead of the published one, counted from 0.

    Raises:
        ValueError: if the decoder layers cannot be found, or a layer is not among them.
    """
    stack_name, stack = find_decoder_layers(model)
    text_config = _text_config(model)
    published = PUBLISHED.get(getattr(text_config, "model_type", ""))
    if layers is None:
        layers = [(published or DEFAULT_DEPTH).layer_of(len(stack))]
    _check_layers(layers, stack_name, len(stack))
    if published is None:
        return _down_projections(stack_name, stack, layers, text_config)
    if published.module == ENTIRE_LAYER:
        location = entire_layers(model, layers)
        return Location(location.target_modules, location.target_parameters, published.learning_rate)
    names = tuple(f"{stack_name}.{layer}.{published.module}" for layer in layers)
    return Location(names, (), published.learning_rate)


def balanced_config(model: nn.Module, **fields: Any) -> LocFTConfig:
    """Return the configuration of `BreadthFirstConfig(recipe="balanced")`: down-projections of three layers.

    They begin at three quarters of the model's depth (layers 22 to 24 of 30); in a shallow model they are the last
    three. Together they learn the same edits with a smaller change in each.

    Args:
        model: a decoder-only language model.
        **fields: other fields of [`LocFTConfig`].

    Raises:
        ValueError: if the decoder layers or their down-projections cannot be found, or the down-projection is one
            parameter of all experts, which has no projector.

    Example:
        >>> model = get_peft_model(model, balanced_config(model))
    """
    stack_name, stack = find_decoder_layers(model)
    text_config = _text_config(model)
    first = max(min(len(stack) * 3 // 4, len(stack) - 3), 0)
    layers = list(range(first, min(first + 3, len(stack))))
    location = _down_projections(stack_name, stack, layers, text_config)
    if location.target_parameters:
        raise ValueError(
            f"{location.target_parameters[0]} holds all experts in one parameter, and a projector needs a Linear. "
            "Name Linear modules: LocFTConfig(target_modules=['o_proj'], layers_to_transform=[...])."
        )
    return LocFTConfig(target_modules=list(location.target_modules), **fields)


def entire_layers(model: nn.Module, layers: list[int]) -> Location:
    """Return every weight of some decoder layers: linears and norms as modules, other weights as parameters.

    Raises:
        ValueError: if the decoder layers cannot be found, or a layer is not among them.
    """
    stack_name, stack = find_decoder_layers(model)
    _check_layers(layers, stack_name, len(stack))
    modules: list[str] = []
    parameters: list[str] = []
    for layer in layers:
        for name, module in _without_tuner_insides(stack[layer]):
            full_name = f"{stack_name}.{layer}.{name}"
            base = _base(module)
            if has_own_weight(base):
                modules.append(full_name)
            else:
                parameters.extend(f"{full_name}.{key}" for key, own in base._parameters.items() if own is not None)
    return Location(tuple(modules), tuple(parameters))


def resolve_location(config: LocFTConfig, model: nn.Module) -> None:
    """Replace a default or one-word location in `config` by the full names in `model`.

    Raises:
        ValueError: if the decoder layers cannot be found, or a layer is not among them.
    """
    layers = config.layers_to_transform
    assert not isinstance(layers, int)  # made a list by the config itself
    if config.target_parameters and layers:
        # PEFT applies layers_to_transform to modules only
        config.target_parameters = _parameters_in_layers(config, model)
    if config.target_modules is None and config.target_parameters:
        config.target_modules = set()  # type: ignore[assignment]
        config.layers_to_transform = config.layers_pattern = None
    elif config.target_modules is None:
        _write(config, default_location(model, layers))
    elif config.target_modules == ENTIRE_LAYER:
        assert layers is not None
        _write(config, entire_layers(model, layers))
    elif config.target_modules == ALL_LINEAR:
        _maybe_include_all_linear_layers(config, model)
        if layers:
            stack_name, stack = find_decoder_layers(model)
            _check_layers(layers, stack_name, len(stack))
            inside = tuple(f"{stack_name}.{layer}." for layer in layers)
            _write(config, Location(tuple(name for name in config.target_modules if name.startswith(inside))))


def _parameters_in_layers(config: LocFTConfig, model: nn.Module) -> list[str]:
    # PEFT's matching of module names, applied to parameter names
    as_modules = replace(config, target_modules=config.target_parameters, target_parameters=None, modules_to_save=None)
    names = (name.replace(".base_layer", "") for name, _ in model.named_parameters(remove_duplicate=False))
    found = [name for name in names if check_target_module_exists(as_modules, name)]
    if not found:
        raise ValueError(
            f"target_parameters={config.target_parameters}: no parameter has that name in layers_to_transform="
            f"{config.layers_to_transform}. `model.named_parameters()` lists the names."
        )
    return found


def _write(config: LocFTConfig, location: Location) -> None:
    config.target_modules = set(location.target_modules)  # type: ignore[assignment]
    if location.target_parameters:
        config.target_parameters = sorted({*(config.target_parameters or []), *location.target_parameters})
    # the full names contain the layer
    config.layers_to_transform = None
    config.layers_pattern = None


# ---------------------------------------------------------------------- the matrices of one decoder layer


@dataclass(frozen=True, slots=True)
class Matrix:
    """A parameter (…, outputs, inputs) of a decoder layer, of one module or of several experts.

    `module` is the name inside the layer, `key` the name of the parameter in the module.
    """

    module: str
    key: str
    inputs: int
    outputs: int

    @property
    def in_attention(self) -> bool:
        return "attn" in self.module or "attention" in self.module


def matrices_of(layer: nn.Module) -> list[Matrix]:
    """Return every parameter of a decoder layer with two or more dimensions, in order of registration."""
    return [
        Matrix(name, key, *_features(base, parameter.shape))
        for name, module in _without_tuner_insides(layer)
        for base in [_base(module)]
        for key, parameter in base._parameters.items()
        if parameter is not None and parameter.ndim > 1
    ]


def matrices_of_kind(matrices: Sequence[Matrix], kind: str) -> list[Matrix]:
    """Return the matrices of a kind: `"attention"`, `"mlp"`, `"up"`, `"down"`, or a module name or name ending."""
    mlp = [matrix for matrix in matrices if not matrix.in_attention]
    if kind == ATTENTION:
        return [matrix for matrix in matrices if matrix.in_attention]
    if kind == MLP:
        return mlp
    if kind in (UP, DOWN):
        pair = up_and_down(mlp)
        return [] if pair is None else [pair[kind == DOWN]]
    return [matrix for matrix in matrices if f".{matrix.module}".endswith(f".{kind}")]


def up_and_down(mlp: Sequence[Matrix]) -> tuple[Matrix, Matrix] | None:
    """Return the last pair of which the second reads the output of the first and writes what the first reads."""
    for index, down in reversed(list(enumerate(mlp))):
        for up in reversed(mlp[:index]):
            # a fused gate doubles the outputs
            if up.inputs == down.outputs and up.outputs % down.inputs == 0:
                return up, down
    return None


def location_in_layers(matrices: Sequence[tuple[str, Matrix]]) -> Location:
    """Return the location of matrices, each with the full name of its decoder layer."""
    modules = [f"{layer}.{matrix.module}" for layer, matrix in matrices if matrix.key == "weight"]
    parameters = [f"{layer}.{matrix.module}.{matrix.key}" for layer, matrix in matrices if matrix.key != "weight"]
    return Location(tuple(dict.fromkeys(modules)), tuple(parameters))


def _down_projections(stack_name: str, stack: nn.ModuleList, layers: list[int], text_config: Any) -> Location:
    hidden_size = getattr(text_config, "hidden_size", None)
    found = []
    for layer in layers:
        on_residual = [
            matrix
            for matrix in matrices_of(stack[layer])
            if not matrix.in_attention and hidden_size in (matrix.inputs, matrix.outputs)
        ]
        if not on_residual:
            raise ValueError(
                f"No down-projection was found in {stack_name}.{layer}. Name the location: "
                "LocFTConfig(target_modules=[...])."
            )
        found.append((f"{stack_name}.{layer}", on_residual[-1]))
    return location_in_layers(found)


def _features(base: nn.Module, shape: Sequence[int]) -> tuple[int, int]:
    """Return the inputs and outputs of a matrix: (…, out, in), but (in, out) in a Conv1D."""
    return (shape[-2], shape[-1]) if isinstance(base, Conv1D) else (shape[-1], shape[-2])


def _without_tuner_insides(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of a decoder layer by name, tuner layers instead of the modules that they wrap."""
    inside = tuple(f"{name}." for name, module in layer.named_modules() if isinstance(module, BaseTunerLayer))
    return [(name, module) for name, module in layer.named_modules() if name and not name.startswith(inside)]


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _check_layers(layers: list[int], stack_name: str, num_layers: int) -> None:
    beyond = [layer for layer in layers if layer >= num_layers]
    if beyond:
        raise ValueError(
            f"layers_to_transform={beyond}: the model has {num_layers} decoder layers ({stack_name}), counted from 0. "
            f"Expected numbers up to {num_layers - 1}."
        )
