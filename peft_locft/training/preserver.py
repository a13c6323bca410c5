"""Protects the rest of a model during training: projects, bounds and sparsifies what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..io.parameter_names import clean_name
from ..tuner.delta import Delta
from ..tuner.layer import LocFTLayer
from .config import BreadthFirstConfig
from .input_statistics import InputStatistics, Tokens, input_dimension, input_statistics, statistics_folder
from .preservation import NullSpaceProjector, SoftProjector, bound_, check_positive, check_share, sparsify_

Projector: TypeAlias = NullSpaceProjector | SoftProjector


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
    projector: Projector | None = None
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

    def store_origin(self) -> None:
        tensor = self.tensor.detach()
        if self.layer is None or bool(tensor.any()):
            self.origin = tensor.clone()

    def store_before(self) -> None:
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


class Preserver:
    """Protects the rest of a model: call it at every step and at the end of training.

    It acts on LocFT deltas and on unfrozen weights of a plain model. Make one with `prepare`.

    Example:
        >>> preserver = Preserver.prepare(model, windows=windows, energy_share=0.5)
        >>> optimizer.step()
        >>> preserver.after_step()
        >>> preserver.after_training()
    """

    def __init__(
        self, trained: Sequence[TrainedTensor], bound: float | None = None, density: float | None = None
    ) -> None:
        self.trained = list(trained)
        self._bound = bound
        self._density = density

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        *,
        windows: Tokens | None = None,
        energy_share: float | None = None,
        soft_strength: float | None = None,
        bound: float | None = None,
        density: float | None = None,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> Preserver:
        """Find the trained tensors, and compute their projectors.

        Call it before a checkpoint is loaded: the current values are the origin of the training. A resumed run then
        has the same origin and projectors, and ends with the same bits. With several processes, all of them call it;
        the first one computes for all.

        Args:
            model: with a LocFT adapter, or a plain model with unfrozen weights; not wrapped for several processes.
            windows: text to preserve, see `input_statistics`.
            energy_share: for a null-space projector: the share of the inputs' energy, in (0, 1], whose directions are
                closed to training; 0.5 is a good value. `None`: no such projector.
            soft_strength: for a soft projector: strength of the damping, above 0. `before_step` must be called, too.
                `None`: no soft projector.
            bound: L-infinity bound on the values of `scale * delta`; `None`: no bound.
            density: share of each delta's values that stay after training (RECT); `None`: all. A projector then no
                longer holds exactly.
            cache_dir: folder that stores the statistics for later runs.
            progress: show a progress bar.

        Raises:
            ValueError: if an argument is out of range or has no effect; if more than one of energy_share,
                soft_strength and bound is given; if a trained parameter is sharded, belongs to another PEFT method,
                or (for a projector) is not the weight of a Linear or Conv1D; and as `input_statistics`.
            FloatingPointError: if an input is not finite on the text.
        """
        _check(windows, energy_share, soft_strength, bound, density)
        if energy_share is soft_strength is bound is density is None:
            return cls([])
        trained = list(find_trained(model))
        _check_whole(trained)
        if windows is not None:
            _check_projectable(trained)
        for each in trained:
            if energy_share is not None or each.layer is None:
                each.store_origin()
        if windows is not None:
            locations = list(dict.fromkeys(each.location for each in trained))

            def projectors() -> dict[str, Projector]:
                found = input_statistics(model, windows, locations, cache_dir=cache_dir, progress=progress)
                return {name: _projector(name, each, energy_share, soft_strength) for name, each in found.items()}

            _set_projectors(trained, _once(projectors))
        return cls(trained, bound, density)

    def before_step(self) -> None:
        """Store the trained tensors for a soft projector; call it before the optimizer's step."""
        for each in self.trained:
            each.store_before()

    def after_step(self, step_taken: bool = True) -> None:
        """Project and bound what the optimizer has changed; `step_taken=False` does nothing."""
        if not step_taken:
            return
        for each in self.trained:
            each.project()
            if self._bound is not None:
                each.bound(self._bound)

    def after_training(self) -> None:
        """Sparsify the deltas, if a density was given."""
        if self._density is not None:
            for each in self.trained:
                each.sparsify(self._density)


def prepare_preserver(model: nn.Module, windows: Tokens | None, args: BreadthFirstConfig) -> Preserver:
    """Return the preserver of a recipe, see [`Preserver.prepare`].

    Args:
        model: not wrapped for several processes.
        windows: token ids of the text to preserve, for a projector.
        args: the recipe.

    Raises:
        ValueError: if delta_decay would act on a weight of the model itself; and as `Preserver.prepare`.
    """
    _check_decay(model, args)
    return Preserver.prepare(
        model,
        windows=windows,
        energy_share=args.preserve_energy_share or None,
        soft_strength=args.preserve_soft_strength or None,
        bound=args.delta_bound,
        density=args.delta_density,
        cache_dir=statistics_folder(model, args.preserve_cache_dir),
        progress=not args.disable_tqdm,
    )


def _check_decay(model: nn.Module, args: BreadthFirstConfig) -> None:
    """Raise a ValueError if the decay would pull a weight of the model itself towards zero."""
    if not args.delta_decay:
        return
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)  # of a PEFT tuner's parameters
    own = [name for name, p in model.named_parameters() if p.requires_grad and (prefix is None or prefix not in name)]
    if own:
        raise ValueError(
            f"BreadthFirstConfig.delta_decay={args.delta_decay:g} (recipe={args.recipe!r}) pulls trained parameters "
            f"towards zero, and {own[0]} is a weight of the model itself. Train a LocFTConfig without "
            "modules_to_save, or set delta_decay=0."
        )


class PreservationCallback(TrainerCallback):
    """Calls a [`Preserver`] at each step of a `transformers.Trainer` and at the end; sets the decay of the delta.

    [`BreadthFirstTrainer`] adds its own; add one to another trainer behind callbacks that change the weights at the
    end of training.
    """

    def __init__(self, preserver: Preserver) -> None:
        self.preserver = preserver

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        decay = getattr(args, "delta_decay", None)
        if decay:
            steps = math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)  # of an epoch
            for group in kwargs["optimizer"].param_groups:
                # a step of AdamW removes this share times the learning rate
                group["weight_decay"] = args.weight_decay + decay / (group.get("initial_lr", group["lr"]) * steps)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.preserver.before_step()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # where the gradient was dropped, the optimizer took no step
        self.preserver.after_step(any(each.tensor.grad is not None for each in self.preserver.trained))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.preserver.after_training()


def _check(
    windows: Tokens | None,
    energy_share: float | None,
    soft_strength: float | None,
    bound: float | None,
    density: float | None,
) -> None:
    for name, share in (("energy_share", energy_share), ("density", density)):
        if share is not None:
            check_share(name, share)
    for name, number in (("soft_strength", soft_strength), ("bound", bound)):
        if number is not None:
            check_positive(name, number)
    each_step = {"energy_share": energy_share, "soft_strength": soft_strength, "bound": bound}
    given = [name for name, value in each_step.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} cannot be combined: one undoes the steps of the other. Use one of them."
        )
    needs_text = energy_share is not None or soft_strength is not None
    if needs_text and windows is None:
        raise ValueError(f"{given[0]}: a projector needs the text to preserve. Pass windows, too.")
    if not needs_text and windows is not None:
        raise ValueError("windows: the text has no effect without a projector. Pass energy_share=0.5, too.")


# ---------------------------------------------------------------------- trained tensors


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


def _check_whole(trained: Sequence[TrainedTensor]) -> None:
    """Raise a ValueError if one is sharded between processes or offloaded."""
    for each in trained:
        tensor = each.tensor
        if tensor.is_meta or isinstance(tensor, DTensor) or hasattr(tensor, "ds_shape"):
            raise ValueError(
                f"Preservation needs every trained weight whole in every process; {each.name} is sharded or "
                "offloaded. Train with DDP or in one process, or turn preservation off."
            )


def _check_projectable(trained: Sequence[TrainedTensor]) -> None:
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


# ---------------------------------------------------------------------- projectors


def _projector(
    name: str, statistics: InputStatistics, energy_share: float | None, soft_strength: float | None
) -> Projector:
    try:
        if energy_share is not None:
            return NullSpaceProjector.from_second_moment(statistics.second_moment, energy_share)
        assert soft_strength is not None
        return SoftProjector.from_second_moment(statistics.second_moment, soft_strength)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _once(compute: Callable[[], dict[str, Projector]]) -> dict[str, Projector]:
    """Return what the first process computes in all processes: machines may differ in bits."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return compute()
    shared = [compute() if torch.distributed.get_rank() == 0 else {}]
    torch.distributed.broadcast_object_list(shared)
    return shared[0]


def _set_projectors(trained: Sequence[TrainedTensor], projectors: dict[str, Projector]) -> None:
    for each in trained:
        assert each.input_dim is not None
        found, device = projectors[each.location], each.tensor.device
        if isinstance(found, NullSpaceProjector):
            each.projector = NullSpaceProjector(found.basis.to(device), each.input_dim)
        else:
            # exact enough beside a bfloat16 base, in a third of the time
            half = each.module.weight.dtype == torch.bfloat16
            matrix = found.matrix.to(device, torch.bfloat16 if half else torch.float32)
            each.projector = SoftProjector(matrix, each.input_dim)
