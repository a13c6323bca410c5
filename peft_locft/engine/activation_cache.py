"""Run the trunk once over all edits, and store the states that enter the tail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .activation_storage import StateStorage, load_states, new_states_file, state_files
from .checks import ModelChecks, trial_logits
from .forward_plan import ForwardPlan
from .offload import OffloadedLayer
from .prefix_tree import Pack
from .tail import CacheUnusableError, entering, logits_at, skipped
from .trial import logits_of

# a shape, (nodes, hidden), and a dtype to an empty tensor
Allocate = Callable[[tuple[int, int], torch.dtype], torch.Tensor]

FEWEST_WITH_PROGRESS = 20  # forwards


def cache_trunk(
    model: nn.Module, plan: ForwardPlan, batches: Sequence[torch.Tensor], checks: ModelChecks, storage: StateStorage
) -> ForwardPlan:
    """Return the plan with the states that leave the trunk: taken from a file, or by running the trunk on all edits.

    An offloaded trunk runs layer by layer, each layer over all edits.

    Args:
        model: the model, in evaluation mode.
        plan: with its layout, from `find_layout`.
        batches: indices of edits, each edit at least once.
        checks: of the model; with their sequences, the tail alone is compared with the whole model.
        storage: where the states are stored.

    Raises:
        CacheUnusableError: if the states cannot replace the trunk in this model.
    """
    if plan.tail.why_no_trunk is not None:
        raise CacheUnusableError(plan.tail.why_no_trunk)
    # every token that follows counts, and the tree leaves out the last one
    why_alone = checks.why_alone(int(plan.tree.offsets.diff().max()))
    if why_alone is not None:
        raise CacheUnusableError(why_alone)
    plan = replace(plan, tail=replace(plan.tail, num_outputs=checks.trial.num_outputs))
    _check_states(model, plan, checks)
    shared, path, states = storage.shared, None, None
    others: dict[int, Path] = {}
    folder = storage.cache_dir or (None if shared is None else shared.folder)
    if folder is not None:
        files = state_files(folder, model, plan.tail, plan.tree, plan.device, shared)
        path = files[plan.tail.first]
        states = load_states(path, len(plan.tree))
        if shared is not None:
            earlier = [layer for layer in shared.layers if 0 < layer < plan.tail.first]
            others = {layer: files[layer] for layer in earlier if not files[layer].exists()}
    if states is None:
        states = _run_trunk(model, plan, batches, storage, path, others)
    return replace(plan, states=states)


def _check_states(model: nn.Module, plan: ForwardPlan, checks: ModelChecks) -> None:
    """Raise a CacheUnusableError if the states that enter the tail are not all that it takes from the trunk."""
    trial, first = checks.trial, plan.tail.first

    def find() -> str | None:
        on_trial = replace(plan, tail=replace(plan.tail, first=0), tree=trial.tree, narrow=())
        rows = torch.arange(len(trial.rows)).split(1 if plan.layout == "single" else len(trial.rows))
        states = _states_before(model, on_trial, {first: _in_memory}, rows, tqdm(disable=True))
        # what the trunk may have left elsewhere in the model must not be that of the same sequences
        logits_of(model, trial.rows[-1], plan.device)
        why = checks.trial.why_not(trial_logits(model, replace(plan, states=states), trial))
        return why and f"later layers use more of the earlier layers than their hidden states ({why})"

    what = f"activations kept before layer {first}"
    why = checks.once(("states", plan.layout, first), lambda: checks.why_not(what, model, find))
    if why is not None:
        raise CacheUnusableError(why)


def _in_memory(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _run_trunk(
    model: nn.Module,
    plan: ForwardPlan,
    batches: Sequence[torch.Tensor],
    storage: StateStorage,
    path: Path | None,
    others: Mapping[int, Path],
) -> torch.Tensor:
    """Return the states that leave the trunk, (nodes, hidden).

    Unless the trunk is offloaded, also write the states that enter earlier layers.

    Args:
        path: the file for the states; `None`: no file, or a scratch file.
        others: for earlier layers, the files for the states that enter them.
    """
    last = plan.tail.first
    offloaded = [layer for layer in plan.tail.trunk if isinstance(layer, OffloadedLayer)]
    stops = range(1, last + 1) if offloaded else [last]
    part = replace(plan, tail=replace(plan.tail, first=0))
    num_forwards = len(stops) * len(batches)
    hidden = not storage.progress or num_forwards < FEWEST_WITH_PROGRESS
    with ExitStack() as stack:
        progress = stack.enter_context(
            tqdm(total=num_forwards, desc="caching activations of the frozen layers", leave=False, disable=hidden)
        )

        def allocate(file: Path | None, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
            if file is None:
                return storage.allocate(shape, dtype)
            return stack.enter_context(new_states_file(file, shape, dtype))

        for stop in stops:
            allocations = {stop: partial(allocate, path if stop == last else None)}
            if not offloaded:
                allocations |= {layer: partial(allocate, file) for layer, file in others.items()}
            with offloaded[stop - 1].resident() if offloaded else nullcontext():
                states = _states_before(model, part, allocations, batches, progress)
            part = replace(part, tail=replace(plan.tail, first=stop), states=states)
    return states


class _StateWriter:
    """Writes the states that enter a layer to a tensor, (nodes, hidden), one row for each distinct prefix."""

    states: torch.Tensor | None = None
    pack: Pack

    def __init__(self, plan: ForwardPlan, allocate: Allocate) -> None:
        self.plan, self.allocate = plan, allocate

    def __call__(self, arriving: torch.Tensor) -> None:
        pack = self.pack
        expected = (1, len(pack.nodes)) if self.plan.packed else tuple(pack.slots.shape)
        if arriving.shape[:2] != expected:
            raise CacheUnusableError(f"states of shape {tuple(arriving.shape)} enter a layer, not {expected} and more")
        # a layer may pass several streams, (B, T, streams, hidden)
        rows = arriving.flatten(0, 1).flatten(1)
        if self.states is None:
            self.states = self.allocate((len(self.plan.tree), rows.shape[-1]), arriving.dtype)
        rows = rows if self.plan.packed else rows[pack.whole.places.to(rows.device)]
        self.states[pack.nodes] = rows.to(self.states.device)


@torch.no_grad()
def _states_before(
    model: nn.Module,
    plan: ForwardPlan,
    allocations: Mapping[int, Allocate],
    batches: Sequence[torch.Tensor],
    progress: tqdm[Any],
) -> torch.Tensor:
    """Run the model on all edits up to the last of some layers, and return the states that enter it, (nodes, hidden).

    The states that enter the other layers are written, too. A forward runs to its end, as FSDP and ZeRO need it, but
    skips the layers from the last one on, and computes the logits of one token only.

    Args:
        allocations: for each layer, by its number, what allocates the tensor for the states that enter it.
    """
    one = torch.zeros(1, dtype=torch.int64, device=plan.device)
    last = max(allocations)
    writers = {stop: _StateWriter(plan, allocate) for stop, allocate in allocations.items()}
    with ExitStack() as stack:
        for stop, writer in writers.items():
            stack.enter_context(entering(plan.tail.layers[stop], writer))
        stack.enter_context(skipped(list(plan.tail.layers[last:]), plan.tail.num_outputs))
        for batch in batches:
            pack = plan.tree.pack(batch)
            for writer in writers.values():
                writer.pack = pack
            with plan.applied(pack):
                logits_at(model, one, one, plan.inputs(pack))
            progress.update()
    states = writers[last].states
    if states is None:
        raise CacheUnusableError("a forward does not call the first trained layer")
    return states
