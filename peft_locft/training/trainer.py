"""The breadth-first trainer: epochs of shuffled mini-batches over all the edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters.saving import save_adapter
from ..data.edits import Edit, edits_sha256, read_edits
from ..data.encoding import EncodedEdits
from ..data.leaks import mark_trained
from ..engine.distributed import backward, check_not_sharded, end_step, missing_pieces
from ..engine.model_state import as_base, check_finite, check_vocabulary, configuration_unchanged, dropout_off
from ..engine.offload import trunk_offloaded
from .batches import EditBatches, LossRecord
from .callbacks import CURVES_KEY, EditProgress, FloorAndRecord
from .config import BreadthFirstConfig
from .preserver import PreservationCallback, Preserver, prepare_preserver
from .record import training_record
from .resting import RestingEdits
from .resume import check_same_edits, invalidate, whole_checkpoint
from .row_losses import BatchWeight, RowLosses
from .training_data import TrainingData, training_data


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
    train_dataset: EncodedEdits

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
        self.data = self._make_data(model, processing_class, args)
        encoded = self.data.encoded
        check_vocabulary(model, encoded.token_ids)
        mark_trained(model, self.data.record().trained_prompts)
        self.record = LossRecord()
        self.resting = RestingEdits(len(encoded), args.loss_floor, args.skip_learned_epochs)
        self.losses = RowLosses.of(encoded, self.data.rows, args)
        self.runner = self.losses.runner
        with configuration_unchanged(model):
            super().__init__(
                model=model, args=args, train_dataset=encoded, processing_class=processing_class, **kwargs
            )
        check_not_sharded(
            self.accelerator,
            activation_cache_dir=args.activation_cache_dir,
            trunk_residency=args.trunk_residency == "layerwise",
            preserve_energy_share=args.preserve_energy_share,
            preserve_soft_strength=args.preserve_soft_strength,
            retained_loss=args.has_retained and args.retained_loss == "kl",
        )
        self.add_callback(FloorAndRecord(self.record, self.resting, self.data.rows.num_new, args))
        self.preservation = PreservationCallback(Preserver([]))
        self.add_callback(self.preservation)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(EditProgress(self.record, self.data.rows.num_edits))

    @property
    def epoch_losses(self) -> list[float]:
        return self.record.epoch_losses

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, as `Trainer.train` does. `resume_from_checkpoint=True` takes the last checkpoint that is whole.

        Raises:
            ValueError: if there is no whole checkpoint to resume from, or the one named is not whole or of a run on
                other edits.
            RuntimeError: if the loss becomes NaN or infinite.
        """
        if resume_from_checkpoint:
            checkpoint = whole_checkpoint(self.args.output_dir, resume_from_checkpoint)
            check_same_edits(checkpoint, edits_sha256(self.edits))
            resume_from_checkpoint = str(checkpoint)
        self.runner.is_prepared = False  # the trunk may have changed since an earlier call
        layerwise = self.args.trunk_residency == "layerwise"
        off_device = trunk_offloaded(self.model, self.args.device) if layerwise else nullcontext()
        with configuration_unchanged(self.model), off_device:
            self.preservation.preserver = prepare_preserver(
                self.model, self.data.preserved, self.data.preserved_weights, self.args
            )
            self.add_callback(self.pop_callback(self.preservation))  # behind one that brings the best epoch back
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.args.trunk_residency == "full":
            super()._move_model_to_device(model, device)

    # ------------------------------------------------------------------ data

    def _make_data(self, model: Any, tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig) -> TrainingData:
        return training_data(self.edits, model, tokenizer, args)

    def get_train_dataloader(self) -> DataLoader[int]:
        """Return a loader of indices that gives every process every batch whole; `training_step` takes its share."""
        args = self.args
        depth_first = args.edit_order == "depth_first"
        batches = EditBatches(
            self.losses.rows.num_edits,
            batch_size=1 if depth_first else self._train_batch_size * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            steps_per_edit=args.steps_per_edit,
            rows=self.losses.rows,
        )
        return DataLoader(range(len(self.train_dataset)), batch_sampler=batches, collate_fn=list)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[int]], num_batches: int, device: torch.device
    ) -> tuple[list[list[int]], BatchWeight]:
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return batches, self.losses.weight(torch.tensor([index for batch in batches for index in batch]))

    # ------------------------------------------------------------------ one step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: torch.Tensor | Sequence[int],
        return_outputs: bool = False,
        num_items_in_batch: BatchWeight | None = None,
    ) -> Any:
        """Return the share of some rows in the loss of the batch that they are part of.

        Args:
            inputs: numbers of rows: edits, their variants, and what is kept.
            num_items_in_batch: the batch's weight; `None`: they are the batch.
        """
        indices = torch.as_tensor(inputs)
        losses, outputs = self.losses(model, indices, return_outputs)
        figures = self.losses.figures(losses, indices, num_items_in_batch or self.losses.weight(indices))
        self._last_losses, self._last_figures = losses.detach(), figures.detach()
        return (figures[:2].sum(), outputs) if return_outputs else figures[:2].sum()

    def training_step(
        self, model: nn.Module, inputs: list[int], num_items_in_batch: BatchWeight | None = None
    ) -> torch.Tensor:
        """Forward and backward, piece by piece; drop the gradient if the loss of the step's edits is below the floor.

        Returns the batch's share of the step's loss, what is kept included.
        """
        dropout_off(model)
        if self._edit_is_done():
            return torch.zeros((), device=self.args.device)
        if not self.runner.is_prepared:
            with self.compute_loss_context_manager():
                self.runner.prepare(model, self.args, self.accelerator)
                plain = self.accelerator.unwrap_model(model)
                self.losses.ask_base(plain, as_base(plain))
        weight = num_items_in_batch or self.losses.weight(torch.tensor(inputs))
        trained, resting = self.resting.split(inputs, int(self.state.epoch))
        figures = self._gradient(model, trained, weight)
        if resting:
            figures += self.losses.figures(self.resting.losses[resting], torch.tensor(resting), weight)
        share, retained_share, unlearned = figures.tolist()
        check_finite(share + retained_share, self.state.global_step, self.state.max_steps, self._get_learning_rate())
        num_edits = sum(index < self.losses.rows.num_edits for index in inputs)
        self.record.add_batch(share, num_edits, retained_share, int(unlearned))
        if self.accelerator.sync_gradients:
            end_step(model, self.accelerator, take_it=self.record.end_step() >= self.args.loss_floor)
        return figures[:2].sum()

    def _gradient(self, model: nn.Module, inputs: list[int], weight: BatchWeight) -> torch.Tensor:
        """Forward and backward; where memory runs out, again in smaller pieces."""
        # what earlier batches of the step have left
        before = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters() if p.requires_grad]
        while True:
            try:
                return self._forward_and_backward(model, inputs, weight)
            except RuntimeError as error:
                # the other processes wait for this one's gradient, and cannot be told to begin again
                if self.args.world_size > 1 or not self.runner.halve(error):
                    raise
            for parameter, gradient in before:
                parameter.grad = None if gradient is None else gradient.clone()

    def _forward_and_backward(self, model: nn.Module, inputs: list[int], weight: BatchWeight) -> torch.Tensor:
        """Return the figures of the batch, (3,), see `RowLosses`."""
        world_size, process_index = self.args.world_size, self.args.process_index
        mine = [index for index in inputs if index % world_size == process_index]
        # a process without edits in a batch still joins the others' gradient
        own = self.runner.pieces(torch.tensor(mine) if mine else self.runner.own[:1])
        idle = [(own[0][:1], False)] * missing_pieces(len(own), self.accelerator)
        pieces = idle + [(piece, bool(mine)) for piece in own]
        figures = torch.zeros(3, device=self.args.device)
        # a LocFT model's way to compose W + delta once a step; several processes wait for the delta's own backward
        is_alone = self.accelerator.distributed_type == DistributedType.NO
        with getattr(model, "composed_once", nullcontext)() if is_alone else nullcontext():
            for number, (piece, counts) in enumerate(pieces, start=1):
                is_last = number == len(pieces)
                # backward inside of it too: gradient checkpointing runs layers again there
                with self.runner.running(piece), nullcontext() if is_last else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        loss = self.compute_loss(model, piece, num_items_in_batch=weight)
                    if counts:
                        targets = piece < self.losses.rows.first_retained
                        self.resting.add(piece[targets], self._last_losses[targets], int(self.state.epoch))
                        figures += self._last_figures
                    # gradients are averaged over processes, and the loss is already a share of the whole
                    backward(loss * (world_size if counts else 0), self.accelerator, is_last)
        return self.accelerator.reduce(figures, reduction="sum")

    def _edit_is_done(self) -> bool:
        """Depth-first: begin every edit with a fresh optimizer, and leave it once it is below the floor."""
        if self.args.steps_per_edit is None:
            return False
        if self.state.global_step % self.args.steps_per_edit == 0:
            self.optimizer.state.clear()
        return self.record.step_loss < self.args.loss_floor

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer asks only after the first step of an epoch
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate counts every layer and parameter as trained, and none of that holds here

    # ------------------------------------------------------------------ saving

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:  # a LocFT adapter is written with one
        if not isinstance(self.model, PeftModel) or self.model.active_peft_config.peft_type != "LOCFT":
            super().create_model_card(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            # an older run may have left one of this name, which must not pass for whole while it is replaced
            invalidate(Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            evaluations = self.state.stateful_callbacks.get(CURVES_KEY)
            save_adapter(
                model,
                output_dir or self.args.output_dir,
                record=training_record(
                    self.edits, self.args, self.record, self.state.global_step, evaluations, self.data.record()
                ),
                state_dict=state_dict,
            )
