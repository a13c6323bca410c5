"""Locations in a decoder-only model: the published ones, the default, and what a configuration names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from .base_weights import has_own_weight
from .config import ALL_LINEAR, ENTIRE_LAYER, LocFTConfig
from .structure import (
    Matrix,
    Projections,
    base_of,
    find_decoder_layers,
    find_projections,
    modules_of,
    reads_text,
    text_config,
)


@dataclass(frozen=True, slots=True)
class PublishedLocation:
    """A location from the paper (Yang et al., arXiv 2509.22072v4), found on one model with `num_layers` layers.

    The location transfers to other models of its `model_type`; the learning rate belongs to this model alone.
    """

    layer: int
    num_layers: int
    module: str
    model: str = ""
    learning_rate: float = 5e-4

    def layer_of(self, num_layers: int) -> int:
        """Return the layer at the same relative depth: layer 6 of 28 (the 7th) is layer 19 of 80 (the 20th)."""
        return max(round((self.layer + 1) * num_layers / self.num_layers) - 1, 0)


PUBLISHED = {
    "llama": PublishedLocation(22, 32, "mlp.down_proj", "Meta-Llama-3-8B-Instruct"),
    "qwen2": PublishedLocation(6, 28, "mlp.down_proj", "Qwen2.5-7B-Instruct"),
    "mistral": PublishedLocation(23, 32, ENTIRE_LAYER, "Mistral-7B-v0.1", learning_rate=5e-5),
    "qwen2_moe": PublishedLocation(20, 24, "mlp.shared_expert.down_proj", "Qwen1.5-MoE-A2.7B"),
}
# the paper's rule of thumb, "later-layer down-projection", at the best depth of Llama
DEFAULT_DEPTH = PublishedLocation(layer=22, num_layers=32, module="")


@dataclass(frozen=True, slots=True)
class Location:
    """A location as full names, as in `named_modules` and `named_parameters`.

    `learning_rate` is the published one, or `None` if none was published for this very model.
    """

    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...] = ()
    learning_rate: float | None = None


def default_location(model: nn.Module, layers: list[int] | None = None) -> Location:
    """Return the location of `LocFTConfig()` for a model.

    - Llama, Qwen2, Mistral and Qwen-MoE: the published module, at the same relative depth in every size.
    - Any other model: the MLP's down-projection, at two thirds of the depth. In a mixture of experts it is that of the
      shared expert; without one, the parameter in which the experts are stacked.

    Some layers of a hybrid have no MLP, and some of a vision-language model do not run on text. If no layer is given,
    the default is then the nearest layer with an MLP that reads text (of two that are as near, the later one). A layer
    that is given is used: without an MLP its location is the output projection of its attention or state space
    (`o_proj`, `out_proj`), as in a model that has no MLP at all.

    Args:
        model: a decoder-only language model.
        layers: decoder layers to use instead of the published one, counted from 0.

    Raises:
        ValueError: if the decoder layers cannot be found, or a layer is not among them or has no down-projection.
    """
    stack_name, stack = find_decoder_layers(model)
    config = text_config(model)
    published = PUBLISHED.get(getattr(config, "model_type", ""))
    if layers is None:
        layer = (published or DEFAULT_DEPTH).layer_of(len(stack))
        layers = [min(_layers_with_mlp(model), key=lambda each: (abs(each - layer), -each), default=layer)]
    _check_layers(layers, stack_name, len(stack))
    rate = published.learning_rate if published is not None and _is_model(model, published.model) else None
    if published is not None and published.module == ENTIRE_LAYER:
        location = entire_layers(model, layers)
        return Location(location.target_modules, location.target_parameters, rate)
    location = down_projections(model, layers)
    return Location(location.target_modules, location.target_parameters, rate)


def published_rate(model: nn.Module) -> float | None:
    """Return the learning rate that was published for a model with an adapter; `None`: for another model or location.

    Args:
        model: a `PeftModel`; for others there is none.
    """
    tuner = getattr(model, "base_model", None)
    names = {*getattr(tuner, "targeted_module_names", ()), *getattr(tuner, "targeted_parameter_names", ())}
    if not names or not any(_is_model(model, each.model) for each in PUBLISHED.values()):
        return None
    location = default_location(model.get_base_model())  # type: ignore[operator]
    return location.learning_rate if names == {*location.target_modules, *location.target_parameters} else None


def _is_model(model: nn.Module, name: str) -> bool:
    """Whether a model was loaded under this name: from the Hub, its cache, or a folder of that name."""
    path = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    return name.lower() in re.split(r"[/\\]|--", path.lower())


def balanced_config(model: nn.Module, **fields: Any) -> LocFTConfig:
    """Return the configuration of `BreadthFirstConfig(recipe="balanced")`: down-projections of three layers.

    They begin at three quarters of the model's depth (layers 22 to 24 of 30); in a shallow model they are the last
    three. Layers without an MLP are passed over. Together they learn the same edits with a smaller change in each.

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
    eligible = _layers_with_mlp(model) or list(range(len(stack)))
    first = sum(layer < len(stack) * 3 // 4 for layer in eligible)
    first = max(min(first, len(eligible) - 3), 0)
    layers = eligible[first : first + 3]
    for layer in layers:
        for down in projections_in(model, layer).downs:
            if not down.is_linear:
                raise ValueError(
                    f"{stack_name}.{layer}.{down.full_name} holds all experts in one parameter, and a projector needs "
                    "a Linear. Name Linear modules, such as those of the attention: "
                    "LocFTConfig(target_modules=['o_proj'], layers_to_transform=[...])."
                )
    return LocFTConfig(target_modules=list(down_projections(model, layers).target_modules), **fields)


def projections_in(model: nn.Module, layer: int) -> Projections:
    """Return the up- and down-projection in one decoder layer.

    Raises:
        ValueError: if it has no down-projection.
    """
    stack_name, stack = find_decoder_layers(model)
    (found,) = find_projections(stack, [layer], getattr(text_config(model), "hidden_size", None))
    if found is None:
        raise ValueError(
            f"No down-projection was found in {stack_name}.{layer}. Name the location: "
            "LocFTConfig(target_modules=[...])."
        )
    return found


def down_projections(model: nn.Module, layers: Sequence[int]) -> Location:
    """Return the down-projections of some decoder layers.

    Raises:
        ValueError: if the decoder layers cannot be found, or a layer has no down-projection.
    """
    stack_name, _ = find_decoder_layers(model)
    downs = [(layer, projections_in(model, layer).downs) for layer in layers]
    return location_in_layers((f"{stack_name}.{layer}", down) for layer, found in downs for down in found)


def location_in_layers(matrices: Iterable[tuple[str, Matrix]]) -> Location:
    """Return the location of matrices, each with the full name of its decoder layer."""
    matrices = list(matrices)
    modules = [f"{layer}.{matrix.module}" for layer, matrix in matrices if matrix.key == "weight"]
    parameters = [f"{layer}.{matrix.full_name}" for layer, matrix in matrices if matrix.key != "weight"]
    return Location(tuple(dict.fromkeys(modules)), tuple(parameters))


def _layers_with_mlp(model: nn.Module) -> list[int]:
    """Return the decoder layers that have an MLP of their own and read the text."""
    _, stack = find_decoder_layers(model)
    hidden_size = getattr(text_config(model), "hidden_size", None)
    found = find_projections(stack, range(len(stack)), hidden_size)
    return [
        index
        for index, projections in enumerate(found)
        if projections is not None and projections.of_mlp and reads_text(stack[index])
    ]


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
        for name, module in modules_of(stack[layer]):
            full_name = f"{stack_name}.{layer}.{name}"
            base = base_of(module)
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
    layers = (
        [config.layers_to_transform] if isinstance(config.layers_to_transform, int) else config.layers_to_transform
    )
    if config.target_parameters and layers:
        # PEFT applies layers_to_transform to modules only
        config.target_parameters = _parameters_in_layers(config, model, layers)
    if config.target_modules is None and config.target_parameters:
        config.target_modules = set()  # type: ignore[assignment]
        config.layers_to_transform = config.layers_pattern = None
    elif config.target_modules is None:
        try:
            _write(config, default_location(model, layers))
        except ValueError as error:
            if layers:
                raise
            # PEFT's own words first: users match them
            raise ValueError(f"Please specify `target_modules` in `peft_config`. {error}") from None
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
    elif layers and not isinstance(config.target_modules, str):
        _limit_to_text_model(config, model, layers)


def _limit_to_text_model(config: LocFTConfig, model: nn.Module, layers: list[int]) -> None:
    """Replace names by full names where PEFT would find other modules: it counts the layers of every list."""
    inside = _text_layers(config, model, layers)
    if inside is None:
        return
    names = [name for name, _ in model.named_modules()]
    found = {name for name in names if check_target_module_exists(config, name)}
    wanted = _names_inside(config, names, inside) | found.intersection(config.target_modules or ())
    if found and not wanted:
        raise ValueError(
            f"target_modules={sorted(config.target_modules or ())}: found only {', '.join(sorted(found)[:3])}, but "
            f"layers_to_transform={layers} counts the layers of the text model: {', '.join(inside)[:-1]}. Name other "
            "modules by their full names."
        )
    if wanted != found:
        _write(config, Location(tuple(sorted(wanted))))


def _text_layers(config: LocFTConfig, model: nn.Module, layers: list[int]) -> tuple[str, ...] | None:
    """Return the name beginnings of the chosen layers; `None` if they are counted in another list."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    try:
        stack_name, _ = find_decoder_layers(model)
    except ValueError:
        return None
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    if patterns and stack_name.rpartition(".")[2] not in patterns:
        return None
    return tuple(f"{stack_name}.{layer}." for layer in layers)


def _names_inside(config: LocFTConfig, names: Iterable[str], inside: tuple[str, ...]) -> set[str]:
    in_any_layer = replace(config, layers_to_transform=None, layers_pattern=None)
    return {name for name in names if name.startswith(inside) and check_target_module_exists(in_any_layer, name)}


def _parameters_in_layers(config: LocFTConfig, model: nn.Module, layers: list[int]) -> list[str]:
    # PEFT's matching of module names, applied to parameter names
    as_modules = replace(config, target_modules=config.target_parameters, target_parameters=None, modules_to_save=None)
    names = [name.replace(".base_layer", "") for name, _ in model.named_parameters(remove_duplicate=False)]
    inside = _text_layers(config, model, layers)
    if inside is None:
        found = [name for name in names if check_target_module_exists(as_modules, name)]
    else:
        wanted = _names_inside(as_modules, names, inside).union(config.target_parameters or ())
        found = [name for name in names if name in wanted]
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


def _check_layers(layers: list[int], stack_name: str, num_layers: int) -> None:
    beyond = [layer for layer in layers if layer >= num_layers]
    if beyond:
        raise ValueError(
            f"layers_to_transform={beyond}: the model has {num_layers} decoder layers ({stack_name}), counted from 0. "
            f"Expected numbers up to {num_layers - 1}."
        )
