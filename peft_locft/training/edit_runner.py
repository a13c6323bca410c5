"""How a model is run on edits while it is trained: no further than it must be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from ..data.encoding import EncodedEdits, collate
from ..engine.activation_cache import cache_trunk
from ..engine.activation_storage import StateStorage
from ..engine.distributed import SHARDED, missing_pieces
from ..engine.forward_plan import ForwardPlan, find_packing
from ..engine.memory import FEWEST_TOKENS_ON_CPU, MOST_TOKENS, fitting_tokens
from ..engine.prefix_tree import PrefixTree
from ..engine.tail import CacheUnusableError, find_tail
from .batches import micro_batches
from .config import BreadthFirstConfig
from .objectives import Objective, Scored, labels_for, scored_positions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """Some edits as one forward.

    Args:
        labels: (B, T) token ids, -100 where nothing is scored.
        scored: which logits score which tokens.
        inputs: the arguments of the forward.
        where: (rows, columns) in its output, of the logits that are scored.
    """

    labels: torch.Tensor
    scored: Scored
    inputs: dict[str, Any]
    where: tuple[torch.Tensor, torch.Tensor]


class EditRunner:
    """Runs a model on edits: whole and padded, until `prepare` has found how to do with less.

    Args:
        edits: the encoded edits.
        own: (own edits,) indices of those that this process trains.
        objective: what is scored.
        max_tokens: in one micro-batch; `None` for what memory has room for.
        device: where forwards run.
    """

    def __init__(
        self,
        edits: EncodedEdits,
        own: torch.Tensor,
        objective: Objective,
        max_tokens: int | None,
        device: torch.device,
    ) -> None:
        self.edits = edits
        self.own = own
        self.objective = objective
        self.max_tokens = max_tokens or (FEWEST_TOKENS_ON_CPU if device.type == "cpu" else MOST_TOKENS)
        self._choose_tokens = max_tokens is None
        self.device = device
        self.replay: ForwardPlan | None = None
        self.is_prepared = False
        self._running: MicroBatch | None = None

    def prepare(self, model: nn.Module, args: BreadthFirstConfig, accelerator: Accelerator) -> None:
        """Find out how little of the model must be run, and run its trunk over all the edits.

        Args:
            model: the model, in evaluation mode, with what joins processes around it.
            args: where the states that leave the trunk are kept. If that is left open and they cannot be, a warning
                says why.
            accelerator: what has put something around the model.

        Raises:
            ValueError: if the states cannot be kept and something in `args` needs them.
        """
        while True:
            try:
                self._prepare(model, args, accelerator)
            except RuntimeError as error:
                if not self.halve(error):
                    raise
            else:
                self.is_prepared = True
                return

    def _prepare(self, model: nn.Module, args: BreadthFirstConfig, accelerator: Accelerator) -> None:
        self.replay = None
        unwrapped = accelerator.unwrap_model(model)
        is_sharded = accelerator.distributed_type in SHARDED
        # what shards weights must see every forward; what averages gradients must see none but those of training
        model = model if is_sharded else unwrapped
        try:
            tail = find_tail(unwrapped)
            if self._choose_tokens:
                head, share = unwrapped.get_output_embeddings(), self._share_scored()
                self.max_tokens, self._choose_tokens = fitting_tokens(tail, head, share, self.device), False
            if args.activation_cache == "off":
                return
            tree, trial = PrefixTree.of(self.edits.token_ids, self.edits.offsets, self.own), self._trial()
            self.replay = find_packing(model, ForwardPlan(tail, tree, self.device), trial, narrow=not is_sharded)
            pieces = self.pieces(self.own)
            pieces += pieces[:1] * missing_pieces(len(pieces), accelerator)
            storage = StateStorage(
                args.activation_cache, args.output_dir, args.activation_cache_dir, progress=not args.disable_tqdm
            )
            self.replay = cache_trunk(model, self.replay, pieces, trial, storage)
        except CacheUnusableError as reason:
            if args.activation_cache != "auto" or args.activation_cache_dir or args.offload_trunk:
                raise ValueError(
                    f"The activation cache cannot be used with this model and location: {reason}. Leave "
                    "activation_cache on 'auto', activation_cache_dir unset and offload_trunk=False."
                ) from None
            logger.warning("Every epoch runs the whole model: %s.", reason)
            if self.replay is not None and not self.replay.packed:
                self.replay = None

    def _share_scored(self) -> float:
        scored = self.edits.lengths - (1 if self.objective == "full" else self.edits.target_starts)
        return float(scored.sum() / self.edits.lengths.sum())

    def _trial(self) -> torch.Tensor:
        """Choose a few edits, long and short, that make one micro-batch."""
        by_length = self.own[torch.argsort(self.edits.lengths[self.own], descending=True)]
        fitting = max(1, self.max_tokens // int(self.edits.lengths[by_length[0]]))
        return torch.cat([by_length[:1], by_length[-2:], by_length[1:2]])[:fitting].unique()

    def halve(self, error: Exception) -> bool:
        """Make micro-batches half as large after an error, if it says that memory ran out and they can be smaller."""
        smallest = int(self.edits.lengths.max())
        if not should_reduce_batch_size(error) or self.max_tokens <= smallest:
            return False
        self.max_tokens = max(self.max_tokens // 2, smallest)
        logger.warning("Memory ran out: max_tokens_per_micro_batch is %d from here on.", self.max_tokens)
        return True

    def pieces(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Cut a batch into micro-batches."""
        rank = self.replay.tree.rank if self.replay is not None and self.replay.packed else None
        return micro_batches(indices, self.edits.lengths, self.max_tokens, rank)

    @contextmanager
    def running(self, indices: torch.Tensor) -> Iterator[MicroBatch]:
        """Set the model up for forward and backward on some edits. Inside of itself it does nothing more."""
        if self._running is not None:
            yield self._running
            return
        batch = collate([self.edits[i] for i in indices.tolist()], pad_token_id=0)
        batch = {name: values.to(self.device) for name, values in batch.items()}
        labels = labels_for(self.objective, batch["input_ids"], batch["attention_mask"], batch["target_start"])
        scored = scored_positions(labels, self.objective)
        where = (scored.rows, scored.sources)
        if self.replay is None:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
            ready: AbstractContextManager[None] = nullcontext()
        else:
            pack = self.replay.tree.pack(indices)
            where = self.replay.output_places(pack, *where)
            inputs, ready = self.replay.inputs(pack), self.replay.applied(pack, where[1])
        self._running = MicroBatch(labels, scored, inputs, where)
        try:
            with ready:
                yield self._running
        finally:
            self._running = None
