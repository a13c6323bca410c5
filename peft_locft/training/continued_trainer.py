"""Trains an adapter on: the edits that it keeps, the new ones, and the base's answers to the withdrawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..adapters.adapter_facts import training_record
from ..adapters.adapter_folder import save_adapter
from ..data.edit_lists import EditPlan
from ..data.generated_text import as_base
from ..data.kept_facts import flat
from ..data.training_data import TrainingData
from ..encoding import EncodedEdits, encode_prompts
from ..recipe import BreadthFirstConfig
from ..running.decoding import ask, check_fits
from ..running.distributed import SHARDED
from ..running.questions import UNTIL_EOS, Question
from ..trainer import BreadthFirstTrainer

ANSWER_TOKENS = 32  # of the base, as many as the published protocol looks at
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
        self.plan = plan
        self.ship_edits = ship_edits
        before = earlier.get("continued", {})
        self.continued = {"times": before.get("times", 0) + 1}
        self.continued |= {name: before.get(name, 0) + len(getattr(plan, name)) for name in COUNTED}
        super().__init__(model=model, args=args, train_dataset=plan.edits, processing_class=processing_class)

    def _make_data(self, model: Any, tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig) -> TrainingData:
        """Add the base's answers to withdrawn prompts, and repeat what is new as often as needed."""
        data = super()._make_data(model, tokenizer, args)
        prompts = encode_prompts(self.plan.restored_prompts, tokenizer, chat_template=args.chat_template)
        self.questions = [Question(tuple(ids), num_stops=UNTIL_EOS, max_new_tokens=ANSWER_TOKENS) for ids in prompts]
        check_fits(model, self.questions, tokenizer)
        with as_base(model):
            answers = ask(model, tokenizer, self.questions, whose="the base model", progress=not args.disable_tqdm)
        self.base_answers = [answer.token_ids for answer in answers]
        answered = [
            (list(question.prompt) + answer, len(question.prompt))
            for question, answer in zip(self.questions, self.base_answers, strict=True)
        ]
        num_new = len(self.plan.added) + len(self.plan.replaced)
        more = _repeated(data.encoded, len(self.edits), num_new, answered)
        return data.with_targets(more, num_known=len(self.edits) - num_new)

    def count_as_base(self) -> int | None:
        """Return how many withdrawn prompts are answered with the base's tokens; None where the model is sharded."""
        if self.accelerator.distributed_type in SHARDED:
            return None
        model = self.accelerator.unwrap_model(self.model)
        found = ask(model, self.processing_class, self.questions, progress=not self.args.disable_tqdm)
        return sum(mine.token_ids == base for mine, base in zip(found, self.base_answers, strict=True))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if output_dir not in (None, self.args.output_dir):
            super()._save(output_dir, state_dict)  # a checkpoint
        elif self.args.should_save:
            record = training_record(
                self.edits, self.args, self.record, self.state.global_step, augmentation=self.data.record()
            )
            save_adapter(
                self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
                self.args.output_dir,
                record=record | {"continued": self.continued},
                edits=self.edits if self.ship_edits else None,
                state_dict=state_dict,
            )


def _repeated(
    rows: EncodedEdits, num_edits: int, num_new: int, answered: Sequence[tuple[list[int], int]]
) -> EncodedEdits | None:
    """Return the rows to be added to edits, of which the last `num_new` are new: answered prompts, and repetitions.

    The new ones and the answered prompts are repeated until they are a tenth of all, or more. Rows that begin alike
    are computed once, so that this costs next to nothing.
    """
    num_kept = num_edits - num_new
    new = [(rows[n].input_ids.tolist(), rows[n].target_start) for n in range(num_kept, num_edits)]
    changed = [*new, *answered]
    if not changed:
        return None
    times = math.ceil(SHARE_CHANGED / (1 - SHARE_CHANGED) * num_kept / len(changed)) - 1
    added = [*answered, *(changed * times)]
    return flat([tokens for tokens, _ in added], [start for _, start in added]) if added else None
