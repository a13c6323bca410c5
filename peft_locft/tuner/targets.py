"""Which modules and parameters a configuration names, and whether they can have a delta."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from peft.utils import get_quantization_kwargs
from torch import nn

from ..io.parameter_names import clean_name
from .base_weights import has_own_weight, quantization_backend
from .config import LocFTConfig
from .layer import LocFTLayer
from .structure import find_decoder_layers, modules_of

UNTIE = """
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()"""


def check_targets(config: LocFTConfig, model: nn.Module, matches: Callable[[LocFTConfig, str], object]) -> None:
    """Raise a ValueError if a targeted module has no weight of its own, or shares it with another module.

    Args:
        config: configuration with resolved names.
        model: the base model, with or without adapters.
        matches: tells whether `config.target_modules` targets a module name.
    """
    users = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)].append(clean_name(name))
    for name, parameter in _targeted_parameters(config, model, matches):
        if len(users[id(parameter)]) > 1:
            others = [user for user in users[id(parameter)] if user != name]
            raise ValueError(
                f"{name} is tied to {', '.join(others)}: a delta would change both, or neither after a merge. "
                f"Target another module, or untie them first:{UNTIE}"
            )


def names_in_a_layer(model: nn.Module) -> list[str]:
    """Return the last parts of the names of a decoder layer's modules with a weight; none without a layer."""
    try:
        _, layers = find_decoder_layers(model)
    except ValueError:
        return []
    named = {name.rpartition(".")[2]: module for name, module in modules_of(layers[0])}
    return [name for name, module in named.items() if name and has_own_weight(module)]


def early_modules(model: nn.Module) -> frozenset[str]:
    """Return the modules with deltas in the first half of the decoder layers, by their names in the base model.

    There a model looks up what it knows of a subject; the layers after them ask for one relation of it. The first
    half of an uneven number of layers is the smaller one.

    Args:
        model: a base model with tuner layers in it.
    """
    edited = [clean_name(name) for name, module in model.named_modules() if isinstance(module, LocFTLayer)]
    try:
        stack_name, stack = find_decoder_layers(model)
    except ValueError:
        return frozenset()
    layers = {f"{clean_name(stack_name)}.{index}." for index in range(len(stack) // 2)}
    return frozenset(name for name in edited if any(name.startswith(layer) for layer in layers))


def _targeted_parameters(
    config: LocFTConfig, model: nn.Module, matches: Callable[[LocFTConfig, str], object]
) -> Iterator[tuple[str, nn.Parameter]]:
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LocFTLayer))
    for name, module in model.named_modules():
        if not name or name.startswith(inside) or not matches(config, name):
            continue
        base: Any = module.base_layer if isinstance(module, LocFTLayer) else module
        if quantization_backend(base, get_quantization_kwargs(model)) is not None:
            continue
        if not has_own_weight(base):
            raise ValueError(
                f"target_modules matches {name}, a {type(base).__name__}, which has no weight of its own. Target "
                "the modules inside it (a Linear, Conv1D, Embedding, convolution or norm), its parameters with "
                "target_parameters, or a decoder layer with target_modules='entire-layer'."
            )
        yield f"{name}.weight", base.weight
    for name, parameter in model.named_parameters(remove_duplicate=False):
        clean = clean_name(name)
        if any(clean == target or clean.endswith(f".{target}") for target in config.target_parameters or []):
            yield clean, parameter
