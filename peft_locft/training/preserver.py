"""Keeps the rest of a model while a trainer runs: acts on what is trained, after every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from .config import BreadthFirstConfig
from .input_statistics import InputStatistics, Tokens, input_statistics
from .preservation import NullSpaceProjector, SoftProjector, check_positive, check_share
from .trained_tensors import TrainedTensor, check_projectable, check_whole, find_trained

Projector: TypeAlias = NullSpaceProjector | SoftProjector


class Preserver:
    """What a trainer holds to keep the rest of the model: it is told of every step, and of the end.

    It acts on LocFT deltas, and on weights of a plain model that were unfrozen. Make one with `prepare`.

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
        self._keep_share = density

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
        """Find what is trained, and compute the projectors.

        Call it before a checkpoint is loaded into the model: what is there now is what training began from. A run that
        is resumed then has the same origin and, from the same text, the same projectors, and ends with the same bits.
        With several processes all of them call it; the first computes, and the others take what it has found.

        Args:
            model: with a LocFT adapter, or a plain one with some weights unfrozen; not wrapped for several processes.
            windows: text to preserve, see `input_statistics`.
            energy_share: for the null-space projector: the share of the inputs' energy, in (0, 1], whose directions
                are closed to training; 0.5 is a good value. `None`: no projector.
            soft_strength: in place of it, for the soft form of the projector: how strongly changes are damped, a
                number above 0. Then `before_step` has to be called, too. `None`: no soft projector.
            bound: the L-infinity bound on every value of `scale * delta`; `None`: none.
            density: RECT's share of the values of each delta that are kept when training has ended; `None`: all.
                What the projector holds is then held no longer exactly.
            cache_dir: a folder where statistics are kept for later runs.
            progress: show a progress bar.

        Raises:
            ValueError: if an argument is out of range or has no effect; if two of projector, soft projector and bound
                are asked for; if
                a trained parameter is not one that these can act on: of LoRA or another PEFT method for all of them,
                anything but the weight of a Linear or Conv1D for the projector; if one is sharded; and whatever
                `input_statistics` raises.
            FloatingPointError: if an input is not finite on the text.
        """
        _check(windows, energy_share, soft_strength, bound, density)
        if energy_share is soft_strength is bound is density is None:
            return cls([])
        trained = list(find_trained(model))
        check_whole(trained)
        if windows is not None:
            check_projectable(trained)
        for each in trained:
            if energy_share is not None or each.layer is None:
                each.remember_origin()
        if windows is not None:
            locations = list(dict.fromkeys(each.location for each in trained))

            def projectors() -> dict[str, Projector]:
                found = input_statistics(model, windows, locations, cache_dir=cache_dir, progress=progress)
                return {name: _projector(name, each, energy_share, soft_strength) for name, each in found.items()}

            _set_projectors(trained, _once(projectors))
        return cls(trained, bound, density)

    def before_step(self) -> None:
        """Keep what a soft projector needs of the moment before the optimizer's step; else without effect."""
        for each in self.trained:
            each.remember_before()

    def after_step(self, step_taken: bool = True) -> None:
        """Act on what the optimizer has changed; it need not be called where it took no step."""
        if not step_taken:
            return
        for each in self.trained:
            each.project()
            if self._bound is not None:
                each.bound(self._bound)

    def after_training(self) -> None:
        """Sparsify, where that was asked for."""
        if self._keep_share is not None:
            for each in self.trained:
                each.sparsify(self._keep_share)


def prepare_preserver(model: nn.Module, windows: Tokens | None, args: BreadthFirstConfig) -> Preserver:
    """Return the preserver that a recipe asks for; see [`Preserver.prepare`].

    Args:
        model: not wrapped for several processes.
        windows: token ids of what is to be preserved, for the projector.
        args: the recipe.

    Raises:
        ValueError: if the delta's decay would act on anything but an adapter's parameters; and whatever
            `Preserver.prepare` raises.
    """
    _check_decay(model, args)
    return Preserver.prepare(
        model,
        windows=windows,
        energy_share=args.preserve_energy_share or None,
        soft_strength=args.preserve_soft_strength or None,
        bound=args.delta_bound,
        density=args.delta_density,
        cache_dir=args.preserve_cache_dir,
        progress=not args.disable_tqdm,
    )


def _check_decay(model: nn.Module, args: BreadthFirstConfig) -> None:
    """Refuse a decay that is to draw the model towards its base, where it would draw a weight towards zero."""
    if not args.delta_decay:
        return
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)  # of a PEFT tuner's parameters
    own = [name for name, p in model.named_parameters() if p.requires_grad and (prefix is None or prefix not in name)]
    if own:
        raise ValueError(
            f"BreadthFirstConfig.delta_decay={args.delta_decay:g} (recipe={args.recipe!r}) draws what is trained "
            f"towards zero, and {own[0]} is a weight of the model itself. Train a LocFTConfig without "
            "modules_to_save, or give delta_decay=0."
        )


class PreservationCallback(TrainerCallback):
    """Tells a [`Preserver`] of the steps of any `transformers.Trainer`, and of the end; sets the delta's decay."""

    def __init__(self, preserver: Preserver) -> None:
        self.preserver = preserver

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        decay = getattr(args, "delta_decay", None)
        if decay and args.learning_rate:
            steps = math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)  # of an epoch
            for group in kwargs["optimizer"].param_groups:
                # AdamW's step takes the rate times this off
                group["weight_decay"] = args.weight_decay + decay / (args.learning_rate * steps)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.preserver.before_step()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # a gradient that was dropped leaves none, and the optimizer standing still
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
            f"{' and '.join(given)}: what one does to a step the other undoes: a clipped delta leaves the null space. "
            "Give one of them."
        )
    needs_text = energy_share is not None or soft_strength is not None
    if needs_text and windows is None:
        raise ValueError(f"{given[0]}: a projector needs windows, the text to preserve.")
    if not needs_text and windows is not None:
        raise ValueError("windows: a text to preserve is for a projector alone. Give energy_share, such as 0.5, too.")


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
    """Return what the first process computes, in all of them: bits may differ from one machine to another."""
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
            # beside a bfloat16 base, whose outputs tell no smaller differences, a third of the time or less
            half = each.module.weight.dtype == torch.bfloat16
            matrix = found.matrix.to(device, torch.bfloat16 if half else torch.float32)
            each.projector = SoftProjector(matrix, each.input_dim)
