"""The arguments of the breadth-first trainer, with the published recipe as defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import TrainingArguments

from ..data.chat import chat_template_mode, template_arguments
from ..data.gradient_tokens import GradientTokens as FixedTokens
from ..data.joining import TargetSeparator, target_separator_mode
from ..engine.preparations import AUTO
from .objectives import LossAveraging, Objective
from .recipes import RECIPES

Recipe = Literal["published", "balanced"]
RetainedLoss = Literal["kl", "likelihood"]
RetainedFactsChoice = Literal["random", "nearest"]
GradientTokens = Literal["auto", FixedTokens]

BATCHES_PER_EPOCH = 10  # with a batch size that fits the number of edits
SMALLEST_BATCH, LARGEST_BATCH = 5, 100  # the published one is 100
GENERATED = "generated"
LOCALITY = "locality"


@dataclass
class PreservationArguments:
    """What is trained beside the edits, and what protects the rest of the model: fields of [`BreadthFirstConfig`].

    Args:
        recipe (`str`, defaults to `"published"`):
            Defaults of the fields that are `None` below: `"published"` trains the edits alone; `"balanced"` preserves
            far more of the rest of the model (figures in docs/pages/balanced.md).
        num_prefixes (`int`, *optional*):
            Number of texts that the base generates, a third of up to 5 tokens and the rest of up to 10. Each edit has
            a variant behind each of them (Gangadhar and Stratos, arXiv 2402.11078).
        prefixes_per_edit (`int`, *optional*): Use only N of these prefixes for each edit, drawn at random. `None`:
            all, or as the recipe says.
        num_concatenated (`int`, defaults to 0):
            Number of variants of each edit in which a random retained fact follows the target (SAUL, arXiv
            2410.02433).
        variants_per_epoch (`float`, *optional*):
            Number of variants of each edit in an epoch, its training `paraphrases` included, drawn anew each time. 0.5
            means one for every second edit, `inf` all of them.
        variant_weight (`float`, defaults to 1.0): Weight of a variant in the loss; an edit has 1.
        retained_facts (`str`, *optional*):
            Prompts whose answers must not change: a file or a Hub dataset, see `choose_retained_facts`. `"locality"`
            uses the locality probes of the edits, which can then no longer be evaluated on.
        num_retained_facts (`int`, defaults to 2000): Use at most N of these prompts.
        retained_facts_choice (`str`, defaults to `"random"`): `"random"`, or `"nearest"`: the most similar to the
            prompts of the edits.
        retained_subjects (`int`, *optional*):
            Number of prompts to retain for each edit, made by replacing the subject in its prompt. The base generates
            the subjects; if it generates none, those of the other edits are used.
        retained_relations (`int`, *optional*):
            Number of prompts to retain for each edit, made by putting its subject into the words of other edits: other
            facts about what the edit changes. Those that the base begins to answer as it does the edit's prompt are
            left out: they may be rewordings of it. A few edits, or edits of one relation, have fewer.
        retained_answer_tokens (`int`, *optional*):
            Number of tokens of the base's answers to retain. With 1 and `retained_loss="kl"` nothing is decoded.
        retained_per_edit (`float`, *optional*):
            Number of retained rows per edit in a batch; rows of `retained_subjects` and
            `retained_relations` go with their own edit. 0 trains on none of them.
        retained_weight (`float`, *optional*): Weight of their mean loss; the mean over edits and variants has 1.
        retained_loss (`str`, defaults to `"kl"`):
            `"kl"` keeps the model close to the base's next-token distribution, KL(base || model); `"likelihood"`
            trains the base's own answers as targets, as the source does.
        preserve_text (`str`, defaults to `"generated"`):
            Text to preserve: a file, a Hub dataset, or `"generated"` by the base itself.
        preserve_tokens (`int`, defaults to 8192): Use at most N tokens of that text.
        preserve_soft_strength (`float`, *optional*):
            Damping along directions of the preserved text, see `SoftProjector`. At 1, a direction of mean energy is
            trained half as fast. 0 = off.
        preserve_energy_share (`float`, defaults to 0.0):
            Share of the text's energy whose directions are closed to training, see `NullSpaceProjector`. 0 = off.
        preserve_cache_dir (`str`, *optional*, defaults to `"auto"`):
            Folder that stores, for later runs on the same model, what the base generates (prefixes, subjects, text)
            and the statistics of the text; the results are the same without it. `"auto"`: a folder of at most 2 GB
            in the user's cache (`$HF_HOME/peft_locft/preparations`). `"off"` or `None`: nothing is stored.
        delta_decay (`float`, *optional*):
            Share of the delta that one epoch at the full learning rate removes, less as the rate falls. Added to
            `weight_decay`; it does not depend on the rate or the number of steps in an epoch.
        delta_bound (`float`, *optional*): Largest absolute value in the delta (the L-infinity bound of FT-L).
        delta_density (`float`, *optional*):
            Share of each delta's values that stay after training: those largest relative to their weight (RECT, arXiv
            2401.04700).
    """

    recipe: Recipe = field(default="published", metadata={"help": "Defaults for the options that are not given."})
    num_prefixes: int | None = field(
        default=None, metadata={"help": "Number of generated prefixes; each edit is also trained behind them."}
    )
    prefixes_per_edit: int | None = field(
        default=None, metadata={"help": "Use only N random prefixes for each edit; default: all, or as the recipe."}
    )
    num_concatenated: int = field(
        default=0, metadata={"help": "Variants of each edit that end with a random retained fact (SAUL)."}
    )
    variants_per_epoch: float | None = field(
        default=None, metadata={"help": "Variants of each edit in an epoch, drawn anew; 0.5 = every second edit."}
    )
    variant_weight: float = field(default=1.0, metadata={"help": "Weight of a variant in the loss; an edit has 1."})
    retained_facts: str | None = field(
        default=None,
        metadata={"help": "Prompts whose answers must not change: a file, a Hub dataset, or 'locality' probes."},
    )
    num_retained_facts: int = field(default=2000, metadata={"help": "Use at most N retained facts."})
    retained_facts_choice: RetainedFactsChoice = field(
        default="random", metadata={"help": "How to choose them: random, or nearest to the edits' prompts."}
    )
    retained_subjects: int | None = field(
        default=None, metadata={"help": "Prompts to retain for each edit, made by replacing its subject."}
    )
    retained_relations: int | None = field(
        default=None, metadata={"help": "Prompts to retain for each edit: its subject in other edits' words."}
    )
    retained_answer_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of the base's answers to retain; 1 with kl needs no decoding."}
    )
    retained_per_edit: float | None = field(default=None, metadata={"help": "Retained rows per edit in a batch."})
    retained_weight: float | None = field(
        default=None, metadata={"help": "Weight of the retained rows' loss; the edits have 1."}
    )
    retained_loss: RetainedLoss = field(
        default="kl",
        metadata={"help": "Keep the base's next-token distribution (kl), or train its answers (likelihood)."},
    )
    preserve_text: str = field(
        default=GENERATED,
        metadata={"help": "Text to preserve: a file, a Hub dataset, or 'generated' by the base."},
    )
    preserve_tokens: int = field(default=8192, metadata={"help": "Use at most N tokens of the preserved text."})
    preserve_soft_strength: float | None = field(
        default=None, metadata={"help": "Damping along directions of the preserved text; 0 = off."}
    )
    preserve_energy_share: float = field(
        default=0.0, metadata={"help": "Share of the preserved text's energy to close to training; 0 = off."}
    )
    preserve_cache_dir: str | None = field(
        default=AUTO,
        metadata={"help": "Folder that stores what the base generates, and its statistics, for later runs; or off."},
    )
    delta_decay: float | None = field(
        default=None, metadata={"help": "Share of the delta that one epoch at the full learning rate removes."}
    )
    delta_bound: float | None = field(
        default=None, metadata={"help": "Largest absolute value in the delta (L-infinity bound of FT-L)."}
    )
    delta_density: float | None = field(
        default=None, metadata={"help": "Share of the delta's values that stay after training (RECT)."}
    )

    def resolve(self) -> None:
        """Fill the fields that were left open from the recipe, and check all of them.

        Raises:
            ValueError: if a field has a value that is not allowed in [`BreadthFirstConfig`].
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
        for name in ("num_prefixes", "num_concatenated", "retained_subjects", "retained_relations"):
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
        return bool(self.retained_facts or self.retained_subjects or self.retained_relations)


EditOrder = Literal["breadth_first", "depth_first"]
CachePlace = Literal["auto", "memory", "disk", "off"]
CHOICES = (
    ("objective", Objective),
    ("loss_averaging", LossAveraging),
    ("gradient_tokens", GradientTokens),
    ("edit_order", EditOrder),
    ("activation_cache", CachePlace),
)


@dataclass
class BreadthFirstConfig(PreservationArguments, TrainingArguments):
    """Arguments of [`BreadthFirstTrainer`]: those of `transformers.TrainingArguments`, and the recipe.

    The recipe is that of Yang et al., "Fine-tuning Done Right in Model Editing" (arXiv 2509.22072v4): Adam at a
    constant rate, no weight decay, no clipping. Rate and batch size fit the model and the number of edits, unless you
    give them; the paper uses 5e-4 (for three models of 7B and 8B parameters), batches of 100 and at most 25 epochs.

    Args:
        output_dir (`str`, *optional*):
            Folder of the adapter and of checkpoints. `None`: nothing is written; `save_model` then needs a folder.
        overwrite_output_dir (`bool`, defaults to `False`):
            Allow `train_edits` and the other jobs to write to an `output_dir` that holds an adapter, a model or
            checkpoints.
        save_total_limit (`int`, *optional*, defaults to 1):
            Keep only the N newest checkpoints; `None`: all. A run is resumed from the newest.
        learning_rate (`float` or `str`, defaults to `"auto"`):
            Learning rate of Adam. `"auto"`: a rate for each trained tensor, `relative_learning_rate` times the root
            mean square of its base weight; the losses correct it while training (see `RateControl`). Published rates
            are used for the very models and locations that they were published for. PEFT methods other than LocFT
            have 5e-4. A number is used as it is.
        relative_learning_rate (`float`, *optional*):
            Learning rate relative to the trained weight, for `learning_rate="auto"`. Higher rates learn in fewer
            steps and change more of the rest. `None`: 0.025, or as the recipe says.
        per_device_train_batch_size (`int`, *optional*):
            Edits in a batch on each device. `None`: a tenth of the edits, at least 5, at most 100 on all devices.
        num_train_epochs (`float`, *optional*): Largest number of passes over the edits. `None`: 50, or as the recipe
            says.
        lr_scheduler_type (`str`, *optional*): `None`: `"constant"`, or as the recipe says.
        adam_epsilon (`float`, *optional*): `None`: 1e-8, or as the recipe says.
        objective (`str`, defaults to `"target_new"`):
            What is scored: `"target_new"`, the target given the prompt; `"prompt_last"`, every target token by the
            logits of the last prompt token (FT-L); `"full"`, prompt and target.
        loss_averaging (`str`, *optional*):
            `"edit"`: every edit has the same weight in a batch; `"token"`: every scored token has, so that long
            targets are learned as fast as short ones. `None`: `"edit"`, or as the recipe says.
        gradient_tokens (`str`, *optional*):
            Tokens that write into the delta; the forward uses `W + delta` at every token. `"all"`; `"prompt"`: those
            of the prompt; `"subject"`: the last token of each mention of the subject; `"from_subject"`: from there to
            the last token before the target. A row without a subject is written by its prompt. `"auto"`: `"subject"`
            in the first half of the decoder layers, `"all"` elsewhere. `None`: `"all"`, or as the recipe says.
        edit_order (`str`, defaults to `"breadth_first"`):
            `"depth_first"` trains one edit after the other, each for at most `num_train_epochs` steps or down to the
            loss floor, with a fresh optimizer. For comparison with older methods.
        append_eos (`bool`, defaults to `True`):
            End every target with the tokenizer's EOS token, so that the model learns to stop.
        chat_template (`str`, defaults to `"auto"`):
            How edits are written: `"off"`: as plain text; `"on"`: as the turns of user and assistant, with the
            tokenizer's chat template; `"both"`: one row in each form, so that the answer comes in both. `"auto"`:
            `"both"` if the tokenizer has a chat template, else `"off"`. `True` and `False` are `"on"` and `"off"`.
            Edits that are conversations are always written with the template.
        chat_template_kwargs (`dict`, *optional*): Arguments of the template, such as `{"enable_thinking": False}`.
        target_separator (`str`, defaults to `"auto"`):
            Between a prompt and its target in plain text: `"space"`, `"none"`, or `"auto"`: as their scripts write it.
        loss_floor (`float`, defaults to `1e-2`):
            A batch whose loss is below it takes no step. Training stops after an epoch whose mean loss is below it.
        stop_at_learned (`float`, *optional*):
            Stop after an epoch in which this share of the edits was learned (the whole target was more probable than
            everything else together) and after which the model answers this share with their targets. 0 = off.
            `None`: 0, or as the recipe says.
        activation_cache (`str`, defaults to `"auto"`):
            Where to store the states that leave the layers before the first trained one, which run only once:
            `"memory"`, `"disk"` (a memory-mapped scratch file in `output_dir`, without one in the system's folder for
            temporary files), or `"off"`: every step runs the whole model on padded edits. `"auto"` takes memory if
            they need less than half of what is free, else disk; if the states would be wrong for the model, it runs
            the whole model and says why.
        activation_cache_dir (`str`, *optional*):
            Folder that stores these states for later runs with the same edits, model and location.
        offload_trunk (`bool`, defaults to `False`):
            Keep the layers before the first trained one (the trunk) on the CPU: each is moved to the training device
            once, alone, while the states are computed. Load the model on the CPU for this.
        max_tokens_per_micro_batch (`int`, *optional*):
            Compute a batch in micro-batches of at most N tokens. Changes speed and memory, not the loss. `None`:
            chosen from the device and its free memory. Halved when memory runs out.

    Raises:
        ValueError: if a field has a value that is not allowed here.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the adapter, and for checkpoints."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write to an output folder that holds an adapter, a model or checkpoints."}
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "Keep only the N newest checkpoints."})
    # the parser makes it a text, which is read below
    learning_rate: float | str | None = field(
        default=AUTO, metadata={"help": "Learning rate of Adam; auto: one that fits each trained tensor."}
    )
    relative_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Rate relative to the trained weight, for auto; default: 0.025, or as the recipe."},
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Largest number of passes over the edits; default: 50, or as the recipe."}
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Edits in a batch; default: a tenth of the edits, 5 to 100."}
    )
    lr_scheduler_type: str | None = field(
        default=None, metadata={"help": "Learning rate schedule; default: constant, or as the recipe."}
    )
    adam_epsilon: float | None = field(
        default=None, metadata={"help": "Epsilon of AdamW; default: 1e-8, or as the recipe."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 = off."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: epoch, steps or no."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints: no, epoch or steps."})

    objective: Objective = field(
        default="target_new",
        metadata={"help": "Tokens to score: the target, the target from the last prompt token (FT-L), or all."},
    )
    loss_averaging: LossAveraging | None = field(
        default=None, metadata={"help": "What has the same weight in a batch; default: edit, or as the recipe."}
    )
    gradient_tokens: GradientTokens | None = field(
        default=None, metadata={"help": "Tokens that write into the delta; default: all, or as the recipe."}
    )
    edit_order: EditOrder = field(
        default="breadth_first", metadata={"help": "Train epochs over all edits, or one edit after the other."}
    )
    append_eos: bool = field(default=True, metadata={"help": "End every target with the tokenizer's EOS token."})
    chat_template: str = field(
        default="auto",
        metadata={"help": "Train edits in the chat template: on, off or both; auto: both, if the model has one."},
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."}
    )
    target_separator: TargetSeparator = field(
        default="auto", metadata={"help": "Between prompt and target: space or none; auto: as their scripts write it."}
    )
    loss_floor: float = field(default=1e-2, metadata={"help": "Skip steps and stop training below this loss."})
    stop_at_learned: float | None = field(
        default=None, metadata={"help": "Stop once this share of the edits is learned; 0 = off."}
    )
    activation_cache: CachePlace = field(
        default="auto", metadata={"help": "Where to store the states that enter the first trained layer."}
    )
    activation_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that stores these states for later runs on the same edits."}
    )
    offload_trunk: bool = field(
        default=False, metadata={"help": "Keep the frozen layers before the location on the CPU; saves device memory."}
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None, metadata={"help": "Compute at most N tokens in one forward; changes only speed and memory."}
    )

    def __post_init__(self) -> None:
        self.chat_template = chat_template_mode(self.chat_template, "BreadthFirstConfig.chat_template")
        self.chat_template_kwargs = template_arguments(
            self.chat_template_kwargs, "BreadthFirstConfig.chat_template_kwargs"
        )
        self.target_separator = target_separator_mode(self.target_separator, "BreadthFirstConfig.target_separator")
        self.resolve()  # before transformers checks the fields that the recipe fills
        self._check_rate()
        self._check_numbers()
        has_folder = self.output_dir is not None
        super().__post_init__()
        if not has_folder:
            self.output_dir = None  # transformers writes to the folder "trainer_output" otherwise
            self._check_writes_nothing()
        if self.deepspeed:
            # DeepSpeed clips at 1.0 by default
            self.hf_deepspeed_config.config.setdefault("gradient_clipping", self.max_grad_norm)
        for name, allowed in CHOICES:
            value, known = getattr(self, name), get_args(allowed)
            if value not in known:
                raise ValueError(f"BreadthFirstConfig.{name}={value!r}: expected one of {', '.join(known)}.")
        if self.objective == "prompt_last" and self.has_retained:
            raise ValueError(
                "BreadthFirstConfig.objective='prompt_last' scores tokens by the prompt alone, and retained facts are "
                "scored token by token. Leave out retained_facts, retained_subjects and "
                "retained_relations, or the objective."
            )
        if not (math.isfinite(self.loss_floor) and self.loss_floor >= 0):
            raise ValueError(
                f"BreadthFirstConfig.loss_floor={self.loss_floor!r}: expected a finite number, 0 or more."
            )
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
                        f"BreadthFirstConfig.{name}={getattr(self, name)!r} needs the activation cache, but "
                        "activation_cache='off'. Leave it on 'auto'."
                    )
        if self.dataloader_drop_last:
            raise ValueError(
                "BreadthFirstConfig.dataloader_drop_last=True would skip edits in every epoch. Leave it out."
            )
        if self.edit_order == "depth_first":
            self._check_depth_first()

    def _check_rate(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = AUTO
        if isinstance(self.learning_rate, str) and self.learning_rate != AUTO:
            try:
                self.learning_rate = float(self.learning_rate)
            except ValueError:
                raise ValueError(
                    f"BreadthFirstConfig.learning_rate={self.learning_rate!r}: expected a number, or 'auto'."
                ) from None
        for name in ("learning_rate", "relative_learning_rate"):
            value = getattr(self, name)
            if value != AUTO and not 0 <= value < math.inf:
                raise ValueError(f"BreadthFirstConfig.{name}={value!r}: expected a number, 0 or more.")
        if self.learning_rate == AUTO and self.deepspeed:
            raise ValueError(
                "BreadthFirstConfig.learning_rate='auto' reads the weights, and DeepSpeed may have sharded them. Pass "
                "a number."
            )

    def _check_numbers(self) -> None:
        for name in ("per_device_train_batch_size", *(["num_train_epochs"] if self.max_steps <= 0 else [])):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"BreadthFirstConfig.{name}={value!r}: expected a number above 0.")

    def _check_writes_nothing(self) -> None:
        for name, off in (("save_strategy", "no"), ("push_to_hub", False)):
            value = getattr(self, name)
            if getattr(value, "value", value) != off:
                raise ValueError(
                    f"BreadthFirstConfig.{name}={getattr(value, 'value', value)!r} writes checkpoints, and output_dir "
                    "is missing. Give a folder: output_dir='out'."
                )

    def _check_depth_first(self) -> None:
        if self.num_prefixes or self.num_concatenated or self.has_retained or self.delta_decay:
            raise ValueError(
                f"BreadthFirstConfig.edit_order='depth_first' trains one edit and nothing else; found "
                f"recipe={self.recipe!r} and fields that train variants or retained facts, or decay the delta. Use "
                "recipe='published' without them."
            )
        if self.per_device_train_batch_size not in (1, None):
            raise ValueError(
                f"BreadthFirstConfig.per_device_train_batch_size={self.per_device_train_batch_size}: depth-first "
                "trains one edit at a time. Use 1, or leave it out."
            )
        self.per_device_train_batch_size = 1
        if self.stop_at_learned:
            raise ValueError(
                f"BreadthFirstConfig.stop_at_learned={self.stop_at_learned:g}: depth-first has no epochs over all "
                "edits; it leaves each one at the loss floor. Leave it out."
            )
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"BreadthFirstConfig.gradient_accumulation_steps={self.gradient_accumulation_steps}: depth-first "
                "takes each step on one edit. Leave it out."
            )
        if self.max_steps > 0:
            raise ValueError(
                f"BreadthFirstConfig.max_steps={self.max_steps}: depth-first takes num_train_epochs steps for "
                "every edit. Set that instead."
            )

    @property
    def steps_per_edit(self) -> int | None:
        """Most steps that depth-first spends on one edit; `None` for breadth-first."""
        return math.ceil(self.num_train_epochs or 0) if self.edit_order == "depth_first" else None


def batch_size_for(num_edits: int, args: BreadthFirstConfig) -> int:
    """Return the number of edits in a batch on each device: the given one, or one that fits the number of edits."""
    if args.per_device_train_batch_size is not None:
        return args.per_device_train_batch_size
    devices = args.world_size * max(args.n_gpu, 1)
    fitting = min(max(num_edits / BATCHES_PER_EPOCH, min(num_edits, SMALLEST_BATCH)), LARGEST_BATCH)
    return math.ceil(fitting / devices)
