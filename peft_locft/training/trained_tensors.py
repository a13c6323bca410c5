"""The tensors that are trained in a model: LocFT deltas, and unfrozen weights of the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from ..io.parameter_names import clean_name
from ..tuner.delta import Delta
from ..tuner.layer import LocFTLayer
from .input_statistics import input_dimension
from .preservation import NullSpaceProjector, SoftProjector, bound_, sparsify_


@dataclass
class TrainedTensor:
    """A delta, or a weight of the model itself that is trained.

    Args:
        location: name of its module in the base model.
        owner: the module that holds the parameter; it is looked up there, since it may be replaced.
        parameter: its name there, which is the name of the base parameter.
        module: the base module.
        layer: the tuner layer of a delta; `None` for a weight of the model itself.
        adapter: name of the delta's adapter.
        origin: the value before training; `None`: zeros.
        projector: of this location; `None`: none.
        before: the value before a step, for a soft projector.
    """

    location: str
    owner: nn.Module
    parameter: str
    module: nn.Module
    layer: LocFTLayer | None = None
    adapter: str = ""
    origin: torch.Tensor | None = None
    projector: NullSpaceProjector | SoftProjector | None = None
    before: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return f"{self.location}.{self.parameter}"

    @property
    def tensor(self) -> torch.Tensor:
        return self.owner._parameters[self.parameter]  # type: ignore[return-value]

    @property
    def input_dim(self) -> int | None:
        """Dimension of the tensor along which its inputs lie; `None` if it is not multiplied with an input."""
        return input_dimension(self.module) if self.parameter == "weight" else None

    def remember_origin(self) -> None:
        tensor = self.tensor.detach()
        if self.layer is None or bool(tensor.any()):
            self.origin = tensor.clone()

    def remember_before(self) -> None:
        if isinstance(self.projector, SoftProjector):
            self.before = self.tensor.detach().clone()

    def project(self) -> None:
        if isinstance(self.projector, NullSpaceProjector):
            self.projector.project_(self.tensor, self.origin)
        elif self.projector is not None:
            if self.before is None:
                raise RuntimeError("Preserver.after_step: with soft_strength, call before_step before every step.")
            self.tensor.data.copy_(self.projector.project_change(self.tensor, self.before))
            self.before = None

    def bound(self, limit: float) -> None:
        if self.layer is None:
            bound_(self.tensor, limit, self.origin)
        elif scale := abs(self.layer.scaling[self.adapter]):
            bound_(self.tensor, limit / scale)

    def sparsify(self, density: float) -> None:
        if self.layer is None:
            assert self.origin is not None
            sparsify_(self.tensor, self.origin, density, self.origin)
        else:
            sparsify_(self.tensor, self.layer.base_tensors(self.adapter)[self.parameter], density)


def find_trained(model: nn.Module) -> Iterator[TrainedTensor]:
    """Yield every trained tensor of a model: LocFT deltas, and unfrozen weights of the model itself.

    Raises:
        ValueError: if none is trained, or one belongs to another PEFT method.
    """
    modules = dict(model.named_modules())
    insides = tuple(
        f"{name}."
        for name, module in modules.items()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not isinstance(module, LocFTLayer)
    )
    seen = set()
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if f"{name}.".startswith(insides):
                raise ValueError(
                    f"Preservation acts on LocFT deltas and unfrozen weights; {name}.{key} belongs to another PEFT "
                    "method. Train a LocFTConfig without modules_to_save and trainable_token_indices, or turn "
                    "preservation off."
                )
            if not isinstance(module, Delta):
                yield TrainedTensor(clean_name(name), module, key, module)
                continue
            layer_name, _, adapter = name.rpartition(".locft_delta.")
            layer = modules[layer_name]
            assert isinstance(layer, LocFTLayer)
            yield TrainedTensor(clean_name(layer_name), module, key, layer.base_layer, layer, adapter)
    if not seen:
        raise ValueError("Preservation found no trainable parameter. Load the adapter with is_trainable=True.")


def check_whole(trained: Sequence[TrainedTensor]) -> None:
    """Raise a ValueError if one is sharded between processes or offloaded."""
    for each in trained:
        tensor = each.tensor
        if tensor.is_meta or isinstance(tensor, DTensor) or hasattr(tensor, "ds_shape"):
            raise ValueError(
                f"Preservation needs every trained weight whole in every process; {each.name} is sharded or "
                "offloaded. Train with DDP or in one process, or turn preservation off."
            )


def check_projectable(trained: Sequence[TrainedTensor]) -> None:
    """Raise a ValueError that names the tensors that are not multiplied with an input."""
    others = [each for each in trained if each.input_dim is None]
    if others:
        listed = ", ".join(f"{each.name} ({type(each.module).__name__})" for each in others[:3])
        raise ValueError(
            "A projector needs the weight of a Linear or Conv1D; "
            f"found also {listed}{' and others' if len(others) > 3 else ''}. Leave them out "
            "(LocFTConfig.exclude_modules for embeddings, norms and quantized linears, train_bias=False, no "
            "target_parameters of fused experts), or use bound instead."
        )
