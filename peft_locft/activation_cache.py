"""Run the trunk once over all the edits, keep the states that enter the tail, and replay them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from tqdm.auto import tqdm

from .narrowing import find_narrowable, narrowed
from .packed_attention import packed_attention
from .prefixes import Pack, PrefixTree
from .tail import CacheUnusable, Tail, entering, logits_at, passed_over

logger = logging.getLogger(__name__)


class _Reached(Exception):
    """Ends a forward at the door of a layer."""


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
                states = self.states[nodes].to(self.device, non_blocking=True)
                stack.enter_context(passed_over(self.tail.trunk))
                stack.enter_context(entering(self.tail.door, lambda arriving: states.view_as(arriving)))
            if self.packed:
                stack.enter_context(packed_attention(self.tail.layers, pack))
                if columns is not None:
                    stack.enter_context(narrowed(self.narrow, columns.unique()))
            yield


def find_packing(model: nn.Module, replay: Replay, trial: torch.Tensor) -> Replay:
    """Find out how this model can be run on edits, by running it on some of them.

    Args:
        trial: indices of a few edits, short and long.
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
    pack = replay.tree.pack(trial)
    last = pack.slots[:, -1].unique().to(replay.device)  # each edit's last token that predicts
    inputs = replay.inputs(pack)

    def logits() -> torch.Tensor:
        return logits_at(model, torch.zeros_like(last), last, inputs).logits

    with replay.replayed(pack):
        narrow = find_narrowable(replay.tail.layers[-1], logits, last, tolerance(model))
    return replace(replay, narrow=tuple(narrow))


def cache_trunk(
    model: nn.Module, replay: Replay, batches: Sequence[torch.Tensor], trial: torch.Tensor, place: str, folder: str
) -> Replay:
    """Run the trunk over all the edits and keep the states that leave it.

    Args:
        model: the model, in evaluation mode.
        replay: from `find_packing`.
        batches: indices of edits, each edit once.
        trial: indices of a few edits, for which a replay is compared with the whole model.
        place: `"memory"`, `"disk"`, or `"auto"`: memory where the states take less than half of what is free.
        folder: where a scratch file on the disk goes; it is removed when the process ends.

    Raises:
        CacheUnusable: if the states cannot stand for the trunk in this model.
    """
    if replay.tail.why_whole is not None:
        raise CacheUnusable(replay.tail.why_whole)
    states: torch.Tensor | None = None

    def keep(arriving: torch.Tensor) -> None:
        nonlocal states
        if states is None:
            states = _allocate((len(replay.tree), arriving.shape[-1]), arriving.dtype, place, folder)
        rows = arriving.flatten(0, 1)
        states[pack.nodes] = (rows if replay.packed else rows[pack.places.to(rows.device)]).to(states.device)
        raise _Reached

    with torch.no_grad(), entering(replay.tail.door, keep):
        for batch in tqdm(batches, desc="running the frozen layers once", leave=False, disable=len(batches) < 20):
            pack = replay.tree.pack(batch)
            try:
                with replay.replayed(pack):
                    model(**replay.inputs(pack))
            except _Reached:
                continue
            raise CacheUnusable("its first trained layer is not reached by a forward")
    replay = replace(replay, states=states)
    if not agrees(model, replay, trial):
        raise CacheUnusable("its later layers take more from the earlier ones than their states")
    return replay


def _allocate(shape: tuple[int, int], dtype: torch.dtype, place: str, folder: str) -> torch.Tensor:
    num_values = shape[0] * shape[1]
    if place == "auto":
        place = "memory" if num_values * dtype.itemsize < psutil.virtual_memory().available / 2 else "disk"
    if place == "memory":
        return torch.empty(shape, dtype=dtype)
    # without a name: the space is free again when the process ends, however it ends
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".activation-cache-") as file:
        return torch.from_file(file.name, shared=True, size=num_values, dtype=dtype).view(shape)


@torch.no_grad()
def agrees(model: nn.Module, replay: Replay, trial: torch.Tensor) -> bool:
    """Whether a replay gives the logits of the whole model's forward, padded and masked as usual.

    A family may hand more from layer to layer than states, or take no notice of positions.
    """
    pack = replay.tree.pack(trial)
    rows, columns = replay.tree.tokens(trial)
    mask = torch.zeros(pack.slots.shape, dtype=torch.int64).index_put((rows, columns), torch.tensor(1))
    ids = pack.token_ids[pack.slots]
    whole = model(input_ids=ids.to(replay.device), attention_mask=mask.to(replay.device), use_cache=False).logits
    with replay.replayed(pack):
        replayed = model(**replay.inputs(pack)).logits
    expected, found = whole[rows, columns].float(), replayed[replay.where(pack, rows, columns)].float()
    return bool((expected - found).abs().max() <= tolerance(model) * expected.abs().max())


def tolerance(model: nn.Module) -> float:
    """Return by how much two ways to compute the same may differ, as a share of the largest value."""
    return 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
