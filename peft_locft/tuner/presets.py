"""The published locations, and the default location for any other decoder-only model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn

from .config import ALL_LINEAR, ENTIRE_LAYER, LocFTConfig
from .modules import has_own_weight


@dataclass(frozen=True, slots=True)
class PublishedLocation:
    """A location from the paper (Yang et al., arXiv 2509.22072v4), as it was found on a model of `num_layers`."""

    layer: int
    num_layers: int
    module: str
    learning_rate: float = 5e-4

    def layer_of(self, num_layers: int) -> int:
        """Return the layer at the same relative depth: layer 6 of 28 is the 7th, so of 80 it is the 20th, layer 19."""
        return max(round((self.layer + 1) * num_layers / self.num_layers) - 1, 0)


PUBLISHED = {
    "llama": PublishedLocation(layer=22, num_layers=32, module="mlp.down_proj"),  # Meta-Llama-3-8B-Instruct
    "qwen2": PublishedLocation(layer=6, num_layers=28, module="mlp.down_proj"),  # Qwen2.5-7B-Instruct
    "mistral": PublishedLocation(layer=23, num_layers=32, module=ENTIRE_LAYER, learning_rate=5e-5),  # Mistral-7B-v0.1
    "qwen2_moe": PublishedLocation(layer=20, num_layers=24, module="mlp.shared_expert.down_proj"),  # Qwen1.5-MoE-A2.7B
}
# "later-layer down-projection", the paper's rule of thumb, at the depth it was best in Llama
DEFAULT_DEPTH = PublishedLocation(layer=22, num_layers=32, module="")


@dataclass(frozen=True, slots=True)
class Location:
    """A resolved location: full names, as `named_modules` and `named_parameters` give them.

    `learning_rate` is the published one where the location is published, else `None`.
    """

    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...] = ()
    learning_rate: float | None = None


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of the model's stack of decoder layers, and the stack.

    It is told by its structure, not by its name: of all lists of modules (as long as the configuration's
    `num_hidden_layers`, where it has one) the one with the most parameters.

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
            f"{type(model).__name__} has no list of {f'{num_layers} ' if num_layers else ''}decoder layers that could "
            "be found, so there is no default location. Name one: LocFTConfig(target_modules=[...])."
        )
    _, name, stack = max(stacks, key=lambda entry: entry[0])
    return name, stack


def default_location(model: nn.Module, layers: list[int] | None = None) -> Location:
    """Return the location of `LocFTConfig()` for a model.

    The published one for Llama, Qwen2, Mistral and Qwen-MoE models, at the same relative depth in their larger and
    smaller siblings; for any other model, at two thirds of its depth, the last weight of the layer, attention aside,
    that writes into the residual stream: the MLP's down-projection.

    Args:
        model: a decoder-only language model.
        layers: the decoder layers to use instead of the published one, counted from 0.

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
        return _down_projection(stack_name, stack, layers, text_config)
    if published.module == ENTIRE_LAYER:
        location = entire_layers(model, layers)
        return Location(location.target_modules, location.target_parameters, published.learning_rate)
    names = tuple(f"{stack_name}.{layer}.{published.module}" for layer in layers)
    return Location(names, (), published.learning_rate)


def balanced_config(model: nn.Module, **fields: Any) -> LocFTConfig:
    """Return the location of `BreadthFirstConfig(recipe="balanced")`: down-projections of three layers.

    The layer at three quarters of the model's depth and the two behind it, layers 22 to 24 of 30; in a shallow one the
    last three. Together they learn the same with smaller changes in each.

    Args:
        model: a decoder-only language model.
        **fields: other fields of [`LocFTConfig`].

    Raises:
        ValueError: if the decoder layers or their down-projections cannot be found, or these are experts that are one
            parameter, whose inputs no projector is known for.

    Example:
        >>> model = get_peft_model(model, balanced_config(model))
    """
    stack_name, stack = find_decoder_layers(model)
    text_config = _text_config(model)
    first = max(min(len(stack) * 3 // 4, len(stack) - 3), 0)
    layers = list(range(first, min(first + 3, len(stack))))
    location = _down_projection(stack_name, stack, layers, text_config)
    if location.target_parameters:
        raise ValueError(
            f"{location.target_parameters[0]} holds all experts in one parameter, whose inputs no projector is known "
            "for. Name Linear modules: LocFTConfig(target_modules=['o_proj'], layers_to_transform=[...])."
        )
    return LocFTConfig(target_modules=list(location.target_modules), **fields)


def entire_layers(model: nn.Module, layers: list[int]) -> Location:
    """Return every weight of whole decoder layers: linears and norms as modules, anything else by parameter.

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
    """Replace what `config` leaves open, or names in one word, by the full names in `model`.

    Raises:
        ValueError: if the decoder layers cannot be found, or a layer is not among them.
    """
    layers = config.layers_to_transform
    assert not isinstance(layers, int)  # made a list by the config itself
    if config.target_parameters and layers:
        # PEFT looks at the layers for modules alone
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
    # as names of modules they are matched in the same way
    as_modules = replace(config, target_modules=config.target_parameters, target_parameters=None, modules_to_save=None)
    names = (name.replace(".base_layer", "") for name, _ in model.named_parameters(remove_duplicate=False))
    found = [name for name in names if check_target_module_exists(as_modules, name)]
    if not found:
        raise ValueError(
            f"target_parameters={config.target_parameters}: there is none of that name in layers_to_transform="
            f"{config.layers_to_transform}. `model.named_parameters()` lists the names."
        )
    return found


def _write(config: LocFTConfig, location: Location) -> None:
    config.target_modules = set(location.target_modules)  # type: ignore[assignment]
    if location.target_parameters:
        config.target_parameters = sorted({*(config.target_parameters or []), *location.target_parameters})
    # the names say the layer themselves
    config.layers_to_transform = None
    config.layers_pattern = None


def _down_projection(stack_name: str, stack: nn.ModuleList, layers: list[int], text_config: Any) -> Location:
    hidden_size = getattr(text_config, "hidden_size", None)
    modules: list[str] = []
    parameters: list[str] = []
    for layer in layers:
        found = None
        for name, module in _without_tuner_insides(stack[layer]):
            if "attn" in name or "attention" in name:
                continue
            for key, parameter in _base(module)._parameters.items():
                # (out, in) of a Linear, (in, out) of a Conv1D, (experts, out, in) of fused experts
                if (
                    parameter is not None
                    and parameter.ndim > 1
                    and hidden_size in (parameter.shape[-2], parameter.shape[-1])
                ):
                    found = (f"{stack_name}.{layer}.{name}", key)
        if found is None:
            raise ValueError(
                f"No down-projection was found in {stack_name}.{layer}. Name the location: "
                "LocFTConfig(target_modules=[...])."
            )
        if found[1] == "weight":
            modules.append(found[0])
        else:
            parameters.append(".".join(found))
    return Location(tuple(modules), tuple(parameters))


def _without_tuner_insides(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of a decoder layer by name, tuner layers in the place of what they wrap."""
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
