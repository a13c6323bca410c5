"""Run the trunk once over all the edits, keep the states that enter the tail, and replay them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from tqdm.auto import tqdm

from .kept_states import allocate, fingerprint, load_states, new_file
from .narrowing import find_narrowable, narrowed
from .packed_attention import packed_attention
from .prefixes import Pack, PrefixTree
from .residency import ParkedLayer
from .tail import CacheUnusable, Tail, entering, logits_at, passed_over

logger = logging.getLogger(__name__)


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
                    entering(self.tail.door, lambda arriving: states.to(arriving.device).view_as(arriving))
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
    """

    place: str
    folder: str
    kept_in: str | None = None
    quiet: bool = False


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
        CacheUnusable: if the states cannot stand for the trunk in this model.
    """
    if replay.tail.why_whole is not None:
        raise CacheUnusable(replay.tail.why_whole)
    path = states = None
    if storage.kept_in is not None:
        path = Path(storage.kept_in, f"{fingerprint(model, replay.tail, replay.tree, replay.device)}.safetensors")
        states = load_states(path, len(replay.tree))
    if states is None:
        states = _run_trunk(model, replay, batches, storage, path)
    replay = replace(replay, states=states)
    if not agrees(model, replay, trial):
        raise CacheUnusable("its later layers take more from the earlier ones than their states")
    return replay


def _run_trunk(
    model: nn.Module, replay: Replay, batches: Sequence[torch.Tensor], storage: Storage, path: Path | None
) -> torch.Tensor:
    layers, last = replay.tail.layers, replay.tail.first
    parked = [layer for layer in replay.tail.trunk if isinstance(layer, ParkedLayer)]
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

        def room(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
            if stop == last and path is not None:
                return stack.enter_context(new_file(path, shape, dtype))
            return allocate(shape, dtype, storage.place, storage.folder)

        for stop in stops:
            with parked[stop - 1].resident() if parked else nullcontext():
                states = _states_before(model, part, layers[stop], batches, room, progress)
            part = replace(part, tail=Tail(layers, stop), states=states)
    return states


@torch.no_grad()
def _states_before(
    model: nn.Module,
    replay: Replay,
    door: nn.Module,
    batches: Sequence[torch.Tensor],
    room: Callable[[tuple[int, int], torch.dtype], torch.Tensor],
    progress: tqdm[Any],
) -> torch.Tensor:
    """Run the model as far as a layer's door, over all edits, and return what comes there, (nodes, hidden).

    A forward is run to its end, as FSDP and ZeRO need it, but behind the door there is only the head, for one token.
    """
    states: torch.Tensor | None = None
    one = torch.zeros(1, dtype=torch.int64, device=replay.device)
    behind = list(replay.tail.layers)
    behind = behind[behind.index(door) :]

    def keep(arriving: torch.Tensor) -> None:
        nonlocal states
        if states is None:
            states = room((len(replay.tree), arriving.shape[-1]), arriving.dtype)
        rows = arriving.flatten(0, 1)
        states[pack.nodes] = (rows if replay.packed else rows[pack.places.to(rows.device)]).to(states.device)

    with entering(door, keep), passed_over(behind):
        for batch in batches:
            pack = replay.tree.pack(batch)
            with replay.replayed(pack):
                logits_at(model, one, one, replay.inputs(pack))
            progress.update()
    if states is None:
        raise CacheUnusable("its first trained layer is not reached by a forward")
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
    is_half = next(model.parameters()).itemsize < 4 or torch.is_autocast_enabled(device.type)
    return 5e-2 if is_half else 1e-3
