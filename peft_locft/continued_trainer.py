"""Trains an adapter on: the edits that it keeps, the new ones, and the base's answers to the withdrawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from .adapter_facts import training_record
from .adapter_folder import save_adapter
from .decoding import ask, check_fits
from .distributed import SHARDED
from .edit_lists import EditPlan
from .edit_runner import EditRunner
from .encoding import EncodedEdits, encode_prompts
from .questions import Question
from .recipe import BreadthFirstConfig
from .trainer import BreadthFirstTrainer

ANSWER_TOKENS = 32  # of the base, as many as the published protocol looks at
NO_STOP = 1_000_000  # so many there are in no answer: it goes on to EOS, or as far as anybody looks
SHARE_CHANGED = 0.1  # of the rows of an epoch, at least
COUNTED = ("added", "replaced", "withdrawn")


class ContinuedTrainer(BreadthFirstTrainer):
    """A `BreadthFirstTrainer` of an adapter that was trained before.

    Args:
        model: with the adapter, trainable and active.
        args: the recipe.
        plan: what becomes of the adapter's edits.
        processing_class: the model's fast tokenizer.
        earlier: the content of the adapter's `locft_provenance.json`.
        ship_edits: whether what is saved has the edits in it.
    """

    def __init__(
        self,
        model: PeftModel,
        args: BreadthFirstConfig,
        plan: EditPlan,
        processing_class: PreTrainedTokenizerBase,
        *,
        earlier: Mapping[str, Any],
        ship_edits: bool,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=plan.edits, processing_class=processing_class)
        self.ship_edits = ship_edits
        before = earlier.get("continued", {})
        self.continued = {"times": before.get("times", 0) + 1}
        self.continued |= {name: before.get(name, 0) + len(getattr(plan, name)) for name in COUNTED}
        prompts = encode_prompts(plan.restored_prompts, processing_class, chat_template=args.chat_template)
        self.questions = [Question(tuple(ids), num_stops=NO_STOP, max_new_tokens=ANSWER_TOKENS) for ids in prompts]
        self.base_answers = self._ask_base(model)
        self._train_on(
            _with_answers(self.train_dataset, self.questions, self.base_answers, len(plan.added) + len(plan.replaced))
        )

    def _ask_base(self, model: PeftModel) -> list[list[int]]:
        check_fits(model, self.questions, self.processing_class)
        with model.disable_adapter():
            return self._ask(model, "the base model")

    def _ask(self, model: Any, whose: str) -> list[list[int]]:
        progress = not self.args.disable_tqdm
        answers = ask(model, self.processing_class, self.questions, whose=whose, progress=progress)
        return [answer.token_ids for answer in answers]

    def count_as_base(self) -> int | None:
        """Return how many withdrawn prompts are answered with the base's tokens; None where the model is sharded."""
        if self.accelerator.distributed_type in SHARDED:
            return None
        found = self._ask(self.accelerator.unwrap_model(self.model), "the edited model")
        return sum(mine == base for mine, base in zip(found, self.base_answers, strict=True))

    def _train_on(self, rows: EncodedEdits) -> None:
        """Take other rows than those of the edits alone."""
        args = self.args
        self.train_dataset = rows
        own = torch.arange(min(args.process_index, len(rows) - 1), len(rows), args.world_size)
        self.runner = EditRunner(rows, own, args.objective, args.max_tokens_per_micro_batch, args.device)
        self.resting.num_scored = rows.lengths - (1 if args.objective == "full" else rows.target_starts)
        self.resting.losses = torch.zeros(len(rows))
        self.resting.back_in = torch.zeros(len(rows), dtype=torch.int64)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if output_dir not in (None, self.args.output_dir):
            super()._save(output_dir, state_dict)  # a checkpoint
        elif self.args.should_save:
            record = training_record(self.edits, self.args, self.record, self.state.global_step)
            save_adapter(
                self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
                self.args.output_dir,
                record=record | {"continued": self.continued},
                edits=self.edits if self.ship_edits else None,
                state_dict=state_dict,
            )


def _with_answers(
    edits: EncodedEdits, questions: Sequence[Question], answers: Sequence[Sequence[int]], num_new: int
) -> EncodedEdits:
    """Return the rows that are trained: edits, of which the last `num_new` are new, and questions with their answers.

    The new ones and the answers are repeated until they are a tenth of all, or more. Rows that begin alike are
    computed once, so that this costs next to nothing.
    """
    rows = [(edits.token_ids[begin:end], start) for begin, end, start in _bounds(edits)]
    for question, answer in zip(questions, answers, strict=True):
        tokens = torch.tensor([*question.prompt, *answer], dtype=edits.token_ids.dtype)
        rows.append((tokens, len(question.prompt)))
    num_kept = len(edits) - num_new
    changed = rows[num_kept:]
    if changed:
        rows += changed * (math.ceil(SHARE_CHANGED / (1 - SHARE_CHANGED) * num_kept / len(changed)) - 1)
    lengths = torch.tensor([0, *(len(tokens) for tokens, _ in rows)])
    return EncodedEdits(
        torch.cat([tokens for tokens, _ in rows]), lengths.cumsum(0), torch.tensor([start for _, start in rows])
    )


def _bounds(edits: EncodedEdits) -> list[tuple[int, int, int]]:
    offsets = edits.offsets.tolist()
    return list(zip(offsets[:-1], offsets[1:], edits.target_starts.tolist(), strict=True))
