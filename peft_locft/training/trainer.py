"""The breadth-first trainer: epochs of shuffled mini-batches over all the edits."""

from __future__ import annotations

import copy
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters.provenance import TrainingRun
from ..adapters.saving import save_adapter
from ..data.chat import in_forms, mark_form
from ..data.edits import EditSource, edits_sha256, read_edits
from ..data.encoding import EncodedEdits
from ..data.leaks import mark_trained
from ..engine.activation_storage import SharedActivations
from ..engine.distributed import SHARDED, backward, check_not_sharded, end_step, missing_forwards
from ..engine.model_state import (
    as_base,
    check_finite,
    check_gradient,
    check_model_and_tokenizer,
    check_trainable,
    check_vocabulary,
    configuration_unchanged,
    dropout_off,
    evaluating,
)
from ..engine.offload import trunk_offloaded
from ..io.disk_space import explained_disk_full
from ..tuner.model import locft_layers
from .batches import EditBatches
from .callbacks import (
    CURVES_KEY,
    EditProgressBar,
    EpochLines,
    LossFloorCallback,
    logged_without,
    logging_beside_bars,
)
from .config import AUTO, BreadthFirstConfig, batch_size_for
from .edit_runner import MicroBatch
from .learned import LearnedEdits
from .loss_history import LossHistory
from .preserver import PreservationCallback, prepare_preserver
from .rate_control import RateControl
from .rates import fitting_rates, set_rates
from .record import training_record
from .resume import check_same_edits, invalidate, is_whole, whole_checkpoint
from .row_losses import BatchWeight, RowLosses
from .training_data import TrainingData, training_data, with_chat_template

NUM_FIRST_LOSSES = 100  # edits whose loss is measured before training


class BreadthFirstTrainer(Trainer):
    """A `transformers.Trainer` that writes edits into a model.

    It trains all trainable parameters of the model: a LocFT delta, another PEFT adapter, or unfrozen weights of a
    plain model. Dropout is off. The tokenizer, the edits and the model's configuration are not changed.

    Args:
        model (`PeftModel` or `PreTrainedModel`): a decoder-only language model with trainable parameters.
        args (`BreadthFirstConfig`, *optional*): the recipe; default: the published one.
        train_dataset (`list[Edit]` or `datasets.Dataset`): the edits; a dataset needs columns that `read_edits` knows.
        processing_class (`PreTrainedTokenizerBase`): the model's fast tokenizer.
        shared_activations (`SharedActivations`, *optional*): where the states that leave the frozen layers are shared
            with other trainings on the same base, such as the trials of a location search.
        **kwargs: other arguments of `transformers.Trainer`, such as callbacks and optimizers.

    Attributes:
        epoch_losses (`list[float]`): one per epoch: the mean loss of its batches, weighted by their size and taken
            before their step; batches below the loss floor count. With `edit_order="depth_first"`, one per edit: the
            loss of its last step.
        learned (`LearnedEdits`, *optional*): after training, which edits the model learned; `None` before it, where
            weights are sharded, and with `objective="prompt_last"`, which does not score answers.

    Raises:
        ValueError: if nothing in the model is trainable, or everything in a model without an adapter; if edits or
            tokenizer are missing, or an edit cannot be encoded for this model.

    Example:
        >>> args = BreadthFirstConfig(output_dir="out")
        >>> trainer = BreadthFirstTrainer(model=peft_model, args=args, train_dataset=edits, processing_class=tokenizer)
        >>> trainer.train()
        >>> trainer.save_model()
    """

    args: BreadthFirstConfig
    train_dataset: EncodedEdits

    as_reference: Any = staticmethod(as_base)  # how retained prompts are answered

    def __init__(
        self,
        model: nn.Module,
        args: BreadthFirstConfig | None = None,
        train_dataset: EditSource | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        shared_activations: SharedActivations | None = None,
        **kwargs: Any,
    ) -> None:
        args = BreadthFirstConfig() if args is None else args
        if train_dataset is None or processing_class is None:
            raise ValueError(
                "BreadthFirstTrainer: train_dataset (the edits) or processing_class (the tokenizer) is missing. Pass "
                "both."
            )
        _check(model, args, processing_class)
        self.edits = read_edits(train_dataset)
        args = with_chat_template(args, self.edits, processing_class)
        mark_form(model, args)
        self.rates = fitting_rates(model, args) if args.learning_rate == AUTO else {}
        args = _fitting(args, len(self.edits), self.rates)
        self.data = self._make_data(model, processing_class, args)
        encoded = self.data.encoded
        check_vocabulary(model, encoded.token_ids)
        mark_trained(model, self.data.augmentation().trained_prompts)
        self.loss_history = LossHistory()
        self.learned: LearnedEdits | None = None
        self.losses = RowLosses.of(encoded, self.data.rows, args, shared_activations)
        self.runner = self.losses.runner
        with configuration_unchanged(model), _some_folder(args):
            super().__init__(
                model=model, args=args, train_dataset=encoded, processing_class=processing_class, **kwargs
            )
        check_not_sharded(
            self.accelerator,
            activation_cache_dir=args.activation_cache_dir,
            offload_trunk=args.offload_trunk,
            preserve_energy_share=args.preserve_energy_share,
            preserve_soft_strength=args.preserve_soft_strength,
            retained_loss=args.has_retained and args.retained_loss == "kl",
        )
        self.rate_control: RateControl | None = None
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        history, rows = self.loss_history, self.data.rows
        # an update counts its new edits only
        measure = self.measure_learned if rows.num_new == rows.num_edits else None
        self.add_callback(LossFloorCallback(history, rows.num_new, self.args, measure))
        is_sharded = self.accelerator.distributed_type in SHARDED
        if self.rates and self.args.edit_order == "breadth_first" and not is_sharded:
            self.rate_control = RateControl(history, self.args.relative_learning_rate or 0.0)
            self.add_callback(self.rate_control)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(EditProgressBar(history, rows.num_edits))
        if self.pop_callback(PrinterCallback) is not None:
            self.add_callback(EpochLines(history, rows.num_new))

    @property
    def epoch_losses(self) -> list[float]:
        return self.loss_history.epoch_losses

    @property
    def relative_rate(self) -> float | None:
        """The learning rate relative to the trained weights, as corrected so far; `None` if it was given."""
        if not self.rates:
            return None
        factor = 1.0 if self.rate_control is None else self.rate_control.state.factor
        return (self.args.relative_learning_rate or 0.0) * factor

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, as `Trainer.train` does. `resume_from_checkpoint=True` takes the last complete checkpoint.

        Raises:
            ValueError: if there is no complete checkpoint, or the named one is incomplete or of a run on other edits.
            RuntimeError: if the loss becomes NaN or infinite.
        """
        if resume_from_checkpoint:
            checkpoint = whole_checkpoint(self.args.output_dir or "", resume_from_checkpoint)
            check_same_edits(checkpoint, edits_sha256(self.edits))
            resume_from_checkpoint = str(checkpoint)
        if self.rate_control is not None:
            self.rate_control.remember(self.model)
        self.runner.is_prepared = False  # the trunk may have changed since the last call
        offloaded = trunk_offloaded(self.model, self.args.device) if self.args.offload_trunk else nullcontext()
        bars = logging_beside_bars(not self.args.disable_tqdm)
        with configuration_unchanged(self.model), offloaded, bars:
            preservation = PreservationCallback(prepare_preserver(self.model, self.data.preserved, self.args))
            self.add_callback(preservation)  # the last one: its end comes after the best epoch was restored
            try:
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            finally:
                self.remove_callback(preservation)
            self.learned = self.measure_learned()
            return result

    def measure_learned(self) -> LearnedEdits | None:
        """Return which edits the model answers with their targets; see the attribute `learned`."""
        if self.args.objective == "prompt_last" or self.accelerator.distributed_type in SHARDED:
            return None
        model = self.accelerator.unwrap_model(self.model)
        if not self.runner.is_prepared:  # a run that was resumed after its end
            with self.compute_loss_context_manager():
                self.runner.prepare(self.model, self.args, self.accelerator)
        num_forms = [len(in_forms([edit], self.args.chat_template)) for edit in self.edits]
        own = self.runner.own[self.runner.own < sum(num_forms)]
        found = torch.zeros(sum(num_forms), 2, device=self.args.device)
        with evaluating(model), self.compute_loss_context_manager():
            for indices in self.runner.micro_batches(own) if len(own) else ():
                with self.runner.micro_batch(indices) as batch:
                    found[indices.to(found.device)] = self.losses.answers(model, batch).to(found.device)
        # an edit that is trained as text and in chat is learned if it is learned in both
        forms = self.accelerator.reduce(found, reduction="sum").split(num_forms)
        is_learned, log_probabilities = torch.stack([own.amin(dim=0) for own in forms]).T.tolist()
        return LearnedEdits.of(self.edits, [bool(each) for each in is_learned], log_probabilities)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; with `learning_rate="auto"`, each trained tensor has its own rate."""
        is_ours = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_ours and len(set(self.rates.values())) > 1:
            set_rates(optimizer, self.model if model is None else model, self.rates)
        return optimizer

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.args.offload_trunk:
            super()._move_model_to_device(model, device)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) or ""  # without a folder there are no checkpoints to look for

    # ------------------------------------------------------------------ data

    def _make_data(self, model: Any, tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig) -> TrainingData:
        return training_data(self.edits, model, tokenizer, args)

    def get_train_dataloader(self) -> DataLoader[int]:
        """Return a loader that gives the indices of every whole batch to every process."""
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
        inputs: MicroBatch | torch.Tensor | Sequence[int],
        return_outputs: bool = False,
        num_items_in_batch: BatchWeight | None = None,
    ) -> Any:
        """Return the share of some rows in the loss of their batch, and the model's outputs if asked for.

        The outputs have the entry `batch_shares`, (3,), see `RowLosses.batch_shares`.

        Args:
            inputs: (B,) indices of rows: edits, their variants, and retained rows; or a micro-batch of them, which is
                what `training_step` passes, and whose logits are overwritten.
            num_items_in_batch: the weight of the batch; `None`: the rows are the whole batch.
        """
        if not isinstance(inputs, MicroBatch):
            with self.runner.micro_batch(torch.as_tensor(inputs)) as batch:
                losses, outputs = self.losses(model, batch, keep_logits=return_outputs)
        else:
            batch = inputs
            losses, outputs = self.losses(model, batch)
        weight = num_items_in_batch or self.losses.weight(batch.indices)
        shares = self.losses.batch_shares(losses, batch.indices, weight)
        outputs["batch_shares"] = shares.detach()
        return (shares[:2].sum(), outputs) if return_outputs else shares[:2].sum()

    def training_step(
        self, model: nn.Module, inputs: list[int], num_items_in_batch: BatchWeight | None = None
    ) -> torch.Tensor:
        """Run forward and backward in micro-batches; drop the gradient if the loss of the edits is below the floor.

        Returns:
            The share of the batch in the loss of the step, retained rows included.
        """
        dropout_off(model)
        if self._edit_is_done():
            return torch.zeros((), device=self.args.device)
        if not self.runner.is_prepared:
            with self.compute_loss_context_manager():
                self.runner.prepare(model, self.args, self.accelerator)
                plain = self.accelerator.unwrap_model(model)
                self.losses.store_base(plain, self.as_reference(plain))
                if self.rate_control is not None and self.rate_control.needs_first_loss:
                    self.rate_control.state.first_loss = self._mean_loss(plain)
        weight = num_items_in_batch or self.losses.weight(torch.tensor(inputs))
        shares = self._gradient(model, inputs, weight)
        share, retained_share, unlearned = shares.tolist()
        num_edits = sum(index < self.losses.rows.num_edits for index in inputs)
        if self.rate_control is not None and self.rate_control.takes_over(share + retained_share):
            # training starts again behind this step, from where it began
            share, retained_share, unlearned = self.rate_control.state.first_loss or 0.0, 0.0, num_edits
            shares = torch.zeros_like(shares)
            model.zero_grad()
        check_finite(share + retained_share, self.state.global_step, self.state.max_steps, self._get_learning_rate())
        self.loss_history.add_batch(share, num_edits, retained_share, int(unlearned))
        if self.accelerator.sync_gradients:
            end_step(model, self.accelerator, take_it=self.loss_history.end_step() >= self.args.loss_floor)
        return shares[:2].sum()

    @torch.no_grad()
    def _mean_loss(self, model: nn.Module) -> float:
        """Return the mean loss of up to 100 edits, of all processes."""
        num_edits = self.losses.rows.num_edits
        sample = torch.arange(0, num_edits, math.ceil(num_edits / NUM_FIRST_LOSSES))
        own = self.runner.own[torch.isin(self.runner.own, sample)]
        sums = torch.zeros(2, device=self.args.device)
        for indices in self.runner.micro_batches(own) if len(own) else ():
            with self.runner.micro_batch(indices) as batch:
                losses, _ = self.losses(model, batch)
            sums += torch.stack([losses.sum().to(sums.device), sums.new_tensor(len(indices))])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total / count

    def _gradient(self, model: nn.Module, inputs: list[int], weight: BatchWeight) -> torch.Tensor:
        """Add the gradient of the batch; out of memory, start again with smaller micro-batches."""
        if self.args.world_size > 1:
            # the other processes wait for this gradient, and cannot be told to start again
            return self._forward_and_backward(model, inputs, weight)
        # of earlier batches of this step
        before = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters() if p.requires_grad]

        def run() -> torch.Tensor:
            try:
                return self._forward_and_backward(model, inputs, weight)
            except RuntimeError:
                for parameter, gradient in before:
                    parameter.grad = None if gradient is None else gradient.clone()
                raise

        return self.runner.halving(run)

    def _forward_and_backward(self, model: nn.Module, inputs: list[int], weight: BatchWeight) -> torch.Tensor:
        """Add the gradient of the batch; return its shares, (3,), see `RowLosses.batch_shares`."""
        world_size, process_index = self.args.world_size, self.args.process_index
        mine = [index for index in inputs if index % world_size == process_index]
        # a process without edits in a batch still joins the others' gradient
        own = self.runner.micro_batches(torch.tensor(mine) if mine else self.runner.own[:1])
        idle = [(own[0][:1], False)] * missing_forwards(len(own), self.accelerator)
        micro_batches = idle + [(indices, bool(mine)) for indices in own]
        sums = torch.zeros(3, device=self.args.device)
        # a LocFT model composes W + delta once a step; several processes wait for the delta's own backward
        is_alone = self.accelerator.distributed_type == DistributedType.NO
        with getattr(model, "composed_once", nullcontext)() if is_alone else nullcontext():
            for number, (indices, counts) in enumerate(micro_batches, start=1):
                is_last = number == len(micro_batches)
                # gradients are averaged over processes, and the loss is already a share of the whole
                factor = world_size if counts else 0
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    shares = self._micro_step(model, indices, weight, factor, is_last)
                if counts:
                    sums += shares
        return self.accelerator.reduce(sums, reduction="sum")

    def _micro_step(
        self, model: nn.Module, indices: torch.Tensor, weight: BatchWeight, factor: int, is_last: bool
    ) -> torch.Tensor:
        """Run forward and backward on some rows; return their shares, (3,)."""
        # backward inside of the micro-batch, too: gradient checkpointing runs layers again there
        with self.runner.micro_batch(indices) as batch:
            with self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(model, batch, return_outputs=True, num_items_in_batch=weight)
            check_gradient(loss, model)
            backward(loss * factor, self.accelerator, is_last)
        return outputs["batch_shares"]

    def _edit_is_done(self) -> bool:
        """Return whether depth-first has learned the current edit; reset the optimizer before each edit."""
        if self.args.steps_per_edit is None:
            return False
        if self.state.global_step % self.args.steps_per_edit == 0:
            self.optimizer.state.clear()
        return self.loss_history.step_loss < self.args.loss_floor

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer checks this only after the first step of an epoch
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate assumes that every layer runs and every parameter is trained

    # ------------------------------------------------------------------ saving

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:  # save_adapter writes one for LocFT
        if not isinstance(self.model, PeftModel) or self.model.active_peft_config.peft_type != "LOCFT":
            super().create_model_card(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter to a folder, as `Trainer.save_model` does; `None`: to `args.output_dir`.

        Raises:
            ValueError: if neither is given.
            DiskFullError: if the disk has no room.
        """
        folder = output_dir or self.args.output_dir
        if folder is None:
            raise ValueError(
                "BreadthFirstTrainer.save_model: found no folder. Pass one, save_model('out'), or set "
                "BreadthFirstConfig.output_dir."
            )
        with explained_disk_full(folder):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            # an earlier run may have left a checkpoint of this name, which must not pass for complete meanwhile
            invalidate(checkpoint)
        with explained_disk_full(checkpoint.parent):
            try:
                # checkpoints of a quick run are written within a second, and sorted by their numbers
                with logged_without("transformers.trainer_utils", "mtime may not be reliable"):
                    super()._save_checkpoint(model, trial)
            except BaseException:
                if self.args.should_save and not is_whole(checkpoint):
                    shutil.rmtree(checkpoint, ignore_errors=True)
                raise

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_adapter(
                model, output_dir or self.args.output_dir or "", record=self.training_run(), state_dict=state_dict
            )

    def training_run(self) -> TrainingRun:
        """Return what `save_adapter` records of this run: the edits, the recipe and the losses."""
        evaluations = self.state.stateful_callbacks.get(CURVES_KEY)
        augmentation = self.data.augmentation()
        return training_record(
            self.edits,
            self.args,
            self.loss_history,
            self.state.global_step,
            evaluations,
            augmentation,
            self.learned,
            relative_rate=self.relative_rate,
        )


def _check(model: nn.Module, args: object, tokenizer: PreTrainedTokenizerBase) -> None:
    if not isinstance(args, BreadthFirstConfig):
        found = f"found a {type(args).__name__} as args"
        raise ValueError(f"BreadthFirstTrainer: {found}; expected a BreadthFirstConfig with the same fields.")
    check_model_and_tokenizer(model, tokenizer, "BreadthFirstTrainer")
    check_trainable(model)
    if args.gradient_tokens not in ("all", "auto") and not any(locft_layers(model)):
        raise ValueError(
            f"BreadthFirstConfig.gradient_tokens={args.gradient_tokens!r} chooses what writes into a LocFT delta, and "
            "the model has none. Use LocFTConfig, or gradient_tokens='all'."
        )


def _fitting(args: BreadthFirstConfig, num_edits: int, rates: Mapping[str, float]) -> BreadthFirstConfig:
    """Return a copy of a recipe with the batch size and the learning rate that were left open."""
    args = copy.copy(args)
    args.per_device_train_batch_size = batch_size_for(num_edits, args)
    if rates:
        args.learning_rate = statistics.median(rates.values())
    return args


@contextmanager
def _some_folder(args: BreadthFirstConfig) -> Iterator[None]:
    """Name a folder that exists if a configuration names none: `Trainer` creates its folder at once."""
    given = args.output_dir
    args.output_dir = os.curdir if given is None else given
    try:
        yield
    finally:
        args.output_dir = given
