"""Run the trunk once over all the edits, keep the states that enter the tail, and replay them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from tqdm.auto import tqdm

from .activation_storage import SharedActivations, allocate, fingerprint, load_states, new_file
from .narrowing import find_narrowable, narrowed
from .offload import OffloadedLayer
from .packed_attention import packed_attention
from .prefix_tree import Pack, PrefixTree
from .tail import CacheUnusableError, Tail, entering, logits_at, passed_over

logger = logging.getLogger(__name__)

Room = Callable[[tuple[int, int], torch.dtype], torch.Tensor]  # for (nodes, hidden)


@dataclass(frozen=True)
class Replay:
    """How a model is run on edits: what was kept of its trunk, and what is left out of its tail.

    Args:
        tail: where the model is cut.
        tree: the prefixes of the edits.
        device: where forwards run.
        states: (nodes, hidden), what enters the tail, a row a distinct prefix; `None` runs the trunk every time.
        packed: whether every distinct prefix is computed once, (1, N, hidden), or the edits padded on the right,
            (B, T, hidden).
        narrow: what in the last layer is computed for the scored tokens alone, if packed.
    """

    tail: Tail
    tree: PrefixTree
    device: torch.device
    states: torch.Tensor | None = None
    packed: bool = True
    narrow: tuple[nn.Module, ...] = ()

    def inputs(self, pack: Pack) -> dict[str, Any]:
        """Return the arguments of a forward on some edits.

        Under a causal mask padding on the right changes nothing to its left, so that there is no mask.
        """
        if self.packed:
            tensors = {"input_ids": pack.token_ids.unsqueeze(0), "position_ids": pack.positions.unsqueeze(0)}
        else:
            tensors = {"input_ids": pack.token_ids[pack.slots]}
        return {name: values.to(self.device) for name, values in tensors.items()} | {"use_cache": False}

    def where(self, pack: Pack, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where in the output of that forward the tokens at (rows, columns) of the edits are."""
        if not self.packed:
            return rows, columns
        columns = pack.slots.to(columns.device)[rows, columns]
        return torch.zeros_like(columns), columns

    @contextmanager
    def replayed(self, pack: Pack, columns: torch.Tensor | None = None) -> Iterator[None]:
        """Let forward and backward on these edits cost no more than they must.

        Args:
            pack: the edits.
            columns: where the scored tokens are, from `where`; `None` for all.
        """
        with ExitStack() as stack:
            if self.states is not None:
                nodes = pack.nodes if self.packed else pack.nodes[pack.slots].flatten()
                states = self.states[nodes]
                stack.enter_context(passed_over(self.tail.trunk))
                stack.enter_context(
                    entering(self.tail.entry_layer, lambda arriving: states.to(arriving.device).view_as(arriving))
                )
            if self.packed:
                stack.enter_context(packed_attention(self.tail.layers, pack))
                if columns is not None:
                    stack.enter_context(narrowed(self.narrow, columns.unique()))
            yield


def find_packing(model: nn.Module, replay: Replay, trial: torch.Tensor, narrow: bool) -> Replay:
    """Find out how this model can be run on edits, by running it on some of them.

    Args:
        model: the model, in evaluation mode.
        replay: with its tail, its tree and its device.
        trial: indices of a few edits, short and long.
        narrow: look for modules that can do with the rows of scored tokens, too.
    """
    try:
        if not agrees(model, replay, trial):
            replay = replace(replay, packed=False)
    except Exception as error:  # whatever a family's own code says to tokens that are no sequence
        if should_reduce_batch_size(error):
            raise
        logger.debug("not packed: %r", error)
        replay = replace(replay, packed=False)
    if not replay.packed:
        logger.info("Edits are padded, not packed: this model's attention is its own.")
        return replay
    if not narrow:
        return replay
    pack = replay.tree.pack(trial)
    last = pack.slots[:, -1].unique().to(replay.device)  # each edit's last token that predicts
    inputs = replay.inputs(pack)

    def logits() -> torch.Tensor:
        return logits_at(model, torch.zeros_like(last), last, inputs).logits

    with replay.replayed(pack):
        found = find_narrowable(replay.tail.layers[-1], logits, last, tolerance(model, replay.device))
    return replace(replay, narrow=tuple(found))


@dataclass(frozen=True)
class Storage:
    """Where the states that leave the trunk are kept.

    Args:
        place: `"memory"`, `"disk"` or `"auto"`, see `allocate`.
        folder: where a scratch file goes.
        kept_in: a folder for a file from which later runs take them, if model, edits and location are the same.
        quiet: no progress bar.
        shared: with other trainings on this base; `None`: with none.
    """

    place: str
    folder: str
    kept_in: str | None = None
    quiet: bool = False
    shared: SharedActivations | None = None


def cache_trunk(
    model: nn.Module, replay: Replay, batches: Sequence[torch.Tensor], trial: torch.Tensor, storage: Storage
) -> Replay:
    """Run the trunk over all the edits and keep the states that leave it.

    A trunk that is parked (`residency`) runs layer by layer, each of them over all the edits.

    Args:
        model: the model, in evaluation mode.
        replay: from `find_packing`.
        batches: indices of edits, each edit at least once.
        trial: indices of a few edits, for which a replay is compared with the whole model.
        storage: where the states go.

    Raises:
        CacheUnusableError: if the states cannot stand for the trunk in this model.
    """
    if replay.tail.why_whole is not None:
        raise CacheUnusableError(replay.tail.why_whole)
    shared, path, states = storage.shared, None, None
    others: dict[int, Path] = {}
    folder = storage.kept_in or (None if shared is None else str(shared.folder))
    if folder is not None:
        path = _file(folder, model, replay, shared)
        states = load_states(path, len(replay.tree))
    if states is None:
        if shared is not None and folder is not None:
            earlier = [layer for layer in shared.layers if 0 < layer < replay.tail.first]
            files = {layer: _file(folder, model, replay, shared, layer) for layer in earlier}
            others = {layer: file for layer, file in files.items() if not file.exists()}
        states = _run_trunk(model, replay, batches, storage, path, others)
    replay = replace(replay, states=states)
    if not agrees(model, replay, trial):
        raise CacheUnusableError("its later layers take more from the earlier ones than their states")
    return replay


def _file(
    folder: str, model: nn.Module, replay: Replay, shared: SharedActivations | None, first: int | None = None
) -> Path:
    """Return the file of the states that enter a layer; `None`: the first of the tail."""
    tail = replay.tail if first is None else Tail(replay.tail.layers, first)
    return Path(folder, f"{fingerprint(model, tail, replay.tree, replay.device, shared)}.safetensors")


def _run_trunk(
    model: nn.Module,
    replay: Replay,
    batches: Sequence[torch.Tensor],
    storage: Storage,
    path: Path | None,
    others: Mapping[int, Path],
) -> torch.Tensor:
    """Return what leaves the trunk; on the way write what enters other layers, too, unless the trunk is parked."""
    layers, last = replay.tail.layers, replay.tail.first
    parked = [layer for layer in replay.tail.trunk if isinstance(layer, OffloadedLayer)]
    stops = range(1, last + 1) if parked else [last]
    part = replace(replay, tail=Tail(layers, 0))
    with ExitStack() as stack:
        progress = stack.enter_context(
            tqdm(
                total=len(stops) * len(batches),
                desc="running the frozen layers once",
                leave=False,
                disable=storage.quiet or len(stops) * len(batches) < 20,
            )
        )

        def room(file: Path | None, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
            if file is not None:
                return stack.enter_context(new_file(file, shape, dtype))
            return allocate(shape, dtype, storage.place, storage.folder)

        for stop in stops:
            entry_layers = {stop: partial(room, path if stop == last else None)}
            if not parked:
                entry_layers |= {layer: partial(room, file) for layer, file in others.items()}
            with parked[stop - 1].resident() if parked else nullcontext():
                states = _states_before(model, part, entry_layers, batches, progress)
            part = replace(part, tail=Tail(layers, stop), states=states)
    return states


class _Keeper:
    """Keeps what comes to a door, a row a distinct prefix."""

    states: torch.Tensor | None = None
    pack: Pack

    def __init__(self, replay: Replay, room: Room) -> None:
        self.replay, self.room = replay, room

    def __call__(self, arriving: torch.Tensor) -> None:
        if self.states is None:
            self.states = self.room((len(self.replay.tree), arriving.shape[-1]), arriving.dtype)
        rows, pack = arriving.flatten(0, 1), self.pack
        rows = rows if self.replay.packed else rows[pack.whole.places.to(rows.device)]
        self.states[pack.nodes] = rows.to(self.states.device)


@torch.no_grad()
def _states_before(
    model: nn.Module,
    replay: Replay,
    entry_layers: Mapping[int, Room],
    batches: Sequence[torch.Tensor],
    progress: tqdm[Any],
) -> torch.Tensor:
    """Run the model as far as the last of some doors, over all edits, keep what comes to each, and return that one's.

    A forward is run to its end, as FSDP and ZeRO need it, but behind the door there is only the head, for one token.

    Args:
        doors: by the number of the layer that is entered, where (nodes, hidden) is kept.
    """
    one = torch.zeros(1, dtype=torch.int64, device=replay.device)
    last = max(entry_layers)
    keepers = {stop: _Keeper(replay, room) for stop, room in entry_layers.items()}
    with ExitStack() as stack:
        for stop, keeper in keepers.items():
            stack.enter_context(entering(replay.tail.layers[stop], keeper))
        stack.enter_context(passed_over(list(replay.tail.layers[last:])))
        for batch in batches:
            pack = replay.tree.pack(batch)
            for keeper in keepers.values():
                keeper.pack = pack
            with replay.replayed(pack):
                logits_at(model, one, one, replay.inputs(pack))
            progress.update()
    states = keepers[last].states
    if states is None:
        raise CacheUnusableError("its first trained layer is not reached by a forward")
    return states


@torch.no_grad()
def agrees(model: nn.Module, replay: Replay, trial: torch.Tensor) -> bool:
    """Whether a replay gives the logits of the whole model's forward, padded and masked as usual.

    A family may hand more from layer to layer than states, or take no notice of positions.
    """
    pack = replay.tree.pack(trial)
    steps = replay.tree.offsets.diff()[trial] - 1
    mask = (torch.arange(pack.slots.shape[1]) < steps.unsqueeze(1)).long()
    whole = {"input_ids": pack.token_ids[pack.slots].to(replay.device), "attention_mask": mask.to(replay.device)}
    # each edit's last token, which sees all the others, and one in the middle
    rows = torch.arange(len(trial)).repeat(2).to(replay.device)
    columns = torch.cat([steps - 1, steps // 2]).to(replay.device)
    expected = logits_at(model, rows, columns, whole | {"use_cache": False}).logits.float()
    with replay.replayed(pack):
        found = logits_at(model, *replay.where(pack, rows, columns), replay.inputs(pack)).logits.float()
    return bool((expected - found).abs().max() <= tolerance(model, replay.device) * expected.abs().max())


def tolerance(model: nn.Module, device: torch.device) -> float:
    """Return by how much two ways to compute the same may differ, as a share of the largest value."""
    # accelerate keeps the forward aside that it runs in mixed precision
    is_mixed = torch.is_autocast_enabled(device.type) or "_original_forward" in vars(model)
    return 5e-2 if is_mixed or next(model.parameters()).itemsize < 4 else 1e-3
