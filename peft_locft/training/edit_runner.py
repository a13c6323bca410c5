"""Runs a model on edits during training, and leaves out what does not change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from ..data.encoding import EncodedEdits, collate
from ..engine.activation_cache import cache_trunk
from ..engine.activation_storage import SharedActivations, StateStorage
from ..engine.checks import ModelChecks, checks_of, find_layout, find_narrow
from ..engine.distributed import SHARDED, missing_forwards
from ..engine.forward_plan import ForwardPlan, Layout
from ..engine.memory import FEWEST_TOKENS_ON_CPU, MOST_TOKENS, fitting_tokens, run_halving
from ..engine.prefix_tree import PrefixTree
from ..engine.tail import CacheUnusableError, Tail, find_tail
from ..tuner.targets import early_modules
from .batches import micro_batches
from .config import BreadthFirstConfig
from .objectives import Objective, Scored, labels_for, scored_positions

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class MicroBatch:
    """Some rows as one forward.

    Args:
        indices: (B,) the rows.
        labels: (B, T) token ids, -100 where nothing is scored.
        scored: which logits score which tokens.
        inputs: keyword arguments of the forward.
        where: (rows, columns) of the scored logits in its output.
    """

    indices: torch.Tensor
    labels: torch.Tensor
    scored: Scored
    inputs: dict[str, Any]
    where: tuple[torch.Tensor, torch.Tensor]


class EditRunner:
    """Runs a model on rows: the whole model on padded rows, until `prepare` has found out what can be left out.

    Args:
        edits: the encoded rows.
        own: (own rows,) indices of the rows that this process trains.
        objective: what is scored.
        max_tokens: most tokens of a micro-batch; `None`: chosen from the free memory.
        device: where forwards run.
        shared: where the states that leave the trunk are shared with other trainings on the same base.
    """

    def __init__(
        self,
        edits: EncodedEdits,
        own: torch.Tensor,
        objective: Objective,
        max_tokens: int | None,
        device: torch.device,
        shared: SharedActivations | None = None,
    ) -> None:
        self.edits = edits
        self.own = own
        self.objective = objective
        self.max_tokens = max_tokens or (FEWEST_TOKENS_ON_CPU if device.type == "cpu" else MOST_TOKENS)
        self._choose_tokens = max_tokens is None
        self.device = device
        self.shared = shared
        self.plan: ForwardPlan | None = None
        self.is_prepared = False
        # what lets only some tokens write into the deltas; `None`: all do
        self._written_by: Callable[[torch.Tensor], AbstractContextManager[None]] | None = None

    def prepare(self, model: nn.Module, args: BreadthFirstConfig, accelerator: Accelerator) -> None:
        """Find out how little of the model must run, and run its trunk once over all the edits.

        Args:
            model: the model, in evaluation mode, as wrapped by `accelerator`.
            args: where the states that leave the trunk are stored. If that is left open and they cannot be stored, a
                warning says why.
            accelerator: what wrapped the model.

        Raises:
            ValueError: if the model is not causal, or the states cannot be stored and something in `args` needs them.
        """
        self.plan = None
        is_sharded = accelerator.distributed_type in SHARDED
        unwrapped = accelerator.unwrap_model(model)
        # a wrapper that shards weights must see every forward; one that averages gradients only those of training
        model = model if is_sharded else unwrapped
        longest = int(self.edits.lengths.max())
        checks = self.halving(lambda: checks_of(model, self.device, longest, is_sharded=is_sharded))
        try:
            tail = find_tail(unwrapped)
        except CacheUnusableError as reason:
            tail = Tail(nn.ModuleList(), 0, str(reason))
        if self._choose_tokens and len(tail.layers):
            head, share = unwrapped.get_output_embeddings(), self._share_scored()
            self.max_tokens, self._choose_tokens = fitting_tokens(tail, head, share, self.device), False
        self.plan = self._find_plan(model, tail, args, checks, longest)
        if self.edits.writes is not None:
            early = early_modules(unwrapped) if args.gradient_tokens == "auto" else None
            self._written_by = partial(unwrapped.written_by, modules=early)
        # a narrowed module has other tokens than those that write
        if self.plan.packed and not is_sharded and self._written_by is None:
            self.plan = find_narrow(model, self.plan, checks)
        if args.activation_cache != "off":
            self._keep_states(model, args, accelerator, checks)
        self.is_prepared = True

    def _find_plan(
        self, model: nn.Module, tail: Tail, args: BreadthFirstConfig, checks: ModelChecks, longest: int
    ) -> ForwardPlan:
        layouts: tuple[Layout, ...] = ("packed", "padded", "masked")
        if args.activation_cache == "off" or not len(tail.layers):
            layouts = ("masked",)
        tree = PrefixTree.of(self.edits.token_ids, self.edits.offsets, self.own, self.edits.writes)
        plan = ForwardPlan(tail, tree, self.device)
        return self.halving(lambda: find_layout(model, plan, checks, layouts, longest))

    def _keep_states(
        self, model: nn.Module, args: BreadthFirstConfig, accelerator: Accelerator, checks: ModelChecks
    ) -> None:
        """Run the trunk over all edits and store the states that leave it, or say why not."""
        must = args.activation_cache != "auto" or bool(args.activation_cache_dir) or args.offload_trunk
        try:
            self.plan = self.halving(lambda: self._with_states(model, args, accelerator, checks))
        except CacheUnusableError as reason:
            if must:
                raise ValueError(
                    f"The activation cache cannot be used with this model and location: {reason}. Leave "
                    "activation_cache on 'auto', activation_cache_dir unset and offload_trunk=False."
                ) from None
            logger.warning("Every epoch runs the whole model: %s.", reason)
        except Exception as error:  # a family's own code may raise anything
            if must or should_reduce_batch_size(error):
                raise
            logger.warning("Every epoch runs the whole model: %s: %s.", type(error).__name__, error)

    def _with_states(
        self, model: nn.Module, args: BreadthFirstConfig, accelerator: Accelerator, checks: ModelChecks
    ) -> ForwardPlan:
        assert self.plan is not None
        batches = self.micro_batches(self.own)
        batches += batches[:1] * missing_forwards(len(batches), accelerator)
        storage = StateStorage(
            args.activation_cache,
            args.output_dir,
            args.activation_cache_dir,
            shared=self.shared,
            progress=not args.disable_tqdm,
        )
        return cache_trunk(model, self.plan, batches, checks, storage)

    def _share_scored(self) -> float:
        scored = self.edits.lengths - (1 if self.objective == "full" else self.edits.target_starts)
        return float(scored.sum() / self.edits.lengths.sum())

    def halving(self, run: Callable[[], Result]) -> Result:
        """Call `run`; out of memory, call it again with micro-batches half as large, and keep that size."""

        def run_with(max_tokens: int) -> Result:
            self.max_tokens = max_tokens
            return run()

        smallest = int(self.edits.lengths.max())
        result, _ = run_halving(run_with, self.max_tokens, smallest=smallest, option="max_tokens_per_micro_batch")
        return result

    def micro_batches(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Split a batch into micro-batches."""
        if self.plan is not None and self.plan.layout == "single":
            return list(indices.split(1))
        rank = self.plan.tree.rank if self.plan is not None and self.plan.packed else None
        return micro_batches(indices, self.edits.lengths, self.max_tokens, rank)

    @contextmanager
    def micro_batch(self, indices: torch.Tensor) -> Iterator[MicroBatch]:
        """Set the model up for forward and backward on some rows, (B,), and yield what the forward takes."""
        batch = collate([self.edits[i] for i in indices.tolist()], pad_token_id=0)
        batch = {name: values.to(self.device) for name, values in batch.items()}
        labels = labels_for(self.objective, batch["input_ids"], batch["attention_mask"], batch["target_start"])
        scored = scored_positions(labels, self.objective)
        where = (scored.rows, scored.sources)
        if self.plan is None or (self.plan.layout == "single" and self.plan.states is None):
            # whole rows: of a model that may choose among later tokens, the last one counts, too
            inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
            inputs["use_cache"] = False
            ready: AbstractContextManager[None] = nullcontext()
        else:
            pack = self.plan.tree.pack(indices)
            where = self.plan.output_places(pack, *where)
            inputs, ready = self.plan.inputs(pack), self.plan.applied(pack, where[1])
        with ready, self._writing(indices, inputs["input_ids"].shape[1]):
            yield MicroBatch(indices, labels, scored, inputs, where)

    def _writing(self, indices: torch.Tensor, num_columns: int) -> AbstractContextManager[None]:
        """Let the writing tokens of some rows write into the deltas, as the forward lays them out."""
        writes = self.edits.writes
        if self._written_by is None or writes is None:
            return nullcontext()
        assert self.plan is not None
        if self.plan.packed:
            pack, marks = self.plan.tree.pack(indices), self.plan.tree.marks
            assert marks is not None
            return self._written_by(marks[pack.nodes].unsqueeze(0))
        begins = self.edits.offsets[indices].unsqueeze(1)
        columns = torch.arange(num_columns)
        places = (begins + columns).clamp_max(len(writes) - 1)
        return self._written_by(writes[places] & (columns < self.edits.lengths[indices].unsqueeze(1)))
