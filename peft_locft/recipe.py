"""The arguments of the breadth-first trainer, with the published recipe as defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from transformers import TrainingArguments

from .objectives import LossAveraging, Objective
from .training.preservation_arguments import PreservationArguments

EditOrder = Literal["breadth_first", "depth_first"]
CachePlace = Literal["auto", "memory", "disk", "off"]
TrunkResidency = Literal["full", "layerwise"]
CHOICES = (
    ("objective", Objective),
    ("loss_averaging", LossAveraging),
    ("edit_order", EditOrder),
    ("activation_cache", CachePlace),
    ("trunk_residency", TrunkResidency),
)


@dataclass
class BreadthFirstConfig(PreservationArguments, TrainingArguments):
    """Arguments of [`BreadthFirstTrainer`]: all of `transformers.TrainingArguments`, with the published recipe.

    The defaults are those of Yang et al., "Fine-tuning Done Right in Model Editing" (arXiv 2509.22072v4): batches of
    100, at most 25 epochs, Adam at a constant rate of 5e-4, no weight decay, no clipping. Small models want a larger
    rate: 5e-3 suits one of 135M parameters.

    Args:
        learning_rate (`float`, *optional*): Adam's. `None`: 5e-4, or as the recipe says.
        num_train_epochs (`float`, *optional*): passes over all the edits, at most. `None`: 25, or as the recipe says.
        lr_scheduler_type (`str`, *optional*): `None`: `"constant"`, or as the recipe says.
        adam_epsilon (`float`, *optional*): `None`: 1e-8, or as the recipe says.
        objective (`str`, defaults to `"target_new"`):
            What is scored: `"target_new"`, the target given the prompt; `"prompt_last"`, every target token by the
            last prompt token's logits (FT-L); `"full"`, prompt and target.
        loss_averaging (`str`, *optional*):
            `"edit"`: every edit counts the same in a batch; `"token"`: every scored token does, so that an edit of a
            long target is learned as soon as others. `None`: `"edit"`, or as the recipe says.
        edit_order (`str`, defaults to `"breadth_first"`):
            `"depth_first"` trains one edit after the other, each for at most `num_train_epochs` steps or down to the
            loss floor, with a fresh optimizer: the field's older habit, here for comparison.
        append_eos (`bool`, defaults to `True`):
            End every target with the tokenizer's EOS token, so that the model learns to stop.
        chat_template (`bool`, defaults to `False`):
            Render prompt and target with the tokenizer's chat template.
        loss_floor (`float`, defaults to `1e-2`):
            A batch whose loss is below it takes no step; training stops after an epoch whose mean loss is below it.
        stop_at_learned (`float`, *optional*):
            Training stops after an epoch in which so large a share of the edits was learned: their targets, whole,
            were more probable than all else together. 0: it does not. `None`: 0, or as the recipe says.
        skip_learned_epochs (`int`, defaults to 0):
            An edit whose loss was below the floor sits out so many epochs, with the loss that it had, before it is
            looked at again. Faster; the published recipe leaves none out. For one process, breadth-first.
        activation_cache (`str`, defaults to `"auto"`):
            The layers before the first trained one are run once, and the states that leave them kept: in `"memory"`,
            on `"disk"` (a memory-mapped scratch file in `output_dir`), or not at all (`"off"`: every step runs the
            whole model on padded edits). `"auto"` is memory where they take less than half of what is free, else disk;
            where keeping them would be wrong it does without, and says why.
        activation_cache_dir (`str`, *optional*):
            A folder where the states are kept in a file, for later runs with the same edits, model and location.
        trunk_residency (`str`, defaults to `"full"`):
            `"layerwise"` keeps the layers before the first trained one off the training device: each of them is there
            once, alone, while the states are made. Afterwards everything is back where it was. Load the model on the
            CPU for this.
        max_tokens_per_micro_batch (`int`, *optional*):
            A batch is computed in pieces of at most so many tokens, which changes nothing but speed and memory.
            `None`: chosen by the device and its free memory. Either way it is halved when memory runs out.

    Raises:
        ValueError: if a field does not have one of the values named here.
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "Of Adam; not given: 5e-4, or as the recipe says."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Passes over all the edits, at most; not given: 25, or as the recipe says."}
    )
    per_device_train_batch_size: int = field(default=100, metadata={"help": "Edits in a batch."})
    lr_scheduler_type: str | None = field(
        default=None, metadata={"help": "Not given: constant, or as the recipe says."}
    )
    adam_epsilon: float | None = field(
        default=None, metadata={"help": "Of AdamW; not given: 1e-8, or as the recipe says."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0, as published, is none."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: epoch, steps or no."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints: no, epoch or steps."})

    objective: Objective = field(default="target_new", metadata={"help": "What is scored."})
    loss_averaging: LossAveraging | None = field(
        default=None, metadata={"help": "What counts the same in a batch; not given: edit, or as the recipe says."}
    )
    edit_order: EditOrder = field(
        default="breadth_first", metadata={"help": "Epochs over all the edits, or one edit after the other."}
    )
    append_eos: bool = field(default=True, metadata={"help": "End every target with the tokenizer's EOS token."})
    chat_template: bool = field(default=False, metadata={"help": "Render edits with the tokenizer's chat template."})
    loss_floor: float = field(default=1e-2, metadata={"help": "No step below it, and the end of training."})
    stop_at_learned: float | None = field(
        default=None, metadata={"help": "Share of the edits that is learned when training stops; 0: does not."}
    )
    skip_learned_epochs: int = field(
        default=0, metadata={"help": "Epochs that an edit sits out after its loss was below the floor."}
    )
    activation_cache: CachePlace = field(
        default="auto", metadata={"help": "Where the states that enter the first trained layer are kept."}
    )
    activation_cache_dir: str | None = field(
        default=None, metadata={"help": "A folder where those states are kept for later runs on the same edits."}
    )
    trunk_residency: TrunkResidency = field(
        default="full", metadata={"help": "Whether the frozen layers before the location stay on the device."}
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={"help": "Tokens in one forward; changes nothing but speed and memory."},
    )

    def __post_init__(self) -> None:
        self.resolve()  # before transformers looks at what a recipe may have left open
        super().__post_init__()
        if self.deepspeed:
            # DeepSpeed clips at 1.0 where its configuration says nothing of it
            self.hf_deepspeed_config.config.setdefault("gradient_clipping", self.max_grad_norm)
        for name, allowed in CHOICES:
            value, known = getattr(self, name), get_args(allowed)
            if value not in known:
                raise ValueError(f"BreadthFirstConfig.{name}={value!r}: expected one of {', '.join(known)}.")
        if self.objective == "prompt_last" and self.has_kept:
            raise ValueError(
                "BreadthFirstConfig.objective='prompt_last' scores no token by those before it, as what is kept is. "
                "Leave out what is kept, or the objective."
            )
        if not (math.isfinite(self.loss_floor) and self.loss_floor >= 0):
            raise ValueError(f"BreadthFirstConfig.loss_floor={self.loss_floor!r}: expected a number from 0 upwards.")
        if not 0 <= (self.stop_at_learned or 0) <= 1:
            raise ValueError(f"BreadthFirstConfig.stop_at_learned={self.stop_at_learned!r}: expected 0 to 1.")
        if self.max_tokens_per_micro_batch is not None and self.max_tokens_per_micro_batch < 1:
            raise ValueError(
                f"BreadthFirstConfig.max_tokens_per_micro_batch={self.max_tokens_per_micro_batch}: expected 1 or more."
            )
        if self.skip_learned_epochs < 0 or (self.skip_learned_epochs and self.edit_order == "depth_first"):
            raise ValueError(
                f"BreadthFirstConfig.skip_learned_epochs={self.skip_learned_epochs}: expected 0 or more, and 0 for "
                "depth_first, which leaves an edit at the floor anyway."
            )
        if self.skip_learned_epochs and self.world_size > 1:
            raise ValueError(
                f"BreadthFirstConfig.skip_learned_epochs={self.skip_learned_epochs} is for one process, and there are "
                f"{self.world_size}. Leave it out."
            )
        if self.activation_cache == "off":
            for name, value in (("activation_cache_dir", None), ("trunk_residency", "full")):
                if getattr(self, name) != value:
                    raise ValueError(
                        f"BreadthFirstConfig.{name}={getattr(self, name)!r} needs the activation cache, and "
                        "activation_cache is 'off'. Leave that on 'auto'."
                    )
        if self.dataloader_drop_last:
            raise ValueError("BreadthFirstConfig.dataloader_drop_last would leave edits out of every epoch: drop it.")
        if self.edit_order == "depth_first":
            self._check_depth_first()

    def _check_depth_first(self) -> None:
        if self.num_prefixes or self.num_concatenated or self.has_kept or self.delta_decay:
            raise ValueError(
                f"BreadthFirstConfig.recipe={self.recipe!r}, or a field of it, trains variants of edits or keeps "
                "facts beside them, and depth-first trains one edit and nothing else. Leave it out."
            )
        if self.per_device_train_batch_size not in (1, type(self).per_device_train_batch_size):
            raise ValueError(
                f"BreadthFirstConfig.per_device_train_batch_size={self.per_device_train_batch_size}: depth-first "
                "trains one edit at a time. Give 1, or leave it out."
            )
        self.per_device_train_batch_size = 1
        if self.stop_at_learned:
            raise ValueError(
                f"BreadthFirstConfig.stop_at_learned={self.stop_at_learned:g}: depth-first has no epochs over all "
                "edits, and leaves each of them at the floor. Leave it out."
            )
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"BreadthFirstConfig.gradient_accumulation_steps={self.gradient_accumulation_steps}: depth-first "
                "takes a step for one edit. Leave it out."
            )
        if self.max_steps > 0:
            raise ValueError(
                f"BreadthFirstConfig.max_steps={self.max_steps}: depth-first takes num_train_epochs steps for "
                "every edit. Give those instead."
            )

    @property
    def steps_per_edit(self) -> int | None:
        """Steps that depth-first spends on one edit at most; `None` for breadth-first."""
        return math.ceil(self.num_train_epochs or 0) if self.edit_order == "depth_first" else None
