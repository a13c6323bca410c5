"""The arguments of the breadth-first trainer, with the published recipe as defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import TrainingArguments

from .objectives import LossAveraging, Objective

Recipe = Literal["published", "balanced"]
RetainedLoss = Literal["kl", "likelihood"]
RetainedFactsChoice = Literal["random", "nearest"]

GENERATED = "generated"
LOCALITY = "locality"
# what a field is where it was left open
RECIPES: dict[str, dict[str, Any]] = {
    "published": {
        "learning_rate": 5e-4,
        "num_train_epochs": 25,
        "lr_scheduler_type": "constant",
        "stop_at_learned": 0.0,
        "adam_epsilon": 1e-8,
        "loss_averaging": "edit",
        "num_prefixes": 0,
        "variants_per_epoch": 1.0,
        "retained_subjects": 0,
        "retained_per_edit": 1.0,
        "retained_answer_tokens": 1,
        "retained_weight": 1.0,
        "preserve_soft_strength": 0.0,
        "delta_decay": 0.0,
    },
    "balanced": {
        "learning_rate": 8e-4,
        "num_train_epochs": 24,
        "lr_scheduler_type": "linear",
        "stop_at_learned": 0.98,
        "adam_epsilon": 1e-4,
        "loss_averaging": "token",
        "num_prefixes": 5,
        "prefixes_per_edit": 2,
        "variants_per_epoch": 0.3,
        "retained_subjects": 4,
        "retained_per_edit": 1.0,
        "retained_answer_tokens": 1,
        "retained_weight": 2.0,
        "preserve_soft_strength": 20.0,
        "delta_decay": 0.07,
    },
}


@dataclass
class PreservationArguments:
    """What is trained beside the edits, and what keeps the rest of the model: fields of [`BreadthFirstConfig`].

    Args:
        recipe (`str`, defaults to `"published"`):
            What the fields that are `None` below are taken for: `"published"`, nothing beside the edits;
            `"balanced"`, what keeps far more of the rest of the model; docs/pages/balanced.md has the figures.
        num_prefixes (`int`, *optional*):
            Texts that the base generates, a third of them of at most 5 tokens and the others of at most 10; every edit
            has a variant behind each (Gangadhar and Stratos, arXiv 2402.11078).
        prefixes_per_edit (`int`, *optional*): so many of them for each edit, drawn at random. `None`: all,
            or as the recipe says.
        num_concatenated (`int`, defaults to 0):
            Variants of each edit whose target is followed by a random kept fact (SAUL, arXiv 2410.02433).
        variants_per_epoch (`float`, *optional*):
            Variants of each edit, its training `paraphrases` included, that are trained beside it in an epoch, drawn
            anew each time; 0.5 is one of every second edit, `inf` all of them.
        variant_weight (`float`, defaults to 1.0): of a variant in the loss, beside 1 of its edit.
        retained_facts (`str`, *optional*):
            Prompts whose answers must stay: a file or a Hub dataset, see `choose_retained_facts`; `"locality"`: the
            locality probes of the edits, which cannot be evaluated on afterwards.
        num_retained_facts (`int`, defaults to 2000): so many of them, at most.
        retained_facts_choice (`str`, defaults to `"random"`): or `"nearest"`, most similar to the edits' prompts.
        retained_subjects (`int`, *optional*):
            For each edit, so many prompts made from its own by putting other subjects in the place of its subject:
            what is asked in the same words, and must be answered as before. The base makes these subjects up; from
            one that makes up none, the other edits' are taken.
        retained_answer_tokens (`int`, *optional*):
            Tokens of the base's own answers that are kept. With 1 and `retained_loss="kl"` nothing is decoded.
        retained_per_edit (`float`, *optional*):
            Retained rows beside each edit of a batch; those that `retained_subjects` made are beside the edits that
            they were made from. 0 trains on none, and leaves them to the projector.
        retained_weight (`float`, *optional*): of their mean loss, beside 1 of the mean of the edits and variants.
        retained_loss (`str`, defaults to `"kl"`):
            `"kl"` holds the model to what the base says next, KL(base || model); `"likelihood"` trains the base's own
            answers as targets, as the source does.
        preserve_text (`str`, defaults to `"generated"`):
            The text to preserve: a file, a dataset on the Hub, or text that the base generates itself.
        preserve_tokens (`int`, defaults to 8192): of that text, at most.
        preserve_soft_strength (`float`, *optional*):
            How much slower is trained in a direction that has the mean energy of the location's inputs on that text;
            see `SoftProjector`. 0: no slower.
        preserve_energy_share (`float`, defaults to 0.0):
            Share of that energy whose directions are closed to training instead; see `NullSpaceProjector`. 0: none.
        preserve_cache_dir (`str`, *optional*): a folder where the statistics are kept for later runs.
        delta_decay (`float`, *optional*):
            Share of the delta that an epoch takes off it at the full learning rate, and less as that falls: beside
            `weight_decay`, AdamW's draws the delta towards zero, the model towards its base, whatever the rate and
            however many steps an epoch has.
        delta_bound (`float`, *optional*): no value of the delta becomes larger (the L-infinity bound of FT-L).
        delta_density (`float`, *optional*):
            Share of each delta's values that are kept after training, those largest beside their weight (RECT, arXiv
            2401.04700).
    """

    recipe: Recipe = field(
        default="published", metadata={"help": "What the fields below are where they are not given."}
    )
    num_prefixes: int | None = field(
        default=None, metadata={"help": "Prefixes that the base generates; every edit is also trained behind each."}
    )
    prefixes_per_edit: int | None = field(
        default=None,
        metadata={"help": "So many of them for each edit, drawn at random; not given: all, or as the recipe."},
    )
    num_concatenated: int = field(
        default=0, metadata={"help": "Variants of each edit that go on with a random kept fact (SAUL)."}
    )
    variants_per_epoch: float | None = field(
        default=None, metadata={"help": "Variants of each edit in an epoch, drawn anew."}
    )
    variant_weight: float = field(default=1.0, metadata={"help": "Of a variant in the loss, beside 1 of its edit."})
    retained_facts: str | None = field(
        default=None,
        metadata={"help": "Prompts whose answers are kept: a file, a dataset on the Hub, or 'locality' of the edits."},
    )
    num_retained_facts: int = field(default=2000, metadata={"help": "Take so many of them, at most."})
    retained_facts_choice: RetainedFactsChoice = field(
        default="random", metadata={"help": "Which of them: random, or nearest to the edits."}
    )
    retained_subjects: int | None = field(
        default=None, metadata={"help": "Kept prompts made of each edit's by putting other subjects into it."}
    )
    retained_answer_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of the base's answers that are kept; 1 with kl asks for no decoding."}
    )
    retained_per_edit: float | None = field(default=None, metadata={"help": "Kept rows beside each edit of a batch."})
    retained_weight: float | None = field(
        default=None, metadata={"help": "Of what is kept in the loss, beside 1 of the edits."}
    )
    retained_loss: RetainedLoss = field(
        default="kl", metadata={"help": "Hold kept rows to the base's distribution, or train its own answers."}
    )
    preserve_text: str = field(
        default=GENERATED,
        metadata={"help": "Text to preserve: a file, a dataset on the Hub, or 'generated' by the base."},
    )
    preserve_tokens: int = field(default=8192, metadata={"help": "Tokens of that text, at most."})
    preserve_soft_strength: float | None = field(
        default=None,
        metadata={"help": "How much slower is trained where that text has the mean of its inputs' energy; 0: not."},
    )
    preserve_energy_share: float = field(
        default=0.0,
        metadata={"help": "Share of the inputs' energy on that text that is closed to training."},
    )
    preserve_cache_dir: str | None = field(
        default=None, metadata={"help": "A folder where its statistics are kept for later runs."}
    )
    delta_decay: float | None = field(
        default=None, metadata={"help": "Share of the delta that an epoch takes off it at the full learning rate."}
    )
    delta_bound: float | None = field(default=None, metadata={"help": "L-infinity bound on the delta (FT-L)."})
    delta_density: float | None = field(
        default=None, metadata={"help": "Share of each delta's values that are kept after training (RECT)."}
    )

    def resolve(self) -> None:
        """Set the fields that were left open as the recipe says, and check all of them.

        Raises:
            ValueError: if a field does not have one of the values named in [`BreadthFirstConfig`].
        """
        for name, allowed in (
            ("recipe", Recipe),
            ("retained_loss", RetainedLoss),
            ("retained_facts_choice", RetainedFactsChoice),
        ):
            value, known = getattr(self, name), get_args(allowed)
            if value not in known:
                raise ValueError(f"BreadthFirstConfig.{name}={value!r}: expected one of {', '.join(known)}.")
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("num_prefixes", "num_concatenated", "retained_subjects"):
            self._check(name, "0 or more", getattr(self, name) >= 0)
        for name in ("num_retained_facts", "retained_answer_tokens", "preserve_tokens"):
            self._check(name, "1 or more", getattr(self, name) >= 1)
        self._check("prefixes_per_edit", "1 or more", self.prefixes_per_edit is None or self.prefixes_per_edit >= 1)
        self._check("variants_per_epoch", "a number above 0", (self.variants_per_epoch or 0) > 0)
        for name in (
            "variant_weight",
            "retained_weight",
            "retained_per_edit",
            "preserve_soft_strength",
        ):
            self._check(name, "0 or more", 0 <= getattr(self, name) < math.inf)
        self._check("preserve_energy_share", "0 to 1", 0 <= self.preserve_energy_share <= 1)
        self._check("delta_decay", "0 to 1", 0 <= (self.delta_decay or 0) <= 1)

    def _check(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"BreadthFirstConfig.{name}={getattr(self, name)!r}: expected {expected}.")

    @property
    def has_retained(self) -> bool:
        return bool(self.retained_facts or self.retained_subjects)


EditOrder = Literal["breadth_first", "depth_first"]
CachePlace = Literal["auto", "memory", "disk", "off"]
CHOICES = (
    ("objective", Objective),
    ("loss_averaging", LossAveraging),
    ("edit_order", EditOrder),
    ("activation_cache", CachePlace),
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
        activation_cache (`str`, defaults to `"auto"`):
            The layers before the first trained one are run once, and the states that leave them kept: in `"memory"`,
            on `"disk"` (a memory-mapped scratch file in `output_dir`), or not at all (`"off"`: every step runs the
            whole model on padded edits). `"auto"` is memory where they take less than half of what is free, else disk;
            where keeping them would be wrong it does without, and says why.
        activation_cache_dir (`str`, *optional*):
            A folder where the states are kept in a file, for later runs with the same edits, model and location.
        offload_trunk (`bool`, defaults to `False`):
            Keep the layers before the first trained one (the trunk) on the CPU: each of them is on the training device
            once, alone, while the states are computed. After training all weights are back where they were. Load the
            model on the CPU.
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
    activation_cache: CachePlace = field(
        default="auto", metadata={"help": "Where the states that enter the first trained layer are kept."}
    )
    activation_cache_dir: str | None = field(
        default=None, metadata={"help": "A folder where those states are kept for later runs on the same edits."}
    )
    offload_trunk: bool = field(
        default=False, metadata={"help": "Keep the frozen layers before the location on the CPU; saves device memory."}
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
        if self.objective == "prompt_last" and self.has_retained:
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
        if self.activation_cache == "off":
            for name, value in (("activation_cache_dir", None), ("offload_trunk", False)):
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
        if self.num_prefixes or self.num_concatenated or self.has_retained or self.delta_decay:
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
