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
from .forward_plan import ForwardPlan, equals_whole_model
from .offload import OffloadedLayer
from .prefix_tree import Pack
from .tail import CacheUnusableError, Tail, entering, logits_at, skipped

# a shape, (nodes, hidden), and a dtype to an empty tensor
Allocate = Callable[[tuple[int, int], torch.dtype], torch.Tensor]

FEWEST_WITH_PROGRESS = 20  # forwards


def cache_trunk(
    model: nn.Module, plan: ForwardPlan, batches: Sequence[torch.Tensor], trial: torch.Tensor, storage: StateStorage
) -> ForwardPlan:
    """Return the plan with the states that leave the trunk: taken from a file, or by running the trunk on all edits.

    An offloaded trunk runs layer by layer, each layer over all edits.

    Args:
        model: the model, in evaluation mode.
        plan: from `find_packing`.
        batches: indices of edits, each edit at least once.
        trial: indices of a few edits, for which the tail alone is compared with the whole model.
        storage: where the states are stored.

    Raises:
        CacheUnusableError: if the states cannot replace the trunk in this model.
    """
    if plan.tail.why_no_trunk is not None:
        raise CacheUnusableError(plan.tail.why_no_trunk)
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
    plan = replace(plan, states=states)
    if not equals_whole_model(model, plan, trial):
        raise CacheUnusableError("the model's later layers use more of the earlier layers than their hidden states")
    return plan


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
    layers, last = plan.tail.layers, plan.tail.first
    offloaded = [layer for layer in plan.tail.trunk if isinstance(layer, OffloadedLayer)]
    stops = range(1, last + 1) if offloaded else [last]
    part = replace(plan, tail=Tail(layers, 0))
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
            part = replace(part, tail=Tail(layers, stop), states=states)
    return states


class _StateWriter:
    """Writes the states that enter a layer to a tensor, (nodes, hidden), one row for each distinct prefix."""

    states: torch.Tensor | None = None
    pack: Pack

    def __init__(self, plan: ForwardPlan, allocate: Allocate) -> None:
        self.plan, self.allocate = plan, allocate

    def __call__(self, arriving: torch.Tensor) -> None:
        if self.states is None:
            self.states = self.allocate((len(self.plan.tree), arriving.shape[-1]), arriving.dtype)
        rows, pack = arriving.flatten(0, 1), self.pack
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
        stack.enter_context(skipped(list(plan.tail.layers[last:])))
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
