"""The decoder layers of a model and the matrices in one of them, told by structure and shapes.

The MLP's down-projection is the matrix that maps the MLP's inner size to the hidden size. Another matrix of the same
MLP, the up-projection, makes that inner size from the hidden size. This tells it from a router, a gate of one row and
the biases of experts. What mixes positions (attention, state space, convolution) and what is inside a norm has such
pairs, too, so it is left out first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

ATTENTION, MLP, UP, DOWN = "attention", "mlp", "up", "down"

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ACTIVATION_FILES = ("torch.nn.modules.activation", "transformers.activations")


# ---------------------------------------------------------------------- the decoder layers


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the text model; `None` if the model has no configuration."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # a text encoder beside the decoder
        return config.get_text_config(decoder=True)


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of the list of decoder layers in the model, and the list.

    It is found by structure, not by name: of the lists in the part of the model that the text configuration belongs to
    (not a vision or audio tower), the one of length `num_hidden_layers`. If several have that length, it is the one
    nearest to the top (not cross-attention to pictures, nor the layers of a multi-token-prediction head), then the one
    with the most parameters.

    Raises:
        ValueError: if the model has no such list.
    """
    config = text_config(model)
    length = getattr(config, "num_hidden_layers", None)
    stacks = _stacks(model)
    of_text = [name for name in stacks if type(_config_around(model, name)) is type(config)]
    of_length = [name for name in stacks if length in (None, len(stacks[name]))]
    found = [name for name in of_text if name in of_length] or of_length
    if not found and len(of_text) == 1:
        found = of_text  # the configuration counts something else, such as two attentions in each layer
    if not found:
        lists = ", ".join(f"{name} ({len(stack)})" for name, stack in stacks.items())
        raise ValueError(
            f"{type(model).__name__} has no list of {f'{length} ' if length else ''}decoder layers, so there "
            f"is no default location{f'; its lists: {lists}' if lists else ''}. Name one: "
            "LocFTConfig(target_modules=[...])."
        )

    def preference(each: str) -> tuple[bool, int, int]:
        reads = any(reads_text(layer) for layer in stacks[each])
        return reads, -each.count("."), sum(parameter.numel() for parameter in stacks[each].parameters())

    name = max(found, key=preference)
    return name, stacks[name]


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of modules, by name, without lists inside their entries and lists of plain Linears or norms."""
    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each)}
    of_blocks = {name: each for name, each in lists.items() if any(True for entry in each for _ in entry.children())}
    found = of_blocks or lists
    inside = tuple(f"{name}." for name in found)
    return {name: each for name, each in found.items() if not name.startswith(inside)}


def _config_around(model: nn.Module, name: str) -> Any:
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None:
            return config
    return None


# ---------------------------------------------------------------------- the matrices of one decoder layer


@dataclass(frozen=True, slots=True)
class Matrix:
    """A parameter of a decoder layer with two or more dimensions, of one module or of several experts.

    Args:
        module: name of the module inside the layer.
        key: name of the parameter in the module.
        layouts: its (inputs, outputs). Two, if a parameter does not tell which is which.
        num_experts: how many matrices are stacked in it.
        mixes: whether it belongs to what mixes positions: attention, state space, convolution.
        is_projection: whether it can be a projection of an MLP or of a mixer.
        parameter_id: identity of the parameter, which several layers may share.
    """

    module: str
    key: str
    layouts: tuple[tuple[int, int], ...]
    num_experts: int
    mixes: bool
    is_projection: bool
    parameter_id: int

    @property
    def container(self) -> str:
        """Name of the module whose forward computes with this matrix."""
        return self.module.rpartition(".")[0] if self.key == "weight" else self.module

    @property
    def full_name(self) -> str:
        return self.module if self.key == "weight" else f"{self.module}.{self.key}"

    @property
    def is_linear(self) -> bool:
        return self.key == "weight" and len(self.layouts) == 1


def matrices_of(layer: nn.Module) -> list[Matrix]:
    """Return every parameter of a decoder layer with two or more dimensions, in order of registration."""
    modules = dict(_without_tuner_insides(layer))
    mixers = tuple(name for name, module in modules.items() if _mixes_positions(name, module))
    found: list[Matrix] = []
    for name, module in modules.items():
        mixes = any(f"{name}.".startswith(f"{mixer}.") for mixer in mixers)
        outside = any("norm" in part or "router" in part for part in name.lower().split("."))
        outside = outside or any(isinstance(each, nn.ModuleDict) for each in _around(modules, name))
        found.extend(_matrices_in(name, module, mixes, not outside))
    return found


def _matrices_in(name: str, module: nn.Module, mixes: bool, projects: bool) -> Iterator[Matrix]:
    own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if type(inputs) is int and type(outputs) is int and ("weight" in own or not any(True for _ in module.children())):
        # the shape of a quantized weight says nothing, and there may be scales beside it
        yield Matrix(name, "weight", ((inputs, outputs),), 1, mixes, projects, id(own.get("weight", module)))
        return
    most = max((parameter.ndim for parameter in own.values()), default=0)
    for key, parameter in own.items():
        if parameter.ndim < 2:
            continue
        first, second = parameter.shape[-2:]
        layouts: tuple[tuple[int, int], ...] = ((second, first),)
        if isinstance(module, Conv1D):
            layouts = ((first, second),)
        elif key != "weight" or parameter.ndim > 2:
            layouts = ((second, first), (first, second))
        # beside stacked experts, what has fewer dimensions is their biases
        plain = not isinstance(module, (nn.Embedding, *CONVOLUTIONS)) and parameter.ndim == most
        num_experts = parameter.shape[0] if parameter.ndim > 2 else 1
        yield Matrix(name, key, layouts, num_experts, mixes, projects and plain, id(parameter))


def _mixes_positions(name: str, module: nn.Module) -> bool:
    part = name.rpartition(".")[2].lower()
    if "norm" in part:
        return False
    if re.search(r"attn|attention|(^|_)att$", part) or re.search(r"Attention\d*$", type(module).__name__):
        return True
    # an MLP has no heads and no convolution, and neither has a norm of heads inside it
    leaves = [child for child in module.children() if not any(p.ndim > 1 for p in child.parameters())]
    has_heads = any("head" in key for each in (module, *leaves) for key in vars(each) if key[0] != "_")
    return has_heads or any(isinstance(each, CONVOLUTIONS) for each in (module, *module.children()))


def matrices_of_kind(matrices: Sequence[Matrix], kind: str) -> list[Matrix]:
    """Return the matrices of a kind: `"attention"`, `"mlp"`, or a module name or name ending."""
    if kind in (ATTENTION, MLP):
        return [matrix for matrix in matrices if matrix.mixes == (kind == ATTENTION)]
    return [matrix for matrix in matrices if f".{matrix.module}".endswith(f".{kind}")]


# ---------------------------------------------------------------------- the projections of one decoder layer


@dataclass(frozen=True, slots=True)
class Projections:
    """The down-projection of a decoder layer and the up-projection before it; one of each for each expert in a list.

    `of_mlp` is false if the layer has no MLP of its own: then they are those of the mixer.
    """

    ups: tuple[Matrix, ...]
    downs: tuple[Matrix, ...]
    of_mlp: bool


def find_projections(stack: nn.ModuleList, layers: Sequence[int], hidden_size: int | None) -> list[Projections | None]:
    """Return the projections of some decoder layers; `None` for a layer that has none.

    - A shared expert, or a dense MLP beside experts, goes before the experts.
    - Without an MLP of its own (Mamba) the down-projection is the output projection of the mixer. An MLP that several
      layers share is not the layer's own: a delta would change them all.

    Args:
        stack: all decoder layers.
        layers: numbers of those to look at.
        hidden_size: size of the residual stream; `None`: not known.
    """
    uses = Counter(key for layer in stack for key in {id(parameter) for parameter in layer.parameters()})
    shared = {key for key, count in uses.items() if count > 1}
    return [_projections_in(stack[index], shared, hidden_size) for index in layers]


def _projections_in(layer: nn.Module, shared: Container[int], hidden_size: int | None) -> Projections | None:
    own = [each for each in matrices_of(layer) if each.is_projection and each.parameter_id not in shared]
    mlp = [matrix for matrix in own if not matrix.mixes]
    # some have up and down in modules of their own (`intermediate.dense`, `output.dense`)
    pairs = _pairs(mlp, hidden_size, together=True) or _pairs(mlp, hidden_size, together=False)
    if not pairs:
        return _mixer_projections([matrix for matrix in own if matrix.mixes], hidden_size)
    modules = dict(_without_tuner_insides(layer))
    up, down = max(pairs, key=lambda pair: _preference(layer, modules, pair[1], mlp.index(pair[1])))
    expert_list = _expert_list(modules, down.module)
    if expert_list is None:
        return Projections((up,), (down,), of_mlp=True)
    rest = f"{re.escape(expert_list)}\\.\\d+{re.escape(down.module[len(expert_list) + 1 :].lstrip('0123456789'))}"
    same = [pair for pair in pairs if re.fullmatch(rest, pair[1].module)]
    return Projections(tuple(pair[0] for pair in same), tuple(pair[1] for pair in same), of_mlp=True)


def _pairs(mlp: Sequence[Matrix], hidden_size: int | None, together: bool) -> list[tuple[Matrix, Matrix]]:
    """Return each down-projection with the nearest up-projection before it, else after it."""
    by_container: dict[str, list[int]] = {}
    for index, matrix in enumerate(mlp):
        by_container.setdefault(matrix.container if together else "", []).append(index)
    found = []
    for index, down in enumerate(mlp):
        around = by_container[down.container if together else ""]
        before = [each for each in around if each < index]
        # only shapes that are beyond doubt go before the order
        told = hidden_size is not None and len(down.layouts) == 1 and down.layouts[0][0] != down.layouts[0][1]
        after = [each for each in around if each > index] if told else []
        ups = [mlp[each] for each in (*reversed(before), *after) if _feeds(mlp[each], down, hidden_size)]
        if ups:
            found.append((ups[0], down))
    return found


def _feeds(up: Matrix, down: Matrix, hidden_size: int | None) -> bool:
    return (up.num_experts > 1) == (down.num_experts > 1) and any(
        up_inputs == hidden and hidden_size in (None, hidden) and inner > 1 and up_outputs in (inner, 2 * inner)
        for inner, hidden in down.layouts
        for up_inputs, up_outputs in up.layouts  # a fused gate doubles the outputs
    )


def _preference(layer: nn.Module, modules: dict[str, nn.Module], down: Matrix, index: int) -> tuple[int, ...]:
    """Return what tells the MLP from smaller pairs (low-rank, per-layer inputs), and a shared expert from experts."""
    container = modules.get(down.container, layer)
    activates = any(re.match(r"act", key) or "_act" in key for key in (*vars(container), *container._modules)) or any(
        type(child).__module__ in ACTIVATION_FILES for child in container.children()
    )
    experts = _expert_list(modules, down.module)
    num_experts = down.num_experts if experts is None else len(modules[experts])  # type: ignore[arg-type]
    inner, hidden = down.layouts[0]
    return activates, bool(down.container), -num_experts, inner * hidden, index


def _expert_list(modules: dict[str, nn.Module], name: str) -> str | None:
    """Return the name of the list of experts that a module is in. A list in the layer itself is of MLPs in turn."""
    while name:
        name = name.rpartition(".")[0]
        if "." in name and isinstance(modules.get(name), nn.ModuleList):
            return name
    return None


def _mixer_projections(mixers: Sequence[Matrix], hidden_size: int | None) -> Projections | None:
    linear = [matrix for matrix in mixers if len(matrix.layouts) == 1]
    writers = [matrix for matrix in linear if hidden_size in (None, matrix.layouts[0][1])]
    if not writers:
        return None
    down = writers[-1]
    readers = [
        matrix
        for matrix in linear
        if matrix is not down and matrix.container == down.container and matrix.layouts[0][0] == down.layouts[0][1]
    ]
    # the widest makes the mixer's inner size
    return Projections(tuple(sorted(readers, key=lambda each: each.layouts[0][1])[-1:]), (down,), of_mlp=False)


def reads_text(layer: nn.Module) -> bool:
    """Whether a decoder layer reads the text's own positions. A text model skips a layer of cross-attention alone."""
    tops = [name for name, module in layer.named_children() if _mixes_positions(name, base_of(module))]
    return not tops or not all("cross" in name.lower() for name in tops)


# ---------------------------------------------------------------------- beneath a tuner


def modules_of(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of a decoder layer by name, tuner layers instead of the modules that they wrap."""
    inside = tuple(f"{name}." for name, module in layer.named_modules() if isinstance(module, BaseTunerLayer))
    return [(name, module) for name, module in layer.named_modules() if name and not name.startswith(inside)]


def base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _without_tuner_insides(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, base_of(module)) for name, module in modules_of(layer))


def _around(modules: dict[str, nn.Module], name: str) -> Iterator[nn.Module]:
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            yield modules[name]
