"""Keeps the rest of a model while a trainer runs: acts on what is trained, after every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from .input_statistics import InputStatistics, Tokens, input_statistics
from .preservation import DampingProjector, NullSpaceProjector, check_limit, check_share
from .recipe import BreadthFirstConfig
from .trained_tensors import TrainedTensor, check_projectable, check_whole, find_trained

Projector: TypeAlias = NullSpaceProjector | DampingProjector


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
        self, trained: Sequence[TrainedTensor], bound: float | None = None, keep_share: float | None = None
    ) -> None:
        self.trained = list(trained)
        self._bound = bound
        self._keep_share = keep_share

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        *,
        windows: Tokens | None = None,
        energy_share: float | None = None,
        damping: float | None = None,
        bound: float | None = None,
        keep_share: float | None = None,
        token_weights: Sequence[Sequence[float]] | torch.Tensor | None = None,
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
            damping: for the soft projector: how much slower training shall be in a direction with the mean energy of
                the inputs; 10 is a good value. `None`: no such projector.
            bound: the L-infinity bound on every value of `scale * delta`; `None`: none.
            keep_share: RECT's share of the values of each delta that are kept when training has ended; `None`: all.
                What the projector holds is then held no longer exactly.
            token_weights: of `windows`.
            cache_dir: a folder where statistics are kept for later runs.
            progress: show a progress bar.

        Raises:
            ValueError: if an argument is out of range or has no effect; if projector and bound are both asked for; if
                a trained parameter is not one that these can act on: of LoRA or another PEFT method for all of them,
                anything but the weight of a Linear or Conv1D for the projector; if one is sharded; and whatever
                `input_statistics` raises.
            FloatingPointError: if an input is not finite on the text.
        """
        _check(windows, energy_share, damping, bound, keep_share, token_weights)
        projects = energy_share is not None or damping is not None
        if not projects and bound is None and keep_share is None:
            return cls([])
        trained = list(find_trained(model))
        check_whole(trained)
        if projects:
            check_projectable(trained)
        for each in trained:
            if energy_share is not None or each.layer is None:
                each.remember_origin()
        if projects:
            assert windows is not None
            locations = list(dict.fromkeys(each.location for each in trained))

            def projectors() -> dict[str, Projector]:
                found = input_statistics(
                    model, windows, locations, token_weights=token_weights, cache_dir=cache_dir, progress=progress
                )
                return {name: _projector(name, each, energy_share, damping) for name, each in found.items()}

            _set_projectors(trained, _once(projectors))
        return cls(trained, bound, keep_share)

    def before_step(self) -> None:
        """Take notice of what the optimizer is about to change."""
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

    def describe(self) -> dict[str, Any]:
        """Return what is recorded of it: how many directions are closed at each location, of how many."""
        closed = {
            each.name: {"dropped": each.projector.basis.shape[1], "of": each.projector.basis.shape[0]}
            for each in self.trained
            if each.projector is not None
        }
        return {"bound": self._bound, "keep_share": self._keep_share, "closed_directions": closed}


def prepare_preserver(
    model: nn.Module, windows: Tokens | None, weights: Sequence[Sequence[float]] | None, args: BreadthFirstConfig
) -> Preserver:
    """Return the preserver that a recipe asks for; see [`Preserver.prepare`].

    Args:
        model: not wrapped for several processes.
        windows: token ids of what is to be preserved, for the projector.
        weights: what each of them counts; `None`: all the same.
        args: the recipe.
    """
    return Preserver.prepare(
        model,
        windows=windows,
        energy_share=args.preserve_energy or None,
        damping=args.preserve_damping or None,
        token_weights=weights,
        bound=args.delta_bound,
        keep_share=args.keep_largest,
        cache_dir=args.preserve_cache_dir,
        progress=not args.disable_tqdm,
    )


class PreservationCallback(TrainerCallback):
    """Tells a [`Preserver`] of the steps of any `transformers.Trainer`, and of the end of training."""

    def __init__(self, preserver: Preserver) -> None:
        self.preserver = preserver

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
    damping: float | None,
    bound: float | None,
    keep_share: float | None,
    token_weights: Any,
) -> None:
    if energy_share is not None and damping is not None:
        raise ValueError("energy_share and damping: found both; expected one projector, the hard one or the soft one.")
    if energy_share is not None:
        check_share("energy_share", energy_share)
    if keep_share is not None:
        check_share("keep_share", keep_share)
    if bound is not None:
        check_limit("bound", bound)
    if energy_share is not None and bound is not None:
        raise ValueError(
            "energy_share and bound: what is clipped is not in the null space any more, so that one would undo the "
            "other. Give one of them."
        )
    projects = energy_share is not None or damping is not None
    if projects and windows is None:
        raise ValueError("energy_share or damping: a projector needs windows, the text to preserve.")
    if not projects and (windows is not None or token_weights is not None):
        raise ValueError(
            "windows: a text to preserve is for the projectors alone. Give damping, such as 10, or energy_share, such "
            "as 0.5, too."
        )


# ---------------------------------------------------------------------- projectors


def _projector(name: str, statistics: InputStatistics, energy_share: float | None, damping: float | None) -> Projector:
    try:
        if energy_share is not None:
            return NullSpaceProjector.from_second_moment(statistics.second_moment, energy_share)
        assert damping is not None
        return DampingProjector.from_second_moment(statistics.second_moment, damping)
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
        each.projector = replace(projectors[each.location], input_dim=each.input_dim)
