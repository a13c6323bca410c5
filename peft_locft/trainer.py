"""The breadth-first trainer: epochs of shuffled mini-batches over all the edits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback

from .adapter_folder import save_adapter
from .batches import EditBatches, LossRecord
from .card import training_record
from .edits import Edit, read_edits
from .encoding import EncodedEdit, collate, encode_edits
from .objectives import labels_for, loss_weight, sum_losses, token_losses
from .recipe import BreadthFirstConfig
from .training_callbacks import EditProgress, FloorAndRecord


class BreadthFirstTrainer(Trainer):
    """A `transformers.Trainer` that writes edits into a model.

    It trains whatever parameters of the model are trainable: a LocFT delta, any other PEFT adapter, or some unfrozen
    weights of a plain model. Dropout is off. The tokenizer, the edits and the model's configuration stay as they are.

    Args:
        model (`PeftModel` or `PreTrainedModel`): a decoder-only language model with trainable parameters.
        args (`BreadthFirstConfig`, *optional*): the recipe.
        train_dataset (`list[Edit]` or `datasets.Dataset`): the edits; a dataset has columns that `read_edits` knows.
        processing_class (`PreTrainedTokenizerBase`): the model's fast tokenizer.
        **kwargs: callbacks, optimizers and whatever else `transformers.Trainer` takes.

    Attributes:
        epoch_losses (`list[float]`): one an epoch: the mean over its batches, weighted by their size, of each batch's
            loss before its own step, batches below the loss floor included. With `edit_order="depth_first"`, one an
            edit: the loss at which it was left.

    Raises:
        ValueError: if nothing in the model is trainable, if edits or tokenizer are missing, or if an edit cannot be
            encoded for this model.

    Example:
        >>> args = BreadthFirstConfig(output_dir="out")
        >>> trainer = BreadthFirstTrainer(model=peft_model, args=args, train_dataset=edits, processing_class=tokenizer)
        >>> trainer.train()
        >>> trainer.save_model()
    """

    args: BreadthFirstConfig

    def __init__(
        self,
        model: nn.Module,
        args: BreadthFirstConfig | None = None,
        train_dataset: Sequence[Edit] | datasets.Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        args = BreadthFirstConfig() if args is None else args
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "No parameter of the model is trainable. Add an adapter, as in get_peft_model(model, LocFTConfig()); "
                "load a saved one with is_trainable=True; or unfreeze the weights to edit."
            )
        if train_dataset is None or processing_class is None:
            raise ValueError(
                "BreadthFirstTrainer needs train_dataset, the edits, and processing_class, the tokenizer."
            )
        self.edits = read_edits(train_dataset)
        encoded = encode_edits(
            self.edits,
            processing_class,
            append_eos=args.append_eos,
            chat_template=args.chat_template,
            max_length=_max_length(model),
        )
        _check_vocabulary(model, encoded.token_ids)
        self.record = LossRecord()
        self._step_loss, self._step_edits = 0.0, 0
        with _configuration_unchanged(model):
            super().__init__(
                model=model, args=args, train_dataset=encoded, processing_class=processing_class, **kwargs
            )
        self.add_callback(FloorAndRecord(self.record, args))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(EditProgress(self.record))

    @property
    def epoch_losses(self) -> list[float]:
        return self.record.epoch_losses

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, as `Trainer.train` does. `resume_from_checkpoint=True` takes the last checkpoint that is whole.

        Raises:
            ValueError: if there is no whole checkpoint to resume from.
            RuntimeError: if the loss becomes NaN or infinite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(_last_whole_checkpoint(Path(self.args.output_dir)))
        if not resume_from_checkpoint:
            self.record.restore(LossRecord().state())
        with _configuration_unchanged(self.model):
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self) -> DataLoader[EncodedEdit]:
        """Return a loader that gives every process every batch whole; `training_step` takes this process' share."""
        args = self.args
        depth_first = args.edit_order == "depth_first"
        batches = EditBatches(
            len(self.train_dataset),
            batch_size=1 if depth_first else self._train_batch_size * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            steps_per_edit=args.steps_per_edit,
        )
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=list)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[EncodedEdit]], num_batches: int, device: torch.device
    ) -> tuple[list[list[EncodedEdit]], int]:
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return batches, self._weight([edit for batch in batches for edit in batch])

    def _weight(self, edits: Sequence[EncodedEdit]) -> int:
        starts = [1 if self.args.objective == "full" else edit.target_start for edit in edits]
        num_scored = [len(edit.input_ids) - start for edit, start in zip(edits, starts, strict=True)]
        return loss_weight(num_scored, self.args.loss_averaging)

    # ------------------------------------------------------------------ one step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Sequence[EncodedEdit],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """Return the summed loss of some edits over `num_items_in_batch`, the weight of the batch they are part of."""
        batch = self._prepare_inputs(collate(inputs, pad_token_id=0))
        labels = labels_for(self.args.objective, batch["input_ids"], batch["attention_mask"], batch["target_start"])
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        losses = token_losses(outputs.logits, labels, self.args.objective)
        loss = sum_losses(losses, labels, self.args.loss_averaging) / (num_items_in_batch or self._weight(inputs))
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: list[EncodedEdit], num_items_in_batch: int | None = None
    ) -> torch.Tensor:
        """Forward and, unless the step's loss is below the floor, backward; return this batch's share of that loss."""
        _dropout_off(model)
        if self._edit_is_done():
            return torch.zeros((), device=self.args.device)
        with self.compute_loss_context_manager():
            mine = inputs[self.args.process_index :: self.args.world_size]
            # a process without edits in a short last batch still joins the others' gradient
            loss = self.compute_loss(model, mine or inputs[:1], num_items_in_batch=num_items_in_batch)
            loss = loss if mine else loss * 0
        share = self.accelerator.reduce(loss.detach().clone(), reduction="sum")
        self._check_finite(share)
        self._step_loss += share.item()
        self._step_edits += len(inputs)
        if self.accelerator.sync_gradients and self._end_step() < self.args.loss_floor:
            # drops what earlier batches of this step left, where gradients accumulate; Adam stands still without any
            model.zero_grad()
        else:
            # gradients are averaged over processes, and the loss is already a share of the whole
            self.accelerator.backward(loss * self.args.world_size)
        return share

    def _edit_is_done(self) -> bool:
        """Depth-first: begin every edit with a fresh optimizer, and leave it once it is below the floor."""
        if self.args.steps_per_edit is None:
            return False
        if self.state.global_step % self.args.steps_per_edit == 0:
            self.optimizer.state.clear()
        return self.record.step_loss < self.args.loss_floor

    def _end_step(self) -> float:
        self.record.add_step(self._step_loss, self._step_edits)
        self._step_loss, self._step_edits = 0.0, 0
        return self.record.step_loss

    def _check_finite(self, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1} of {self.state.max_steps}: the "
                f"learning rate, {self._get_learning_rate():g}, is too high for this model and location. Train again "
                "with a lower one."
            )

    def floating_point_ops(self, inputs: Any) -> int:
        # the estimate of transformers counts every layer and every parameter as trained, and none of that holds here
        return 0

    # ------------------------------------------------------------------ saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_adapter(
                model,
                output_dir or self.args.output_dir,
                record=training_record(self.edits, self.args, self.record, self.state.global_step),
                state_dict=state_dict,
            )


def _last_whole_checkpoint(output_dir: Path) -> Path:
    """Return the newest checkpoint whose last file was written: a kill while saving leaves one without it."""
    for checkpoint in sorted(output_dir.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return checkpoint
    raise ValueError(
        f"{output_dir} holds no whole checkpoint to resume from. Train without resume_from_checkpoint, with "
        "save_strategy='epoch' if it should be possible to resume."
    )


def _dropout_off(model: nn.Module) -> None:
    """Put the model into evaluation mode, and leave gradient checkpointing on where it was asked for."""
    model.eval()
    for module in model.modules():
        # checkpointing happens in training mode alone; the layer's children, and their dropout, stay in evaluation
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


@contextmanager
def _configuration_unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what `Trainer` does to the model's configuration: `use_cache`, and the tokenizer's special tokens."""
    configurations = [getattr(model, name, None) for name in ("config", "generation_config")]
    before = [(vars(config), dict(vars(config))) for config in configurations if config is not None]
    try:
        yield
    finally:
        for attributes, kept in before:
            attributes.clear()
            attributes.update(kept)


def _max_length(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "max_position_embeddings", None)


def _check_vocabulary(model: Any, input_ids: torch.Tensor) -> None:
    vocabulary_size = model.get_input_embeddings().weight.shape[0]
    largest = int(input_ids.max())
    if largest >= vocabulary_size:
        raise ValueError(
            f"The tokenizer gives token id {largest}, but the model's embedding has {vocabulary_size} rows: they do "
            "not belong together. Load both from the same place."
        )
